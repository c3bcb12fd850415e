"""The context rows of every sequence by position, beside the keys and values that they belong to.

They lie in host memory, from where they go to the wire. Room comes and goes with the sequence's blocks; which positions are
valid is the state's business: rows behind its length are leftovers that nobody asks for.
"""

from __future__ import annotations

import numpy as np

from verifier_service.models import ContextWords

WORD_BYTES = 2


class ContextRowStore:
    """sequence id |-> [capacity, width] bfloat16 words.

    width  elements of a row
    """

    __slots__ = ("_rows", "_width")

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows: dict[int, ContextWords] = {}

    @property
    def bytes_per_token(self) -> int:
        """What one position costs."""
        return self._width * WORD_BYTES

    def open(self, sequence_id: int) -> None:
        """A new sequence, without room."""
        self._rows[sequence_id] = self._room(0)

    def resize(self, sequence_id: int, capacity: int) -> None:
        """Room for exactly so many positions; what is below it is kept."""
        old = self._rows[sequence_id]
        if capacity != len(old):
            new = self._rows[sequence_id] = self._room(capacity)
            kept = min(capacity, len(old))
            new[:kept] = old[:kept]

    def put(self, sequence_id: int, start: int, rows: ContextWords) -> None:
        """Rows [n, width] of positions start ..."""
        self._rows[sequence_id][start : start + len(rows)] = rows

    def copy(self, source_id: int, sequence_id: int, length: int) -> None:
        """The first `length` rows of another sequence."""
        self._rows[sequence_id][:length] = self._rows[source_id][:length]

    def get(self, sequence_id: int, start: int, end: int) -> ContextWords:
        """[end - start, width] a copy: it is read on another thread while this one goes on."""
        return self._rows[sequence_id][start:end].copy()

    def close(self, sequence_id: int) -> None:
        """Gives the memory back."""
        del self._rows[sequence_id]

    def _room(self, capacity: int) -> ContextWords:
        return np.zeros((capacity, self._width), np.uint16)
