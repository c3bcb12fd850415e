"""A new session that begins with the tokens of another, on the verifier that has their state."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from gateway.servicer.desk import FrontDesk
from gateway.sessions import Session
from gateway.validation import check_id, invalid
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb

log = structlog.get_logger(__name__)

# No error: turns meet it too, and send everything again.
FORGOTTEN = (Reason.SESSION_NOT_FOUND, Reason.PREFIX_MISMATCH)
FORK_TIMEOUT_S = 30.0  # a verifier answers between two steps, and one that reads a long prompt takes a while


async def fork_session(
    desk: FrontDesk, request: gateway_pb.ForkSessionRequest, time_left_s: float | None
) -> Session:
    """The new session. Raises Refusal, and then nothing is left of it anywhere.

    The source may have a turn under way: what it has committed so far can be taken over.
    """
    source = desk.sessions.get(check_id("session_id", request.session_id))
    known = len(source.tokens)
    if not 0 <= request.token_count <= known:
        raise invalid("token_count", f"is {request.token_count}; send 1 to {known}, or 0 for all {known}")
    if desk.draining:
        raise Refusal(Reason.DRAINING, "The gateway is leaving and opens no more sessions. Try again.")
    tokens = source.tokens[: request.token_count or known]
    fork = desk.open_session(source.model, idle_limit_us=source.idle_limit_us)
    if source.binding is None or not tokens:
        return fork  # nothing was computed, or it is gone: the fork's first turn sends everything, as the source's would
    fork.binding = source.binding
    timeout_s = FORK_TIMEOUT_S if time_left_s is None else min(time_left_s, FORK_TIMEOUT_S)
    try:
        if await _take_over(desk, source, fork, tokens, timeout_s):
            fork.tokens[:] = tokens
        desk.sessions.get(fork.session_id)  # it may have been ended meanwhile
    except BaseException:
        desk.sessions.remove(fork.session_id)
        desk.release(fork)
        raise
    return fork


async def _take_over(
    desk: FrontDesk, source: Session, fork: Session, tokens: Sequence[int], timeout_s: float
) -> bool:
    """Opens the fork at the verifier. False if that one does not have these tokens any more."""
    assert fork.binding is not None
    worker = desk.pool.worker(fork.binding.address)
    try:
        await worker.fork_session(source.session_id, fork.session_id, tokens, timeout_s)
    except Refusal as refusal:
        if refusal.reason not in FORGOTTEN:
            raise
        log.info("forked without state", session_id=source.session_id, reason=refusal.reason.name)
        return False
    return True
