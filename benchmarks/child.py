"""The child's half of a measured system in a process of its own: JSON lines on standard input and output. Standard library only,
because peers run under another Python.

    first line out   {"about": {...}} once it is ready, or {"error": text} and its end
    each line in     {"prompts": [[id, ...], ...], "token_count": K, "mode": {...}}
    its answer       {"answers": [{"token_ids": [...], "marks": [[s, count], ...]}, ...], "wall_s": s, "notes": {...}},
                     or {"error": text}

It ends when its input ends. While it waits for a line it computes nothing, so that others can be measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Marks = list[tuple[float, int]]


@dataclass
class Answered:
    """What a run gave: ids and marks of every user, and what else the system says of the run."""

    answers: list[tuple[list[int], Marks]]
    notes: dict[str, Any] = field(default_factory=dict)


RunPrompts = Callable[[Sequence[Sequence[int]], int, dict[str, Any]], Answered]
Start = Callable[[], tuple[RunPrompts, dict[str, Any]]]


def serve(start: Start) -> None:
    """Loads the system, says what it is, and answers until its input ends. Whatever else it prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        run_prompts, about = start()
    except Exception as error:  # noqa: BLE001 - whatever keeps a peer from starting is a named gap
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say({"about": about})
    for line in sys.stdin:
        say(_answer(run_prompts, json.loads(line)))


def _answer(run_prompts: RunPrompts, request: dict[str, Any]) -> dict[str, Any]:
    begun = time.perf_counter()
    try:
        answered = run_prompts(request["prompts"], request["token_count"], request["mode"])
    except Exception as error:  # noqa: BLE001 - said to the parent, who decides
        return {"error": f"{type(error).__name__}: {error}"}
    wall_s = time.perf_counter() - begun
    answers = [{"token_ids": ids, "marks": marks} for ids, marks in answered.answers]
    return {"answers": answers, "wall_s": wall_s, "notes": answered.notes}
