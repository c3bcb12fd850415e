"""From matches at every position of an answer to rounds: the accepted length that drafting would have had, without drafting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Rounds(NamedTuple):
    """committed_count: tokens of all rounds together."""

    round_count: int
    committed_count: int

    @property
    def accepted_length(self) -> float:
        return self.committed_count / self.round_count if self.round_count else 0.0


def walk(matched: Sequence[int]) -> Rounds:
    """One answer: at each anchor, position by position, how many draft tokens match. A round goes on behind its last token.

    The round that would pass the end counts with the tokens that are left.
    """
    place, rounds = 0, 0
    while place < len(matched):
        place += matched[place] + 1
        rounds += 1
    return Rounds(rounds, len(matched))


def together(parts: Iterable[Rounds]) -> Rounds:
    """Several answers as one."""
    counted = list(parts)
    return Rounds(sum(part.round_count for part in counted), sum(part.committed_count for part in counted))


def match_rates(matched: Iterable[int], slot_count: int) -> list[float]:
    """P(slot k matches given that all before it match), by slot; the mean over all anchors."""
    counts = [0] * (slot_count + 1)
    for value in matched:
        counts[value] += 1
    reached = [sum(counts[k:]) for k in range(slot_count + 1)]
    return [reached[k + 1] / reached[k] if reached[k] else 0.0 for k in range(slot_count)]
