"""Our engine without its services: `python -m benchmarks.own_engine OPTIONS_JSON`. What the stack adds is the difference.

Options: {"model": name or toy, "dtype": name, "threads": N, "read_speed": whether `about` shall say how fast these threads read
memory}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.child import Answered, Marks, RunPrompts, serve
from benchmarks.floor import read_speed
from sparkrelay.device.flat_model import DtypeName
from sparkrelay.device.step_profile import StepProfile, Stopwatch
from sparkrelay.outcomes import FinishReason
from sparkrelay.sampling import Sampling
from sparkrelay.store import resolve
from verifier_service.depth_policies import parse_depth_policy
from verifier_service.engine import Engine, EngineSettings
from verifier_service.events import Committed, EndSession, StartTurn, TurnOver
from verifier_service.models import TargetModel
from verifier_service.models.huggingface import HuggingFaceModel
from verifier_service.models.toy import toy_model

PROFILE = "profile_ms"
PARTS = ("linear", "attention", "other", "choice", "scheduling")
BLOCK_COUNT = 4096  # room for every user of a benchmark; it is taken only as it is used


def start() -> tuple[RunPrompts, dict[str, Any]]:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    stopwatch = Stopwatch(time.perf_counter_ns)
    model = load(options["model"], options["dtype"], stopwatch)
    settings = EngineSettings(block_count=BLOCK_COUNT, leftover_percent=0)
    engine = Engine(model, settings, parse_depth_policy("off"), stopwatch=stopwatch)
    run_number = 0

    def run_prompts(prompts: Sequence[Sequence[int]], token_count: int, _mode: dict[str, Any]) -> Answered:
        nonlocal run_number
        run_number += 1
        profiles: list[StepProfile] = []
        answers = run(engine, prompts, token_count, f"run{run_number}", profiles)
        return Answered(answers, {PROFILE: mean_parts(profiles, len(prompts))})

    about = {
        "torch": torch.__version__,
        "exact": model.info.exact,
        "read_gb_per_s": round(read_speed() / 1e9, 1) if options["read_speed"] else 0.0,
        "pid": os.getpid(),
    }
    return run_prompts, about


def load(model: str, dtype: DtypeName, stopwatch: Stopwatch) -> TargetModel:
    """The target as the verifier loads it."""
    if model.partition(":")[0] == "toy":
        return toy_model(model)
    return HuggingFaceModel.load(resolve(model).path, model_id=model, dtype=dtype, stopwatch=stopwatch)


def run(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    token_count: int,
    run_id: str,
    profiles: list[StepProfile],
) -> list[tuple[list[int], Marks]]:
    """All prompts at once, greedy, until every turn is over; marks are taken when a step has returned.

    profiles  where each step's time went is appended here
    """
    begun = time.perf_counter()
    names = {f"{run_id}-{number}": number for number in range(len(prompts))}
    ids_of: list[list[int]] = [[] for _ in prompts]
    marks_of: list[Marks] = [[] for _ in prompts]
    open_turns = set(names)
    commands: list[Any] = [_turn(name, prompts[number], token_count) for name, number in names.items()]
    while open_turns:
        result = engine.step(commands, time.monotonic_ns() // 1000)
        commands, at = [], time.perf_counter() - begun
        if result.profile is not None:
            profiles.append(result.profile)
        for event in result.events:
            if isinstance(event, Committed):
                ids = ids_of[names[event.turn_id]]
                ids += event.token_ids
                marks_of[names[event.turn_id]].append((at, len(ids)))
            elif isinstance(event, TurnOver):
                assert event.finish_reason is FinishReason.LENGTH, event
                open_turns.remove(event.turn_id)
    engine.step([EndSession(name) for name in names], time.monotonic_ns() // 1000)
    return list(zip(ids_of, marks_of, strict=True))


def mean_parts(profiles: Sequence[StepProfile], user_count: int) -> dict[str, float]:
    """Mean milliseconds by part of the steps in which every user got one token and nobody's prompt was read."""
    steps = [each for each in profiles if each.row_count == each.session_count == user_count]
    if not steps:
        return {}
    return {part: sum(getattr(each, f"{part}_us") for each in steps) / len(steps) / 1000 for part in PARTS}


def _turn(name: str, prompt: Sequence[int], token_count: int) -> StartTurn:
    return StartTurn(
        session_id=name,
        turn_id=name,
        keep_len=0,
        keep_hash=b"",
        append_ids=tuple(prompt),
        output_start=len(prompt),
        sampling=Sampling(),
        max_tokens=token_count,
        stop_ids=frozenset(),
    )


if __name__ == "__main__":
    serve(start)
