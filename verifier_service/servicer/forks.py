"""ForkSession: the request in, the engine's answer out; and the callers that wait for one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from sparkrelay.outcomes import FieldViolation, Reason, Refusal
from sparkrelay.v1 import verifier_service_pb2 as pb2
from verifier_service.events import Command, EndSession, ForkEvent, ForkRefused, ForkSession, SessionForked
from verifier_service.servicer.validation import check_id, check_prefix_hash, invalid


def fork_command(request: pb2.VerifierServiceForkSessionRequest) -> ForkSession:
    """Checks what needs no session. Raises Refusal(INVALID_FIELD) naming the field."""
    check_id("session_id", request.session_id)
    check_id("fork_session_id", request.fork_session_id)
    if request.token_count < 1:
        raise invalid("token_count", f"is {request.token_count}; send 1 or more")
    check_prefix_hash("token_hash", request.token_hash)
    return ForkSession(request.session_id, request.fork_session_id, request.token_count, request.token_hash)


class PendingForks:
    """Forks that the engine has not answered yet, by the id of the new session. Lives on the event loop.

    post  hands commands to the engine
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, post: Callable[[Sequence[Command]], object]) -> None:
        self._loop = loop
        self._post = post
        self._callers: dict[str, asyncio.Future[SessionForked]] = {}

    async def ask(self, command: ForkSession) -> SessionForked:
        """Forks. Raises Refusal. A caller that leaves early leaves no session behind."""
        if command.new_session_id in self._callers:
            raise _refusal(
                Reason.SESSION_EXISTS, "fork_session_id", "is being opened already; choose another"
            )
        caller: asyncio.Future[SessionForked] = self._loop.create_future()
        self._callers[command.new_session_id] = caller
        self._post((command,))
        return await caller

    def answer(self, event: ForkEvent) -> None:
        """What the engine says to one of them."""
        caller = self._callers.pop(event.new_session_id)
        if isinstance(event, SessionForked):
            if caller.done():  # it left, or was told that this verifier goes
                self._post((EndSession(event.new_session_id),))
            else:
                caller.set_result(event)
        elif not caller.done():
            caller.set_exception(_refusal_of(event))

    def fail(self, refusal: Refusal) -> None:
        """Tells all of them the same."""
        for caller in self._callers.values():
            if not caller.done():
                caller.set_exception(Refusal(refusal.reason, refusal.message))


def _refusal_of(event: ForkRefused) -> Refusal:
    return _refusal(event.reason, event.field, event.message, event.retry_after_ms)


def _refusal(reason: Reason, field: str, message: str, retry_after_ms: int = 0) -> Refusal:
    if not field:
        return Refusal(reason, message, retry_after_ms=retry_after_ms)
    violations = (FieldViolation(field, message),)
    return Refusal(reason, f"{field}: {message}", violations=violations, retry_after_ms=retry_after_ms)
