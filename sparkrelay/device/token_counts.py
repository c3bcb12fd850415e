"""How often each token occurred: what the penalties look at.

A block is checked, and drafted, under a prefix that may not last, so the counts can be advanced by
hypothetical tokens and taken back at the cost of those tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from sparkrelay.noise import IdRow

_CountRow = npt.NDArray[np.float32]


class TokenCounts:
    """Counts over a sequence, and over its part from `output_start` on, where this turn's output began.

    token_ids     the sequence so far, prompt and output
    output_start  index of the first output token; may lie at the end of token_ids
    """

    __slots__ = ("_ids", "_output", "_output_start", "_sequence")

    def __init__(self, token_ids: Sequence[int], output_start: int) -> None:
        if not 0 <= output_start <= len(token_ids):
            raise ValueError(f"output_start: is {output_start}; the sequence has {len(token_ids)} tokens")
        self._ids = list(token_ids)
        self._output_start = output_start
        self._sequence = _Tally(self._ids)
        self._output = _Tally(self._ids[output_start:])

    def __len__(self) -> int:
        """Tokens counted; the position of the next one."""
        return len(self._ids)

    @property
    def sequence_ids(self) -> IdRow:
        """The distinct ids of the whole sequence. A view: valid until the next change."""
        return self._sequence.ids

    @property
    def output(self) -> tuple[IdRow, _CountRow]:
        """The distinct ids since output_start, and how often each occurred. Views, as `sequence_ids`."""
        return self._output.ids, self._output.counts

    def append(self, token_id: int) -> None:
        if len(self._ids) >= self._output_start:
            self._output.add(token_id)
        self._sequence.add(token_id)
        self._ids.append(token_id)

    def extend(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self.append(token_id)

    def truncate(self, length: int) -> None:
        """Forgets the tokens from index `length` on."""
        if not 0 <= length <= len(self._ids):
            raise ValueError(f"length: is {length}; the sequence has {len(self._ids)} tokens")
        while len(self._ids) > length:
            token_id = self._ids.pop()
            self._sequence.remove_last(token_id)
            if len(self._ids) >= self._output_start:
                self._output.remove_last(token_id)


class _Tally:
    """Distinct ids in order of their first occurrence, with counts, in arrays that numpy can index with.

    Tokens are taken away from the end of the sequence, so an id whose count falls to zero is always the last
    of the arrays: every id that first occurred later is gone already. Removing is then a pop.
    """

    __slots__ = ("_counts", "_ids", "_size", "_slots")

    def __init__(self, token_ids: Sequence[int]) -> None:
        distinct, first, counts = np.unique(
            np.asarray(token_ids, dtype=np.int64), return_index=True, return_counts=True
        )
        by_first = np.argsort(first)
        self._ids = distinct[by_first]
        self._counts = counts[by_first].astype(np.float32)
        self._size = distinct.size
        self._slots = {token_id: slot for slot, token_id in enumerate(self._ids.tolist())}

    @property
    def ids(self) -> IdRow:
        return self._ids[: self._size]

    @property
    def counts(self) -> _CountRow:
        return self._counts[: self._size]

    def add(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, self._size)
        if slot == self._size:
            self._grow_if_full()
            self._ids[slot] = token_id
            self._counts[slot] = 0.0
            self._size += 1
        self._counts[slot] += 1.0

    def remove_last(self, token_id: int) -> None:
        slot = self._slots[token_id]
        self._counts[slot] -= 1.0
        if self._counts[slot] == 0.0:
            assert slot == self._size - 1, "tokens are removed from the end of the sequence"
            del self._slots[token_id]
            self._size -= 1

    def _grow_if_full(self) -> None:
        if self._size == self._ids.size:
            room = max(64, self._size)
            self._ids = np.concatenate([self._ids, np.zeros(room, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, np.float32)])
