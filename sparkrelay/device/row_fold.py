"""How one sequence's query rows are laid out for grouped-query attention: heads that share a key head become rows.

The folded rows of a key head are its group's heads one after the other, each with its positions in order, and then copies of the
last row up to the multiple. No key or value is repeated, and a decoding row of three heads costs four rows, not twelve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparkrelay.device.slab import round_up


@dataclass(frozen=True, slots=True)
class Fold:
    """The layout for `row_count` positions."""

    query_heads: int
    kv_heads: int
    row_count: int
    row_multiple: int

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query_heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Folded rows of a key head, padding included."""
        return round_up(self.group * self.row_count, self.row_multiple)

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
        """int64 [row_count, query_heads]: each row's place among flat [rows, kv_heads]; padding is nobody's."""
        heads = np.arange(self.query_heads)
        folded = (heads % self.group)[None, :] * self.row_count + np.arange(self.row_count)[:, None]
        return folded * self.kv_heads + heads[None, :] // self.group
