"""A turn's commits as one message of columns: 256 turns make a hundred thousand commits a second, a message a commit cost half
of the event loop's time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from sparkrelay.frames import duration_us
from sparkrelay.v1 import generation_pb2
from sparkrelay.v1 import verifier_service_pb2 as pb2
from verifier_service.events import Committed, Round, TokenLogprob


def commit_batch(commits: Sequence[Committed]) -> pb2.CommitBatch:
    """commits: at least one, oldest first, without gaps. Only the first can be no round: a turn reads its prompt once."""
    _, starts, token_ids, rounds, logprobs = zip(*commits, strict=True)
    opens = rounds[0] is None
    return pb2.CommitBatch(
        start=starts[0],
        token_counts=[len(ids) for ids in token_ids],
        token_ids=list(chain.from_iterable(token_ids)),
        logprobs=[_logprob_pb(each) for each in chain.from_iterable(logprobs)] if any(logprobs) else None,
        opens=opens,
        rounds=_rounds_pb(rounds[1:] if opens else rounds),
    )


def _rounds_pb(rounds: Sequence[Round]) -> pb2.RoundColumns | None:
    if not rounds:
        return None
    (
        numbers, _, drafted, depths, accepted, states, confidences, wait_us, verify_us, draft_us, queue_us,
        row_counts, session_counts, dropped, drafter_ids,
    ) = zip(*rounds, strict=True)  # fmt: skip
    return pb2.RoundColumns(
        first_index=numbers[0],
        drafted_counts=drafted,
        depths=depths,
        accepted_counts=accepted,
        block_states=states,
        confidences=bytes([int(each * 255 + 0.5) for each in chain.from_iterable(confidences)]),
        wait_us=list(map(duration_us, wait_us)),
        verify_us=list(map(duration_us, verify_us)),
        draft_us=draft_us,
        queue_us=queue_us,
        batch_row_counts=row_counts,
        batch_session_counts=session_counts,
        dropped_block_counts=dropped,
        drafter_ids=drafter_ids[:1] if len(set(drafter_ids)) == 1 else drafter_ids,
    )


def _logprob_pb(value: TokenLogprob) -> generation_pb2.TokenLogprob:
    top = [generation_pb2.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in value.top]
    return generation_pb2.TokenLogprob(token_id=value.token_id, logprob=value.logprob, top=top)
