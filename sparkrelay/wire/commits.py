"""CommitBatch: the commits of a turn, columns on the wire, one entry a commit here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, count, pairwise, repeat
from typing import Any, NamedTuple

from sparkrelay.v1 import generation_pb2
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.wire.values import invalid


class Commit(NamedTuple):
    """Tokens start .. start + len(token_ids) - 1 of a session, final.

    logprobs  one a token, or none
    report    of the round; None for the token that ended the reading of the prompt
    """

    start: int
    token_ids: Sequence[int]
    logprobs: Sequence[generation_pb2.TokenLogprob]
    report: generation_pb2.RoundReport | None


def commits(pb: pb2.CommitBatch) -> list[Commit]:
    """Oldest first. Raises Refusal(INVALID_FIELD) for columns that do not fit each other."""
    token_counts, token_ids, logprobs = list(pb.token_counts), list(pb.token_ids), list(pb.logprobs)
    if sum(token_counts) != len(token_ids) or (token_counts and min(token_counts) < 1):
        message = f"are of {sum(token_counts)} tokens, at least 1 each; {len(token_ids)} ids follow"
        raise invalid("committed.token_counts", message)
    if logprobs and len(logprobs) != len(token_ids):
        raise invalid("committed.logprobs", f"has {len(logprobs)} entries for {len(token_ids)} tokens")
    offsets = list(accumulate(token_counts, initial=0))
    plain_count = 1 if pb.opens else 0
    starts = [pb.start + offset for offset in offsets]
    reports: Iterator[generation_pb2.RoundReport | None] = iter(_reports(pb.rounds, starts[plain_count:-1]))
    return [
        Commit(
            start, token_ids[first:last], logprobs[first:last], None if index < plain_count else next(reports)
        )
        for index, (start, first, last) in enumerate(zip(starts, offsets, offsets[1:], strict=False))
    ]


# Columns with an entry a round, in the order of their fields and of RoundReport's.
_COLUMNS = (
    "drafted_counts", "depths", "accepted_counts", "block_states", "wait_us", "verify_us", "draft_us", "queue_us",
    "batch_row_counts", "batch_session_counts", "dropped_block_counts",
)  # fmt: skip


def _reports(pb: pb2.RoundColumns, base_lens: Sequence[int]) -> list[generation_pb2.RoundReport]:
    """The reports of rounds that began at these lengths."""
    columns: list[Sequence[Any]] = [list(getattr(pb, name)) for name in _COLUMNS]
    for name, column in zip(_COLUMNS, columns, strict=True):
        if len(column) != len(base_lens):
            raise invalid(
                f"committed.rounds.{name}", f"has {len(column)} entries for {len(base_lens)} rounds"
            )
    drafted_counts, confidences = columns[0], pb.confidences
    if sum(drafted_counts) != len(confidences) or min(drafted_counts, default=0) < 0:
        message = f"has {len(confidences)} bytes; {sum(drafted_counts)} tokens were at hand"
        raise invalid("committed.rounds.confidences", message)
    ends = list(accumulate(drafted_counts, initial=0))
    parts = [confidences[first:last] for first, last in pairwise(ends)]
    drafter_ids = list(pb.drafter_ids)
    if len(drafter_ids) not in (1 if base_lens else 0, len(base_lens)):
        message = (
            f"has {len(drafter_ids)} entries for {len(base_lens)} rounds; one for all or one each is needed"
        )
        raise invalid("committed.rounds.drafter_ids", message)
    names = drafter_ids if len(drafter_ids) == len(base_lens) else repeat(drafter_ids[0], len(base_lens))
    rows = zip(count(pb.first_index), base_lens, parts, names, *columns, strict=False)
    return [_report(*row) for row in rows]


def _report(
    index: int,
    base_len: int,
    confidences: bytes,
    drafter_id: str,
    drafted_count: int,
    depth: int,
    accepted_count: int,
    block_state: generation_pb2.RoundReport.BlockState.ValueType,
    wait_us: int,
    verify_us: int,
    draft_us: int,
    queue_us: int,
    batch_row_count: int,
    batch_session_count: int,
    dropped_block_count: int,
) -> generation_pb2.RoundReport:
    return generation_pb2.RoundReport(
        index=index,
        base_len=base_len,
        drafted_count=drafted_count,
        depth=depth,
        accepted_count=accepted_count,
        block_state=block_state,
        confidences=confidences,
        wait_us=wait_us,
        verify_us=verify_us,
        draft_us=draft_us,
        queue_us=queue_us,
        batch_row_count=batch_row_count,
        batch_session_count=batch_session_count,
        dropped_block_count=dropped_block_count,
        drafter_id=drafter_id,
    )
