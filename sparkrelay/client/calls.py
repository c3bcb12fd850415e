"""What the blocking and the asyncio client do alike with a call: end it for certain, and repeat only what is safe."""

from __future__ import annotations

from typing import Protocol

import grpc

from sparkrelay.client import results, translate
from sparkrelay.client.errors import InternalError, status_of, was_never_sent
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb

# Pauses before each further attempt, in seconds: bounded, and longer than the channel's own first pauses.
RETRY_PAUSES_S = (0.15, 0.3, 0.6)


class Cancellable(Protocol):
    """A gRPC call of either kind."""

    def cancel(self) -> bool: ...


class CallGuard:
    """Cancels its call once, at the latest when it is forgotten: gRPC neither collects nor cancels an abandoned call."""

    def __init__(self, call: Cancellable) -> None:
        self._call: Cancellable | None = call

    @property
    def active(self) -> bool:
        """False once the call was released."""
        return self._call is not None

    def release(self) -> None:
        """Cancels the call if it still runs; ending twice, or ending what is over, is no error."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def __del__(self) -> None:
        self.release()


class TurnTranscript:
    """The events of one turn as they come: the first, every delta, and at the end the whole."""

    def __init__(self) -> None:
        self.started: results.TurnStarted | None = None
        self.generation: results.Generation | None = None
        self._deltas: list[results.Delta] = []

    def add(self, event: gateway_pb.GenerateResponse) -> results.Delta | None:
        """Takes in one event; returns its delta if it is one."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self.started = translate.started(event.started)
        elif kind == "finished" and self.started is not None:
            self.generation = translate.generation(self.started, self._deltas, event.finished)
        elif kind == "delta":
            self._deltas.append(translate.delta(event.delta))
            return self._deltas[-1]
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


def may_repeat(failure: grpc.RpcError, *, is_read: bool) -> bool:
    """Reads may be repeated when the gateway was away; anything else only if it never left this machine."""
    if is_read:
        return status_of(failure) is grpc.StatusCode.UNAVAILABLE
    return was_never_sent(failure)
