"""From what users saw to a figure: rates on loop-free text, medians with their spread, ratios within one repeat.

Pure arithmetic, the same for every system that is measured. A mark is (seconds since the run began, tokens so far).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparkrelay.cli.loops import loop_share, loop_start

Mark = tuple[float, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one user got: its ids, and when how many of them were there. Marks ascend in both parts.

    round_count  forwards of the target after the one that read the prompt; 0 where every mark after the first is one
    """

    token_ids: tuple[int, ...]
    marks: tuple[Mark, ...]
    round_count: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a system: an answer for each user, all begun at once; wall_s until the last of them was whole.

    notes  what else the system says of the run
    """

    answers: tuple[Answer, ...]
    wall_s: float
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens and the time they took, summed over users.

    per_s  what all users together get: the pooled speed of one, times their number
    """

    user_count: int
    token_count: int
    seconds: float

    @property
    def per_s(self) -> float:
        return self.user_count * self.token_count / self.seconds if self.seconds > 0 else 0.0


def decode_rate(run: Run, *, cut_loops: bool = True) -> Rate:
    """Speed from each user's first token on; reading the prompt is not in it.

    cut_loops: what a user gets from the start of a loop on counts neither as tokens nor as time.
    """
    token_count, seconds = 0, 0.0
    for answer in run.answers:
        limit = loop_start(answer.token_ids) if cut_loops else len(answer.token_ids)
        kept = [mark for mark in answer.marks if mark[1] <= limit]
        if len(kept) >= 2:
            token_count += kept[-1][1] - kept[0][1]
            seconds += kept[-1][0] - kept[0][0]
    return Rate(len(run.answers), token_count, seconds)


def wall_rate(run: Run) -> float:
    """Tokens a second of the whole run, reading the prompts and waiting for the last user included."""
    return sum(len(answer.token_ids) for answer in run.answers) / run.wall_s if run.wall_s > 0 else 0.0


def share_cut(runs: Iterable[Run]) -> float:
    """The part of all generated tokens that the loop rule cuts, 0 to 1."""
    answers = [answer.token_ids for run in runs for answer in run.answers]
    token_count = sum(len(ids) for ids in answers)
    return sum(loop_share(ids) * len(ids) for ids in answers) / token_count if token_count else 0.0


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def tokens_a_round(runs: Iterable[Run]) -> float:
    """The accepted length: mean tokens of a round, the target's own included; 1 of a plain system, 0 without a round."""
    answers = [answer for run in runs for answer in run.answers if answer.marks]
    rounds = sum(answer.round_count or len(answer.marks) - 1 for answer in answers)
    tokens = sum(answer.marks[-1][1] - answer.marks[0][1] for answer in answers if not answer.round_count)
    tokens += sum(len(answer.token_ids) - 1 for answer in answers if answer.round_count)
    return tokens / rounds if rounds else 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeats of one figure: their median, the least and the most."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


def spread(values: Sequence[float]) -> Spread | None:
    """None without a value."""
    return Spread(statistics.median(values), min(values), max(values), len(values)) if values else None


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread | None:
    """above / below, repeat by repeat: what slows a machine down for a while slows both. None where either is missing."""
    return spread([a / b for a, b in zip(above, below, strict=False) if b > 0])


def turns_of(names: Sequence[str], repeat: int) -> list[str]:
    """The order of one repeat: each one begins with the next name, so that nobody always runs first or behind the same one."""
    shift = repeat % len(names) if names else 0
    return [*names[shift:], *names[:shift]]


def rounded(value: Spread | None, digits: int = 3) -> float | None:
    """The median for a JSON object, null if it was not measured."""
    return None if value is None else round(value.median, digits)


def as_json(value: Spread | None) -> dict[str, float | int] | None:
    """The whole spread for a JSON object."""
    if value is None:
        return None
    return {
        "median": round(value.median, 3),
        "low": round(value.low, 3),
        "high": round(value.high, 3),
        "count": value.count,
    }
