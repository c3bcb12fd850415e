"""How often a kind of guess was right, learned from what was committed after it: confidences without a trained head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FADE_AT = 512.0
"""Trials after which both counts are halved, so that the rate follows the text of the hour."""
_PRIOR_TRIALS = 4.0


@dataclass(frozen=True, slots=True)
class Label:
    """A block that was proposed: its class (the length of the match), its place, its ids."""

    match_length: int
    base_len: int
    token_ids: Sequence[int]


class HitRates:
    """P(a token matches given that all before it in the block match), by match length 0 .. longest.

    Starts from a guess worth four trials that grows with the match: 0.1 for a guess without any match, 0.8 for the longest.
    """

    def __init__(self, longest: int) -> None:
        guesses = [0.1 + 0.7 * n / max(longest, 1) for n in range(longest + 1)]
        self._hits = [guess * _PRIOR_TRIALS for guess in guesses]
        self._trials = [_PRIOR_TRIALS] * (longest + 1)

    def rate(self, match_length: int) -> float:
        return self._hits[match_length] / self._trials[match_length]

    def confidences(self, match_length: int, count: int) -> list[float]:
        """One a token; a copy gets no worse the longer it lasts, so all are the same."""
        return [self.rate(match_length)] * count

    def learn(self, label: Label, ids: Sequence[int]) -> None:
        """Counts the tokens of a block that were put to the test: those up to the first that is not what was committed."""
        hits, trials = 0, 0
        for drafted, committed in zip(label.token_ids, ids[label.base_len :], strict=False):
            trials += 1
            if drafted != committed:
                break
            hits += 1
        n = label.match_length
        self._hits[n] += hits
        self._trials[n] += trials
        if self._trials[n] > FADE_AT:
            self._hits[n] /= 2
            self._trials[n] /= 2
