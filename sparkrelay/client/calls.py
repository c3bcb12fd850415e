"""What the blocking and the asyncio client do alike with a turn: end it for certain, put its events together, take it up again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import grpc

from sparkrelay.client import results, translate
from sparkrelay.client.errors import InternalError, SparkRelayError, Unavailable, error_of
from sparkrelay.client.requests import resume_request
from sparkrelay.client.retries import RetryPolicy
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
            call.cancel()
            if self._after is not None and not over:
                self._after()

    def __del__(self) -> None:
        self.release()


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

    resume  False: a broken stream is an error
    """

    def __init__(
        self,
        request: gateway_pb.GenerateRequest,
        policy: RetryPolicy,
        address: str,
        *,
        resume: bool,
    ) -> None:
        self.transcript = TurnTranscript(request.resume.next_index)
        self.request = request
        self._policy = policy
        self._address = address
        self._resume = resume
        self._attempt = 0
        self._first_failure: grpc.RpcError | None = None  # since anything came

    def add(self, event: gateway_pb.GenerateResponse) -> results.Delta | None:
        """Takes in one event."""
        delta = self.transcript.add(event)
        self._first_failure = None
        if delta is not None:
            self._attempt = 0
        return delta

    def pause_s(self, failure: grpc.RpcError) -> float | None:
        """Seconds to wait before the stream is resumed; None: the failure is final."""
        self._first_failure = self._first_failure or failure
        started = self.transcript.started
        if not self._resume or started is None:
            return None
        pause_s = self._policy.resume_pause_s(failure, self._attempt)
        self._attempt += 1
        self.request = resume_request(started.turn_id, self.transcript.next_index)
        return pause_s

    def error_of(self, failure: grpc.RpcError) -> SparkRelayError:
        """The error of the turn: what broke its stream, and what came of the attempts to resume it."""
        error, started = error_of(failure, self._address), self.transcript.started
        if started is None:
            return error
        if self._first_failure not in (None, failure):
            broken = self._first_failure.details() if callable(getattr(self._first_failure, "details", None)) else ""
            error = Unavailable(
                f"The connection to the gateway was lost during the turn ({broken}), and the turn could not be resumed: "
                f"{error.message}",
                reason="RESUME_LOST",
            )
        error.turn_id, error.trace_id = started.turn_id, error.trace_id or started.trace_id
        return error
