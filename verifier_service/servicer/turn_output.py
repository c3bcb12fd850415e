"""What a turn has to tell its caller: events of the engine in, response messages out, sent no more often than is of use."""

from __future__ import annotations

import asyncio

from sparkrelay.outcomes import Refusal
from sparkrelay.v1 import generation_pb2
from sparkrelay.v1 import verifier_service_pb2 as pb2
from verifier_service.events import Committed, TurnEvent, TurnOver, TurnRefused

PACE_S = 0.0004  # with n turns under way each sends commits at most every n * PACE_S


class TurnOutput:
    """One turn's events on their way to its stream. Lives on the event loop.

    The first event, the first tokens and the end wake the stream at once; other commits wait until the pace allows, and
    then travel together. A caller that does not read cannot make this grow without bound: max_tokens bounds the turn.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, trace_id: str, trace: bytes = b"") -> None:
        self.trace_id = trace_id
        self.trace = trace
        self.over = False
        self._loop = loop
        self._events: list[TurnEvent] = []
        self._failure: Refusal | None = None
        self._ready = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._urgent = True
        self._due_s = 0.0

    def add(self, event: TurnEvent, turn_count: int) -> None:
        """turn_count: turns under way, for the pace."""
        self._events.append(event)
        if type(event) is not Committed:
            self.over = self.over or type(event) in (TurnOver, TurnRefused)
            self._ready.set()
        elif self._urgent:
            self._urgent = False
            self._due_s = self._loop.time() + PACE_S * turn_count
            self._ready.set()
        elif self._timer is None:
            now_s = self._loop.time()
            due_s = max(now_s, self._due_s)
            self._due_s = due_s + PACE_S * turn_count
            if due_s <= now_s:
                self._ready.set()
            else:
                self._timer = self._loop.call_at(due_s, self._wake)

    def fail(self, refusal: Refusal) -> None:
        """The turn ends here, whatever the engine still says."""
        self._failure = refusal
        self.over = True
        self._ready.set()

    @property
    def told_all(self) -> bool:
        """True once the turn is over and its last event was taken: more may come while a response is being written."""
        return self.over and not self._events and self._failure is None

    async def take(self) -> list[TurnEvent]:
        """The next events, at least one. Raises the Refusal of `fail`."""
        await self._ready.wait()
        self._ready.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._failure is not None:
            raise self._failure
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wake(self) -> None:
        self._timer = None
        self._ready.set()


def finished_pb(event: TurnOver) -> pb2.VerifierTurnFinished:
    return pb2.VerifierTurnFinished(
        finish_reason=generation_pb2.FinishReason.ValueType(event.finish_reason),
        usage=generation_pb2.Usage(
            prompt_token_count=event.prompt_token_count,
            cached_token_count=event.cached_token_count,
            output_token_count=event.output_token_count,
        ),
        session_token_count=event.session_token_count,
    )
