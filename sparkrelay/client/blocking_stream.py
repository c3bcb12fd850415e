"""One turn as it happens, for threads."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Protocol, Self

import grpc

from sparkrelay.client import results
from sparkrelay.client.address import Peer
from sparkrelay.client.calls import CallGuard, Turn, is_over, new_turn_id
from sparkrelay.client.errors import Cancelled
from sparkrelay.client.retries import RetryPolicy
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb


class TurnCalls(Protocol):
    """What a stream needs of its client."""

    peer: Peer
    policy: RetryPolicy

    def open_turn(self, request: gateway_pb.GenerateRequest, timeout: float) -> Any:
        """A Generate call."""
        ...

    def cancel_soon(self, turn_id: str) -> None:
        """Tells the gateway to end a turn, without waiting for its answer."""
        ...


class GenerationStream:
    """One turn as it happens: iterate over its deltas, then read `result`. Leaving it, by any way, cancels what still runs.

    with client.generate_stream("Once upon a time", max_tokens=64) as stream:
        for delta in stream:
            print(delta.text, end="")
    print(stream.result.accepted_length)

    When the connection breaks, the stream waits a little, resumes the turn at the gateway, and goes on: nothing is lost
    or comes twice. Attempts are bounded; then Unavailable is raised.
    """

    def __init__(
        self,
        calls: TurnCalls,
        request: gateway_pb.GenerateRequest,
        *,
        timeout: float,
        on_end: Callable[[results.Generation], None] | None = None,
    ) -> None:
        self._calls = calls
        self._deadline = time.monotonic() + timeout
        self._cancelled = threading.Event()
        self._turn = Turn(request, calls.policy, calls.peer, new_id=new_turn_id, on_end=on_end)
        self._call = calls.open_turn(request, timeout)
        after = functools.partial(calls.cancel_soon, self._turn.turn_id) if self._turn.lingers else None
        self._guard = CallGuard(self._call, after)
        try:
            self._turn.add(self._next_event() or gateway_pb.GenerateResponse())
        except BaseException:
            self._guard.release()
            raise

    @property
    def started(self) -> results.TurnStarted:
        """Turn id, seed, verifier, drafter: known before the first token."""
        assert self._turn.transcript.started is not None, "the first event of a turn is `started`"
        return self._turn.transcript.started

    @property
    def result(self) -> results.Generation:
        """The whole turn; reads the rest of it first if there is any."""
        for _ in self:
            pass
        return self._turn.transcript.whole

    @property
    def next_index(self) -> int:
        """Index, in the turn's output, of the first token that has not come yet: what `Client.resume` takes."""
        return self._turn.transcript.next_index

    def cancel(self) -> None:
        """Ends the turn now; what it has committed stays in the session. Any thread may call it."""
        self._cancelled.set()
        self._guard.release()

    def __iter__(self) -> Iterator[results.Delta]:
        try:
            while not self._turn.is_whole:
                event = self._next_event()
                if event is None:
                    break
                delta = self._turn.add(event)
                if delta is not None:
                    yield delta
            self._turn.tell_end()
        finally:
            self._guard.release(over=self._turn.is_whole)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.release()

    def _next_event(self) -> gateway_pb.GenerateResponse | None:
        """The next event, from this call or from one that resumes it; None after the last."""
        while True:
            try:
                event: gateway_pb.GenerateResponse | None = next(self._call, None)
                return event
            except grpc.RpcError as failure:
                pause_s = self._turn.pause_s(failure) if self._guard.active else None
                if pause_s is None:
                    self._guard.release(over=is_over(failure))
                    raise self._turn.error_of(failure) from failure
            if self._cancelled.wait(min(pause_s, self._time_left_s())):
                message = "The turn was cancelled here."
                raise Cancelled(message, reason="CANCELLED", turn_id=self._turn.turn_id)
            self._call = self._calls.open_turn(self._turn.request, self._time_left_s())
            self._guard.replace(self._call)

    def _time_left_s(self) -> float:
        return max(self._deadline - time.monotonic(), 0.0)
