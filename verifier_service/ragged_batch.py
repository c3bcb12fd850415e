"""One flat batch of rows from many sequences: what one forward pass of the target computes.

Rows of one sequence are neighbours and in order of position. There is no padding here: a model that needs row counts of a
certain multiple (exact mode) pads for itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntRow = npt.NDArray[np.int64]


@dataclass(slots=True)
class Segment:
    """The rows of one sequence: positions start .. start + row_count - 1, of which the last `logit_count` give logits.

    Never changed once made; not frozen only because that triples the cost of making it, once a sequence and step.

    sequence_id   whose memory the rows extend; the memory's length is `start` before the forward, start + row_count after
    token_ids     the ids at those positions, as many as there are rows
    logit_count   how many of the LAST rows need logits (0 while a prompt is still being read)
    """

    sequence_id: int
    start: int
    token_ids: Sequence[int]
    logit_count: int

    @property
    def row_count(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Shapes: T = all rows, S = sequences, K = rows whose logits are wanted.

    token_ids      [T] the id of each row
    positions      [T] its position in its sequence
    row_starts     [S + 1] rows of segment i are row_starts[i] .. row_starts[i + 1] - 1
    logit_rows     [K] rows whose logits come back, ascending
    logit_starts   [S + 1] results of segment i are logit_starts[i] .. logit_starts[i + 1] - 1
    """

    segments: tuple[Segment, ...]
    token_ids: IntRow
    positions: IntRow
    row_starts: IntRow
    logit_rows: IntRow
    logit_starts: IntRow

    @staticmethod
    def of(segments: Iterable[Segment]) -> RaggedBatch:
        parts = tuple(segments)
        counts = np.array([len(part.token_ids) for part in parts], dtype=np.int64)
        kept = np.array([part.logit_count for part in parts], dtype=np.int64)
        starts = np.array([part.start for part in parts], dtype=np.int64)
        row_starts, logit_starts = _starts(counts), _starts(kept)
        row_count, logit_count = int(row_starts[-1]), int(logit_starts[-1])
        ids = itertools.chain.from_iterable(part.token_ids for part in parts)
        token_ids = np.fromiter(ids, dtype=np.int64, count=row_count)
        # Row r of segment i is row r - row_starts[i] of it; its logits are the last `kept` rows before row_starts[i + 1].
        positions = np.arange(row_count, dtype=np.int64) + np.repeat(starts - row_starts[:-1], counts)
        logit_rows = np.arange(logit_count, dtype=np.int64) + np.repeat(
            row_starts[1:] - logit_starts[1:], kept
        )
        return RaggedBatch(parts, token_ids, positions, row_starts, logit_rows, logit_starts)

    @property
    def row_count(self) -> int:
        return len(self.token_ids)


def _starts(counts: IntRow) -> IntRow:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
