"""From a row of logits to a token: filters, then coupled noise or greedy.

The verifier and a drafter that copies its sampling run these very lines: the target's token is what they give
on the target's logits, and a draft token matches it wherever they give the same on the draft model's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import numpy as np

from sparkrelay import noise
from sparkrelay.device.filters import BoolRow, Support, filter_row, needs_counts
from sparkrelay.device.token_counts import TokenCounts
from sparkrelay.noise import FloatRow
from sparkrelay.sampling import Sampling


def choose_token(
    row: FloatRow,
    sampling: Sampling,
    counts: TokenCounts | None,
    stop_ids: Collection[int],
    position: int,
    produced_count: int,
    mask: BoolRow | None = None,
) -> int:
    """The token at `position` (its index in the session's token list), from the logits after the token before it.

    The arguments are those of `filter_row`. Raises noise.NoCandidate where no token is left.
    """
    return _choose_from(filter_row(row, sampling, counts, stop_ids, produced_count, mask), sampling, position)


def _choose_from(support: Support, sampling: Sampling, position: int) -> int:
    if sampling.greedy:
        return noise.greedy(support.logits)  # greedy never narrows the vocabulary, so the index is the id
    inverse_t = noise.inverse_temperature(sampling.temperature)
    return noise.choose(support.logits, inverse_t, sampling.seed, position, support.ids)


def probability_of(token_id: int, support: Support, temperature: float) -> float:
    """P(token) under the softmax of what the filters left, at the temperature (at 1 for greedy): a drafter's confidence."""
    inverse_t = noise.inverse_temperature(temperature or 1.0)
    with np.errstate(over="ignore"):
        weights = np.exp((support.logits - support.logits.max()) * inverse_t)
    index = token_id if support.ids is None else int(np.searchsorted(support.ids, token_id))
    return float(weights[index] / weights.sum())


class TokenMask(Protocol):
    """Which tokens a turn's grammar allows next, given its output so far (`verifier_service.grammar.GrammarState` is one)."""

    def allowed(self) -> BoolRow:
        """[vocab] bool, True where the token may come next; at least one is. Read only. Raises NothingAllowed."""

    def append(self, token_id: int, /) -> None:
        """The output has grown by a token."""

    def truncate(self, count: int, /) -> None:
        """The output is its first `count` tokens again."""


class Chooser:
    """The choice of one turn's tokens, one after another.

    It knows the sequence's length and, where a penalty needs them, its token counts, so that position and
    filters always fit the prefix: `choose` looks at the next position and changes nothing, `append` adds a
    token, `truncate` takes tokens back.

    sampling      of the turn, checked
    stop_ids      what min_tokens masks
    token_ids     the committed sequence, prompt included
    output_start  index at which this turn's output began
    mask          of the turn's grammar, standing behind the output in token_ids; None: every token is allowed
    """

    __slots__ = ("_counts", "_length", "_mask", "_output_start", "_sampling", "_stop_ids")

    def __init__(
        self,
        sampling: Sampling,
        stop_ids: Collection[int],
        token_ids: Sequence[int],
        output_start: int,
        mask: TokenMask | None = None,
    ) -> None:
        if not 0 <= output_start <= len(token_ids):
            raise ValueError(f"output_start: is {output_start}; the sequence has {len(token_ids)} tokens")
        self._sampling = sampling
        self._stop_ids = frozenset(stop_ids)
        self._output_start = output_start
        self._length = len(token_ids)
        self._counts = TokenCounts(token_ids, output_start) if needs_counts(sampling) else None
        self._mask = mask

    @property
    def length(self) -> int:
        """Tokens so far; the position of the token that `choose` chooses."""
        return self._length

    def choose(self, row: FloatRow) -> int:
        """The token at position `length`, from the logits after the last token: [vocab] float32. Raises NoCandidate."""
        return _choose_from(self._support(row), self._sampling, self._length)

    def choose_with_probability(self, row: FloatRow) -> tuple[int, float]:
        """As `choose`, and how probable the token was among what the filters left."""
        support = self._support(row)
        token_id = _choose_from(support, self._sampling, self._length)
        return token_id, probability_of(token_id, support, self._sampling.temperature)

    def _support(self, row: FloatRow) -> Support:
        produced_count = self._length - self._output_start
        allowed = self._mask.allowed() if self._mask is not None else None
        return filter_row(row, self._sampling, self._counts, self._stop_ids, produced_count, allowed)

    def append(self, token_id: int) -> None:
        self._length += 1
        if self._counts is not None:
            self._counts.append(token_id)
        if self._mask is not None:
            self._mask.append(token_id)

    def extend(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self.append(token_id)

    def truncate(self, length: int) -> None:
        """Takes back the tokens from index `length` on, as a drafter does with a block that was rejected."""
        if not self._output_start <= length <= self._length:
            raise ValueError(
                f"length: is {length}; this turn's tokens reach from {self._output_start} to {self._length}"
            )
        self._length = length
        if self._counts is not None:
            self._counts.truncate(length)
        if self._mask is not None:
            self._mask.truncate(length - self._output_start)
