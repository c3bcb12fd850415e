"""The context rows of one session: what the target thought at each position, as the verifier has projected it.

They come with the ids (feed) and with the verdicts, and are kept as long as the session's ids, so that a model that has dropped
its cache can be given them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint16]
GROWTH = 512


class RowSpan(NamedTuple):
    """Rows of positions start ..., [n, width] bfloat16 as words."""

    start: int
    rows: Words


class ContextRows:
    """See the module. Positions below `length` have rows or never will; `known` tells which."""

    __slots__ = ("_known", "_rows", "length", "width")

    def __init__(self, width: int) -> None:
        """width: elements of a row."""
        self.width = width
        self.length = 0
        self._rows: Words = np.zeros((0, width), np.uint16)
        self._known = np.zeros(0, np.bool_)

    def put(self, start: int, rows: Words) -> None:
        """Rows of positions start ...; what lies between `length` and start has none. Rows that are here already are replaced."""
        end = start + len(rows)
        if end == start:
            return
        self._reserve(end)
        self._known[self.length : start] = False
        self._rows[start:end] = rows
        self._known[start:end] = True
        self.length = max(self.length, end)

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        self.length = min(self.length, length)

    @property
    def known_len(self) -> int:
        """Positions from 0 that have rows, without a gap."""
        known = self._known[: self.length]
        return self.length if known.all() else int(known.argmin())

    @property
    def byte_count(self) -> int:
        """Memory of the rows, room for more included."""
        return self._rows.nbytes

    def spans(self, start: int, end: int) -> Iterator[RowSpan]:
        """The known rows of positions start ... end - 1, in runs without gaps."""
        known = self._known[start : min(end, self.length)]
        edges = np.flatnonzero(np.diff(np.concatenate(([False], known, [False])).astype(np.int8)))
        for first, last in edges.reshape(-1, 2).tolist():
            yield RowSpan(start + first, self._rows[start + first : start + last])

    def _reserve(self, count: int) -> None:
        if count <= len(self._rows):
            return
        capacity = -(-count // GROWTH) * GROWTH
        rows = np.zeros((capacity, self.width), np.uint16)
        rows[: self.length] = self._rows[: self.length]
        known = np.zeros(capacity, np.bool_)
        known[: self.length] = self._known[: self.length]
        self._rows, self._known = rows, known
