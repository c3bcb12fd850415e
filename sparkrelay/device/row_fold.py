"""How one sequence's query rows are laid out for grouped-query attention: heads that share a key head become rows.

The folded rows of a key head are its group's heads one after the other, each with its positions in order, and then copies of the
last row up to the number that exact mode wants. No key or value is repeated, and a decoding row of three heads costs four rows,
not twelve.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sparkrelay.device.slab_layout import round_up

COMMON_ROWS: Final = 16
"""Rows beyond a single multiple come in these units: products run sixteen wide anyway, and equal counts share a call."""


def folded_rows(group: int, row_count: int, row_multiple: int) -> int:
    """How many folded rows `row_count` positions of `group` heads are given; a multiple of row_multiple."""
    rows = round_up(group * row_count, row_multiple)
    return (
        rows if rows <= row_multiple or row_multiple == 1 else round_up(rows, max(COMMON_ROWS, row_multiple))
    )


@dataclass(frozen=True, slots=True)
class Fold:
    """The layout of `row_count` positions in `rows` folded rows for each of the key heads."""

    query_heads: int
    kv_heads: int
    row_count: int
    rows: int

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query_heads // self.kv_heads

    def _folded(self) -> NDArray[np.int64]:
        return np.minimum(np.arange(self.rows), self.group * self.row_count - 1)

    def members(self) -> NDArray[np.int64]:
        """int64 [rows]: which head of the group a folded row belongs to."""
        return self._folded() // self.row_count

    def offsets(self) -> NDArray[np.int64]:
        """int64 [rows]: how far behind the first position a folded row is."""
        return self._folded() % self.row_count

    def gather(self) -> NDArray[np.int64]:
        """int64 [kv_heads * rows]: the folded rows' places among flat [row_count, query_heads]."""
        heads = np.arange(self.kv_heads)[:, None] * self.group + self.members()[None, :]
        return (self.offsets()[None, :] * self.query_heads + heads).reshape(-1)

    def scatter(self) -> NDArray[np.int64]:
        """int64 [row_count, query_heads]: each row's place among flat [kv_heads, rows]; padding is nobody's."""
        heads = np.arange(self.query_heads)
        folded = (heads % self.group)[None, :] * self.row_count + np.arange(self.row_count)[:, None]
        return (heads // self.group)[None, :] * self.rows + folded


@dataclass(frozen=True, slots=True)
class FoldMaps:
    """A fold's arrays, made once; see `Fold`."""

    members: NDArray[np.int64]
    offsets: NDArray[np.int64]
    gather: NDArray[np.int64]
    scatter: NDArray[np.int64]


@lru_cache(maxsize=1024)
def fold_maps(fold: Fold) -> FoldMaps:
    """The arrays of a fold; nobody writes into them."""
    return FoldMaps(fold.members(), fold.offsets(), fold.gather(), fold.scatter())
