"""The verdicts of a step in frames: one where nothing is large, several where rows are, and never one verdict in two."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.frames import Verdict
from verifier_service.servicer.verdict_frames import verdict_frames


def verdict(handle: int, row_count: int) -> Verdict:
    rows = np.zeros((row_count, 8), np.uint16) if row_count else None
    return Verdict(handle, 0, 5, 5, 15, max(row_count - 1, 0), 7, 3, rows)


@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.integers(1, 600))
def test_rows_are_within_the_limit_unless_one_verdict_has_more(counts: list[int], limit: int) -> None:
    verdicts = [verdict(handle, count) for handle, count in enumerate(counts)]
    frames = list(verdict_frames(verdicts, limit))
    assert [entry.handle for frame in frames for entry in frame.entries] == list(range(len(counts)))
    for frame in frames:
        assert len(frame.entries) == 1 or sum(entry.rows.nbytes for entry in frame.entries) <= limit
    if sum(counts) * 16 <= limit:
        assert len(frames) == 1


def test_verdicts_without_rows_travel_together() -> None:
    (frame,) = verdict_frames([verdict(handle, 0) for handle in range(500)], 1)
    assert len(frame.entries) == 500
