"""What both clients do alike with a turn: end it for certain, put its events together, take its stream up again."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable
from typing import Protocol

import grpc

from sparkrelay.client import results, translate
from sparkrelay.client.address import Peer
from sparkrelay.client.errors import (
    InternalError,
    NotFound,
    ResumeLost,
    SparkRelayError,
    Unavailable,
    status_of,
    was_cut,
    was_never_sent,
)
from sparkrelay.client.requests import resume_request
from sparkrelay.client.retries import RetryPolicy
from sparkrelay.errors import refusal_of
from sparkrelay.outcomes import Reason
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb


class Cancellable(Protocol):
    """A gRPC call of either kind."""

    def cancel(self) -> bool: ...


class CallGuard:
    """Cancels its call once, at the latest when it is forgotten: gRPC neither collects nor cancels an abandoned call.

    after  called once too, unless the call was let go as over: it ends what outlives the call
    """

    def __init__(self, call: Cancellable, after: Callable[[], None] | None = None) -> None:
        self._call: Cancellable | None = call
        self._after = after

    @property
    def active(self) -> bool:
        """False once the call was released."""
        return self._call is not None

    def replace(self, call: Cancellable) -> None:
        """Guards another call in place of one that has ended. If it was released meanwhile, the new one is cancelled at once."""
        if self._call is None:
            call.cancel()
        else:
            self._call = call

    def release(self, *, over: bool = False) -> None:
        """Cancels the call if it still runs; ending twice, or ending what is over, is no error."""
        call, self._call = self._call, None
        if call is not None:
            # In this order: whoever reads the call may close the client as soon as it is cancelled.
            if self._after is not None and not over:
                self._after()
            call.cancel()

    def __del__(self) -> None:
        call, after = self._call, self._after
        self.release(over=True)
        if call is not None and after is not None:
            # Not here: a finaliser may run inside gRPC, which holds locks that a new call would wait for.
            with contextlib.suppress(RuntimeError):  # the interpreter is ending
                threading.Thread(target=after, daemon=True).start()


class TurnTranscript:
    """The events of one turn as they come: the first, every delta, and at the end the whole.

    What a resumed stream sends twice is taken once: tokens by their index, text by its own, rounds by theirs.

    next_index  of the first token that is still to come; not 0 for a turn that somebody else has begun to read
    """

    def __init__(self, next_index: int = 0) -> None:
        self.started: results.TurnStarted | None = None
        self.generation: results.Generation | None = None
        self.next_index = next_index
        self._deltas: list[results.Delta] = []
        self._text_index: int | None = 0 if next_index == 0 else None  # None: where the first delta says
        self._next_round = 0

    def add(self, event: gateway_pb.GenerateResponse) -> results.Delta | None:
        """Takes in one event; returns its delta if it brings one."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self.started = self.started or translate.started(event.started)
        elif kind == "finished" and self.started is not None:
            self.generation = translate.generation(self.started, self._deltas, event.finished)
        elif kind == "delta":
            return self._add_delta(event.delta)
        return None

    @property
    def whole(self) -> results.Generation:
        """Raises InternalError if the stream ended without its last event."""
        if self.generation is None:
            turn_id = self.started.turn_id if self.started else ""
            raise InternalError(
                "The answer ended without its last event.", reason="INTERNAL", turn_id=turn_id
            )
        return self.generation

    def _add_delta(self, message: gateway_pb.TurnDelta) -> results.Delta | None:
        text_index = message.text_index if self._text_index is None else self._text_index
        delta = translate.delta(
            message,
            skip_tokens=max(self.next_index - message.index, 0),
            skip_chars=max(text_index - message.text_index, 0),
            next_round=self._next_round,
        )
        self.next_index = max(self.next_index, message.index + len(message.token_ids))
        self._text_index = max(text_index, message.text_index + len(message.text))
        self._next_round = max([self._next_round, *(each.index + 1 for each in delta.rounds)])
        if not (delta.token_ids or delta.text or delta.rounds):
            return None
        self._deltas.append(delta)
        return delta


