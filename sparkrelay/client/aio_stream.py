"""One turn as it happens, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Protocol, Self

import grpc
import grpc.aio

from sparkrelay.client import results
from sparkrelay.client.address import Peer
from sparkrelay.client.calls import CallGuard, Turn, is_over, new_turn_id
from sparkrelay.client.errors import Cancelled
from sparkrelay.client.retries import RetryPolicy
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb


class AsyncTurnCalls(Protocol):
    """What a stream needs of its client."""

    peer: Peer
    policy: RetryPolicy

    def open_turn(self, request: gateway_pb.GenerateRequest, timeout: float) -> Any:
        """A Generate call."""
        ...

    def cancel_soon(self, turn_id: str) -> None:
        """Tells the gateway to end a turn, without waiting for its answer. Any thread may call it."""
        ...


class AsyncGenerationStream:
    """One turn as it happens. `async with` it, or iterate over it; leaving it, by any way, cancels what still runs.

    async with client.generate_stream("Once upon a time", max_tokens=64) as stream:
        async for delta in stream:
            print(delta.text, end="")
        print((await stream.result()).accepted_length)

    When the connection breaks, the stream waits a little, resumes the turn at the gateway, and goes on: nothing is lost
    or comes twice. Attempts are bounded; then Unavailable is raised.
    """

    def __init__(
        self,
        calls: AsyncTurnCalls,
        request: gateway_pb.GenerateRequest,
        *,
        timeout: float,
        on_end: Callable[[results.Generation], None] | None = None,
    ) -> None:
        self._calls = calls
        self._timeout = timeout
        self._deadline = 0.0
        self._turn = Turn(request, calls.policy, calls.peer, new_id=new_turn_id, on_end=on_end)
        self._call: Any = None
        self._guard: CallGuard | None = None
        self._cancelled = asyncio.Event()

    @property
    def started(self) -> results.TurnStarted:
        """Turn id, seed, verifier, drafter: known once the stream was entered."""
        assert self._turn.transcript.started is not None, (
            "enter the stream first: async with client.generate_stream(...)"
        )
        return self._turn.transcript.started

    async def result(self) -> results.Generation:
        """The whole turn; reads the rest of it first if there is any."""
        async for _ in self:
            pass
        return self._turn.transcript.whole

    @property
    def next_index(self) -> int:
        """Index, in the turn's output, of the first token that has not come yet: what `AsyncClient.resume` takes."""
        return self._turn.transcript.next_index

    def cancel(self) -> None:
        """Ends the turn now; what it has committed stays in the session."""
        self._cancelled.set()
        self._release()

    async def __aiter__(self) -> AsyncIterator[results.Delta]:
        try:
            await self._open()
            while not self._turn.is_whole:
                event = await self._next_event()
                if event is grpc.aio.EOF:
                    break
                delta = self._turn.add(event)
                if delta is not None:
                    yield delta
            self._turn.tell_end()
        finally:
            self._release(over=self._turn.is_whole)

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    async def _open(self) -> None:
        if self._call is not None:
            return
        self._deadline = time.monotonic() + self._timeout
        self._call = self._calls.open_turn(self._turn.request, self._timeout)
        lingers, turn_id = self._turn.lingers, self._turn.turn_id
        after = functools.partial(self._calls.cancel_soon, turn_id) if lingers else None
        self._guard = CallGuard(self._call, after)
        if self._cancelled.is_set():
            self._release()
        try:
            event = await self._next_event()
        except BaseException:
            self._release()
            raise
        if event is not grpc.aio.EOF:
            self._turn.add(event)

    async def _next_event(self) -> Any:
        """The next event, from this call or from one that resumes it; EOF after the last."""
        assert self._guard is not None
        while True:
            try:
                return await _read(self._call, self._turn.turn_id)
            except grpc.RpcError as failure:
                pause_s = self._turn.pause_s(failure) if self._guard.active else None
                if pause_s is None:
                    self._release(over=is_over(failure))
                    raise self._turn.error_of(failure) from failure
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(pause_s, self._time_left_s())):
                    await self._cancelled.wait()
                raise _cancelled(self._turn.turn_id)
            self._call = self._calls.open_turn(self._turn.request, self._time_left_s())
            self._guard.replace(self._call)

    def _release(self, *, over: bool = False) -> None:
        if self._guard is not None:
            self._guard.release(over=over)

    def _time_left_s(self) -> float:
        return max(self._deadline - time.monotonic(), 0.0)


async def _read(call: Any, turn_id: str) -> Any:
    try:
        return await call.read()
    except asyncio.CancelledError:
        # Reading a call that was cancelled, or whose channel was closed, looks like a cancelled task: only the task knows.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise _cancelled(turn_id) from None


def _cancelled(turn_id: str) -> Cancelled:
    return Cancelled("The turn was cancelled here.", reason="CANCELLED", turn_id=turn_id)
