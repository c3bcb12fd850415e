"""How deep each session's block is checked: one question a step, about all its sessions together.

A policy sees every block of the step at once, because depth is shared out: a row given to one session makes the step longer
for all. `off`, `fixed:K` and `threshold:T` look at little of it. `adaptive` finds the depths with the most expected tokens per
step time; `algorithm1` is the paper's rule, which stops at the first row that does not pay and so never looks at what a
token's value has to say about the next one's confidence (it needs not to, under the rejection rule).
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from verifier_service.step_curve import GUESS, StepCurve, StepShape

MAX_DEPTH = 15
AUTO_DEPTH = 4
# A typical block, for a policy that is asked how long the next one should be before it has seen any.
TYPICAL_CONFIDENCES = (0.8,) * MAX_DEPTH
_BUDGET_MARGIN = 2  # blocks better than the typical one are checked deeper


@dataclass(frozen=True, slots=True)
class DepthQuestion:
    """The blocks of one step, as columns: entry i of each is one block.

    confidences     P(token k matches given that all before it match), as corrected; outside of 0..1 or NaN it is made harmless
    max_depths      the most tokens that may be checked: block, rest of the turn and room; at least 1
    fixed_row_count all rows of the step that are not up for decision: anchors, fixed depths, prompts being read
    session_count   sessions in the step that commit a token whatever the depths
    row_limit       the most draft tokens the step has budget for, all blocks together
    key_block_count blocks of 512 keys that the step's sessions look back on
    idle_us         time between two steps in which nothing is computed, because blocks are awaited
    weights         what an expected token of each block counts; None: 1 each
    curve           how long steps take
    """

    confidences: Sequence[tuple[float, ...]]
    max_depths: Sequence[int]
    fixed_row_count: int
    session_count: int
    row_limit: int
    key_block_count: int = 0
    idle_us: float = 0.0
    weights: Sequence[float] | None = None
    curve: StepCurve = field(default_factory=lambda: StepCurve(GUESS))

    def survivals(self) -> list[tuple[float, ...]]:
        """For each block, P(token k and all before it match): within 0..1 and never increasing, whatever was sent."""
        return [survivals_of(confidences) for confidences in self.confidences]

    def values(self) -> list[tuple[float, ...]]:
        """For each block, what checking token k adds to the step's worth: its survival times the block's weight. Cut to
        the depth that is possible, and before the first token that cannot match."""
        values: list[tuple[float, ...]] = []
        weights = self.weights
        for index, (confidences, most) in enumerate(zip(self.confidences, self.max_depths, strict=True)):
            survivals = survivals_of(confidences[:most])
            if survivals and survivals[-1] == 0.0:
                survivals = survivals[: survivals.index(0.0)]
            if weights is not None:
                weight = weights[index]
                survivals = tuple([survival * weight for survival in survivals])
            values.append(survivals)
        return values

    def shape(self, row_count: int) -> StepShape:
        """The step with so many rows."""
        return StepShape(row_count, self.session_count, self.key_block_count)


def survivals_of(confidences: Sequence[float]) -> tuple[float, ...]:
    """The running product. A confidence outside 0..1 is clamped, NaN is 0: hostile values cannot make survivals grow."""
    survivals = tuple(accumulate(confidences, operator.mul))
    if not survivals or (min(confidences) >= 0.0 and max(confidences) <= 1.0 and survivals[-1] >= 0.0):
        return survivals  # NaN anywhere makes the last product NaN, which is not >= 0
    return tuple(accumulate([min(c, 1.0) if c > 0.0 else 0.0 for c in confidences], operator.mul))


class DepthPolicy(Protocol):
    """Decides; keeps no record of sessions."""

    @property
    def name(self) -> str:
        """As a setting spells it."""

    def draft_budget(self, session_count: int) -> int:
        """How many draft tokens a session's next block should have, with so many sessions decoding. 0: do not draft."""

    def depths(self, question: DepthQuestion) -> Sequence[int]:
        """One depth a block, each from 0 to its max_depth. If they exceed row_limit, the caller levels them."""


@dataclass(frozen=True, slots=True)
class FixedDepth:
    """Always the same depth, as far as the block reaches. Depth 0 is plain decoding."""

    name: str
    depth: int

    def draft_budget(self, session_count: int) -> int:
        return self.depth

    def depths(self, question: DepthQuestion) -> Sequence[int]:
        depth = self.depth
        return [min(depth, most) for most in question.max_depths]


