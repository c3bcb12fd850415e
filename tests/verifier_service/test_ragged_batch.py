"""The flat batch against a plain loop."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from verifier_service.ragged_batch import RaggedBatch, Segment


@st.composite
def segments(draw: st.DrawFn) -> list[Segment]:
    parts = []
    for sequence_id in range(draw(st.integers(0, 5))):
        ids = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
        parts.append(Segment(sequence_id, draw(st.integers(0, 20)), ids, draw(st.integers(0, len(ids)))))
    return parts


@given(segments())
def test_rows_are_flat_and_in_order(parts: list[Segment]) -> None:
    ids, positions, kept, row_starts, logit_starts = [], [], [], [0], [0]
    for part in parts:
        for row, token_id in enumerate(part.token_ids):
            if row >= part.row_count - part.logit_count:
                kept.append(len(ids))
            ids.append(token_id)
            positions.append(part.start + row)
        row_starts.append(len(ids))
        logit_starts.append(len(kept))
    batch = RaggedBatch.of(parts)
    assert batch.segments == tuple(parts)
    assert batch.row_count == len(ids)
    assert batch.token_ids.tolist() == ids
    assert batch.positions.tolist() == positions
    assert batch.logit_rows.tolist() == kept
    assert batch.row_starts.tolist() == row_starts
    assert batch.logit_starts.tolist() == logit_starts
