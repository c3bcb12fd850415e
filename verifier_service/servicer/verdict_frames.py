"""The verdicts of one step for one drafter, in frames that gRPC takes: context rows can make them large."""

from __future__ import annotations

from collections.abc import Iterator

from sparkrelay.frames import Verdict, Verdicts

ROW_BYTES_LIMIT = 2**20  # context rows of one frame; a message may have 4 MiB


def verdict_frames(verdicts: list[Verdict], row_bytes_limit: int = ROW_BYTES_LIMIT) -> Iterator[Verdicts]:
    """The verdicts of a step in one frame, or in several of at most so many bytes of rows; one verdict's are never parted."""
    if verdicts[0].rows is None:
        yield Verdicts(tuple(verdicts))
        return
    entries: list[Verdict] = []
    byte_count = 0
    for verdict in verdicts:
        if entries and byte_count + verdict.rows.nbytes > row_bytes_limit:
            yield Verdicts(tuple(entries))
            entries, byte_count = [], 0
        entries.append(verdict)
        byte_count += verdict.rows.nbytes
    yield Verdicts(tuple(entries))