@dataclass(frozen=True, slots=True)
class ThresholdDepth:
    """As deep as the tokens survive with at least a given probability, whatever a row costs."""

    name: str
    least: float

    def draft_budget(self, session_count: int) -> int:
        return MAX_DEPTH

    def depths(self, question: DepthQuestion) -> Sequence[int]:
        return [
            sum(survival >= self.least for survival in survivals[:most])
            for survivals, most in zip(question.survivals(), question.max_depths, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class AdaptiveDepth:
    """The depths with the most expected tokens per step time, over all that are possible.

    Values sorted, the best b of them are a prefix of each block, so only b is to be found. Within the rows that a step is
    padded to more tokens cost nothing: only the fullest step of each padding is looked at.
    """

    name: str

    def draft_budget(self, session_count: int) -> int:
        return MAX_DEPTH

    def depths(self, question: DepthQuestion) -> Sequence[int]:
        values = question.values()
        ranked = sorted([value for block in values for value in block], reverse=True)
        count = best_count(ranked[: question.row_limit], question)
        return admit(values, ranked, count)


@dataclass(frozen=True, slots=True)
class StopEarly:
    """Algorithm 1 of the paper: tokens are admitted in order of value until one makes the step worth less per time."""

    name: str

    def draft_budget(self, session_count: int) -> int:
        return MAX_DEPTH

    def depths(self, question: DepthQuestion) -> Sequence[int]:
        values = question.values()
        ranked = sorted([value for block in values for value in block], reverse=True)
        worth = float(question.session_count)
        best = worth / self._step_us(question, 0)
        count = 0
        for value in ranked[: question.row_limit]:
            worth += value
            pace = worth / self._step_us(question, count + 1)
            if pace < best:
                break
            best, count = pace, count + 1
        return admit(values, ranked, count)

    @staticmethod
    def _step_us(question: DepthQuestion, drafts: int) -> float:
        return question.curve.step_us(question.shape(question.fixed_row_count + drafts))


def best_count(ranked: Sequence[float], question: DepthQuestion) -> int:
    """How many of the values, best first, make the step worth most per time.

    ranked  [values] descending, at most as many as there are rows for
    """
    fixed, multiple = question.fixed_row_count, question.curve.row_multiple
    most = len(ranked)
    free = -fixed % multiple if fixed else multiple  # rows that are paid for in any case
    if most <= free:
        return most
    worths = list(accumulate(ranked, initial=float(question.session_count)))
    idle_us = question.idle_us
    # counts[t]: all that fit into tier t. The first holds what is free, the last all there are.
    counts: list[int] = [*range(free, most, multiple), most]
    tiers_us = question.curve.tiers_us(fixed + free, fixed + most, question.shape(0))
    paces = [worths[count] / (us + idle_us) for count, us in zip(counts, tiers_us, strict=True)]
    best: int = counts[paces.index(max(paces))]
    return best


def admit(values: Sequence[Sequence[float]], ranked: Sequence[float], count: int) -> list[int]:
    """The depths that hold the `count` best values; among equals the shallower, then the earlier block first.

    ranked  all values, descending
    """
    if count <= 0:
        return [0] * len(values)
    least = ranked[count - 1]
    # `ranked` descends and bisect wants ascending order: compare negatives.
    spare = count - bisect_left(
        ranked, -least, key=operator.neg
    )  # values equal to the least that are admitted
    ties = bisect_right(ranked, -least, key=operator.neg) - (count - spare)
    if spare == ties:
        return [_reach(block, least) for block in values]
    depths = [_above(block, least) for block in values]
    tied = [
        (depth, index)
        for index, block in enumerate(values)
        for depth in range(depths[index], _reach(block, least))
    ]
    for _, index in sorted(tied)[:spare]:
        depths[index] += 1
    return depths


def _reach(block: Sequence[float], least: float) -> int:
    """How many values of a descending block are at least `least`."""
    if not block or block[-1] >= least:
        return len(block)
    depth = 0
    while block[depth] >= least:
        depth += 1
    return depth


def _above(block: Sequence[float], least: float) -> int:
    """How many values of a descending block are above `least`."""
    depth = 0
    for value in block:
        if value <= least:
            break
        depth += 1
    return depth


def typical_budget(
    curve: StepCurve, session_count: int, confidences: tuple[float, ...], row_limit: int
) -> int:
    """How long blocks should be: a little longer than what would be checked of a typical one, if all sessions sent it.

    0 if nothing of it would be checked beyond the rows that are free. confidences: of the typical block
    """
    if session_count < 1:
        return MAX_DEPTH
    question = DepthQuestion(
        [confidences] * session_count,
        [len(confidences)] * session_count,
        session_count,
        session_count,
        row_limit,
        key_block_count=session_count,
        curve=curve,
    )
    depths = AdaptiveDepth("adaptive").depths(question)
    if sum(depths) <= -session_count % curve.row_multiple and session_count > curve.row_multiple:
        return 0
    return min(MAX_DEPTH, max(depths) + _BUDGET_MARGIN)


def parse_depth_policy(text: str) -> DepthPolicy:
    """`off`, `auto`, `adaptive`, `fixed:K` with K from 0 to 15, `threshold:T` with T from 0 to 1, or `algorithm1`.

    Raises ValueError that says what is possible.
    """
    kind, _, argument = text.partition(":")
    if text == "off":
        return FixedDepth(text, 0)
    if text == "auto":
        return FixedDepth(text, AUTO_DEPTH)
    if text == "adaptive":
        return AdaptiveDepth(text)
    if text == "algorithm1":
        return StopEarly(text)
    if kind == "fixed" and argument.isascii() and argument.isdigit() and int(argument) <= MAX_DEPTH:
        return FixedDepth(text, int(argument))
    if kind == "threshold" and argument.isascii() and argument.replace(".", "", 1).isdigit():
        least = float(argument)
        if least <= 1.0:
            return ThresholdDepth(text, least)
    raise ValueError(
        f"depth_policy: is {text!r}; choose off, auto, adaptive, algorithm1, threshold:T with T from 0 to 1, "
        f"or fixed:K with K from 0 to {MAX_DEPTH}"
    )


def level(depths: list[int], row_limit: int) -> list[int]:
    """The depths, the deepest lowered first until they sum to at most `row_limit`; among equals the later ones."""
    excess = sum(depths) - row_limit
    if excess <= 0:
        return depths
    leveled = list(depths)
    for depth in range(max(leveled), 0, -1):
        for index in range(len(leveled) - 1, -1, -1):
            if leveled[index] == depth:
                leveled[index] -= 1
                excess -= 1
                if excess == 0:
                    return leveled
    return leveled
