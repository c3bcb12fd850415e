"""How deep each session's block is checked: one question a step, about all its sessions together.

A policy sees every block of the step at once, because depth is shared out: a row given to one session makes the step longer
for all. `off`, `fixed:K` and `auto` look at little of it; a policy that maximises expected tokens per step time
(DESIGN 7) needs all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_DEPTH = 15
AUTO_DEPTH = 4


@dataclass(frozen=True, slots=True)
class DepthQuestion:
    """The blocks of one step, as columns: entry i of each is one block.

    confidences     P(token k matches given that all before it match), as the drafter said: outside of 0..1 or NaN if it lies
    max_depths      the most tokens that may be checked: block, rest of the turn and room; at least 1
    fixed_row_count all rows of the step that are not up for decision: anchors, fixed depths, prompts being read
    session_count   sessions in the step that commit a token whatever the depths
    row_limit       the most draft tokens the step has budget for, all blocks together
    """

    confidences: Sequence[tuple[float, ...]]
    max_depths: Sequence[int]
    fixed_row_count: int
    session_count: int
    row_limit: int

    def survivals(self) -> list[tuple[float, ...]]:
        """For each block, P(token k and all before it match): within 0..1 and never increasing, whatever was sent."""
        return [survivals_of(confidences) for confidences in self.confidences]


def survivals_of(confidences: Sequence[float]) -> tuple[float, ...]:
    """The running product. A confidence outside 0..1 is clamped, NaN is 0: hostile values cannot make survivals grow."""
    survival = 1.0
    survivals = []
    for confidence in confidences:
        survival *= min(confidence, 1.0) if confidence > 0.0 else 0.0  # NaN > 0 is False
        survivals.append(survival)
    return tuple(survivals)


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


def parse_depth_policy(text: str) -> DepthPolicy:
    """`off`, `fixed:K` with K from 0 to 15, or `auto`. Raises ValueError that says what is possible."""
    kind, _, argument = text.partition(":")
    if text == "off":
        return FixedDepth(text, 0)
    if text == "auto":
        return FixedDepth(text, AUTO_DEPTH)
    if kind == "fixed" and argument.isascii() and argument.isdigit() and int(argument) <= MAX_DEPTH:
        return FixedDepth(text, int(argument))
    raise ValueError(f"depth_policy: is {text!r}; choose off, auto, or fixed:K with K from 0 to {MAX_DEPTH}")


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