class Turn:
    """One turn across all its streams: which request comes next, and whether a broken stream is taken up again.

    A turn that lingers has an id of this client's making, so a stream that breaks before its first event is resumed too; if the
    gateway does not know the id, the turn never began, and is asked for again.

    request  the next one to send
    new_id   an id that nobody can guess, for a turn that is new and lingers
    on_end   told once, when the turn is whole
    """

    def __init__(
        self,
        request: gateway_pb.GenerateRequest,
        policy: RetryPolicy,
        peer: Peer,
        *,
        new_id: Callable[[], str],
        on_end: Callable[[results.Generation], None] | None = None,
    ) -> None:
        self.transcript = TurnTranscript(request.resume.next_index)
        self.lingers = request.linger_ms > 0
        self._is_new = request.WhichOneof("input") != "resume"
        if self._is_new and self.lingers:
            request.turn_id = new_id()
        self.request = self._first_request = request
        self.turn_id = (
            request.turn_id or request.resume.turn_id
        )  # of a turn that does not linger: known once it started
        self._policy = policy
        self._peer = peer
        self._on_end = on_end
        self._was_sent = False
        self._attempt = 0
        self._broken: grpc.RpcError | None = None  # what cut the stream, until anything comes again

    @property
    def is_whole(self) -> bool:
        """True once the last event has come."""
        return self.transcript.generation is not None

    def tell_end(self) -> None:
        """The stream was read to its end."""
        on_end, self._on_end = self._on_end, None
        if on_end is not None and self.transcript.generation is not None:
            on_end(self.transcript.generation)

    def add(self, event: gateway_pb.GenerateResponse) -> results.Delta | None:
        """Takes in one event."""
        delta = self.transcript.add(event)
        if self.transcript.started is not None:
            self.turn_id = self.transcript.started.turn_id
        self._policy.budget.succeeded()
        self._broken, self._was_sent = None, True
        if delta is not None:
            self._attempt = 0
        return delta

    def pause_s(self, failure: grpc.RpcError) -> float | None:
        """Seconds to wait before `request` is sent; None: the failure is final."""
        attempt, self._attempt = self._attempt, self._attempt + 1
        if not self._was_sent and was_never_sent(failure):
            return self._policy.repeat_pause_s(failure, attempt, is_read=False)
        self._was_sent = True
        if not self.lingers:
            return None
        if self._is_new and self.transcript.started is None and _is_unknown_turn(failure):
            self.request = self._first_request
            return self._policy.resume_pause_s(failure, attempt, even_if_answered=True)
        self._broken = self._broken or failure
        self.request = resume_request(self.turn_id, self.transcript.next_index)
        return self._policy.resume_pause_s(failure, attempt)

    def error_of(self, failure: grpc.RpcError) -> SparkRelayError:
        """The error of the turn: what broke its stream, and what came of the attempts to resume it."""
        error, broken = self._peer.error_of(failure), self._broken
        in_vain = isinstance(error, Unavailable | NotFound) and not isinstance(error, ResumeLost)
        if broken is not None and broken is not failure and in_vain:
            error = Unavailable(
                "The connection to the gateway was lost during the turn "
                f"({self._peer.error_of(broken).message}), and the turn could not be resumed: {error.message}",
                reason=Reason.RESUME_LOST.name,
            )
        started = self.transcript.started
        if started is not None:
            error.turn_id, error.trace_id = started.turn_id, error.trace_id or started.trace_id
        return error


def new_turn_id() -> str:
    """An id that nobody can guess."""
    return f"turn-{secrets.token_hex(12)}"


def _is_unknown_turn(failure: grpc.RpcError) -> bool:
    return refusal_of(failure).reason is Reason.TURN_NOT_FOUND


def is_over(failure: grpc.RpcError) -> bool:
    """True if the gateway itself said that the turn has ended; otherwise it may go on there."""
    here = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
    return not was_cut(failure) and status_of(failure) not in here
