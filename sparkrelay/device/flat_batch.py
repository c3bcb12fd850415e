"""One forward pass of many sequences as one flat ragged batch: rows of all of them, one after the other, no padding between."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparkrelay.device.slab import SlabState


@dataclass(frozen=True, slots=True)
class FlatEntry:
    """One sequence's rows: positions start ... start + row_count - 1, of which those before `start` are valid in `state`.

    The forward writes the rows' keys and values and sets `state.length` to `end`; `start` below `state.length` rewinds.
    """

    state: SlabState
    start: int
    row_count: int

    @property
    def end(self) -> int:
        return self.start + self.row_count


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """The rows of one forward.

    token_ids  int64 [T], the entries' rows one after the other
    entries    one per sequence, each sequence at most once
    kept_rows  int64 [K], flat indices of the rows whose logits are wanted; may be empty
    """

    token_ids: NDArray[np.int64]
    entries: tuple[FlatEntry, ...]
    kept_rows: NDArray[np.int64]

    def __post_init__(self) -> None:
        """A batch that breaks these is the engine's bug, not a user's: AssertionError."""
        row_count = sum(entry.row_count for entry in self.entries)
        assert self.entries, "a forward needs at least one sequence"
        assert self.token_ids.shape == (row_count,), f"{self.token_ids.shape} ids for {row_count} rows"
        assert all(entry.row_count > 0 for entry in self.entries), "every sequence needs at least one row"
        assert all(0 <= entry.start <= entry.state.length for entry in self.entries), (
            "rows must follow valid positions"
        )
        assert len({id(entry.state) for entry in self.entries}) == len(self.entries), (
            "a sequence is in the batch twice"
        )
        assert self.kept_rows.ndim == 1 and (
            not len(self.kept_rows) or (self.kept_rows.min() >= 0 and self.kept_rows.max() < row_count)
        ), "kept_rows must name rows of the batch"

    def positions(self) -> NDArray[np.int64]:
        """int64 [T]: the position of each row in its own sequence."""
        return np.concatenate([np.arange(entry.start, entry.end, dtype=np.int64) for entry in self.entries])
