"""The asyncio client: the same calls, results and errors as the blocking one.

async with sparkrelay.aio.connect() as client:
    async with client.generate_stream("Once upon a time", max_tokens=64) as stream:
        async for delta in stream:
            print(delta.text, end="")
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from sparkrelay.client import results, translate
from sparkrelay.client.address import (
    CHANNEL_OPTIONS,
    GENERATE_TIMEOUT_S,
    QUERY_TIMEOUT_S,
    call_metadata,
    resolve_address,
)
from sparkrelay.client.calls import RETRY_PAUSES_S, CallGuard, TurnTranscript, may_repeat
from sparkrelay.client.errors import Cancelled, error_of
from sparkrelay.client.requests import GenerateOptions, generate_request
from sparkrelay.runtime import read_runtime
from sparkrelay.v1 import admin_service_pb2 as admin_pb
from sparkrelay.v1 import admin_service_pb2_grpc as admin_grpc
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import gateway_service_pb2_grpc as gateway_grpc

T = TypeVar("T")


def connect(
    address: str | None = None, *, token: str | None = None, timeout: float = GENERATE_TIMEOUT_S
) -> AsyncClient:
    """As `sparkrelay.connect`, for asyncio; to be called inside a running event loop."""
    return AsyncClient(resolve_address(address, os.environ, read_runtime()), token=token, timeout=timeout)


class AsyncGenerationStream:
    """One turn as it happens. `async with` it, or iterate over it; leaving it, by any way, cancels what still runs."""

    def __init__(self, client: AsyncClient, request: gateway_pb.GenerateRequest) -> None:
        self._client = client
        self._request = request
        self._call: Any = None
        self._guard: CallGuard | None = None
        self._transcript = TurnTranscript()

    @property
    def started(self) -> results.TurnStarted:
        """Turn id, seed, verifier, drafter: known once the stream was entered."""
        assert self._transcript.started is not None, (
            "enter the stream first: async with client.generate_stream(...)"
        )
        return self._transcript.started

    async def result(self) -> results.Generation:
        """The whole turn; reads the rest of it first if there is any."""
        async for _ in self:
            pass
        return self._transcript.whole

    def cancel(self) -> None:
        """Ends the turn now; what it has committed stays in the session."""
        if self._guard is not None:
            self._guard.release()

    async def __aiter__(self) -> AsyncIterator[results.Delta]:
        try:
            await self._open()
            while self._transcript.generation is None:
                event = await self._read()
                if event is grpc.aio.EOF:
                    break
                delta = self._transcript.add(event)
                if delta is not None:
                    yield delta
        except grpc.RpcError as failure:
            raise error_of(failure, self._client.address) from failure
        finally:
            self.cancel()

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def _read(self) -> Any:
        try:
            return await self._call.read()
        except asyncio.CancelledError:
            # Reading a call that was cancelled here looks like a cancelled task: only the task knows which it is.
            task = asyncio.current_task()
            if self._guard is None or self._guard.active or (task is not None and task.cancelling()):
                raise
            raise Cancelled(
                "The turn was cancelled here.", reason="CANCELLED", turn_id=self.started.turn_id
            ) from None

    async def _open(self) -> None:
        if self._call is None:
            self._call, first = await self._client._start(self._request)
            self._guard = CallGuard(self._call)
            self._transcript.add(first)


class AsyncSession:
    """A conversation whose state stays warm on one verifier. Every turn is given the whole conversation so far."""

    def __init__(self, client: AsyncClient, info: results.SessionInfo) -> None:
        self._client = client
        self.session_id = info.session_id
        self.model = info.model

    async def generate(self, prompt: str | None = None, **options: Any) -> results.Generation:
        """Runs one turn; the options are those of `AsyncClient.generate`."""
        async with self.generate_stream(prompt, **options) as stream:
            return await stream.result()

    def generate_stream(self, prompt: str | None = None, **options: Any) -> AsyncGenerationStream:
        """Runs one turn as it happens."""
        request = generate_request(GenerateOptions(prompt=prompt, **options), self.session_id)
        return AsyncGenerationStream(self._client, request)

    async def info(self) -> results.SessionInfo:
        """What the gateway knows of it."""
        return await self._client.get_session(self.session_id)

    async def fork(self, token_count: int = 0) -> AsyncSession:
        """A new session that begins with the first `token_count` tokens of this one, 0 for all, and shares what was computed.

        A turn of this one may be under way.
        """
        return await self._client.fork_session(self.session_id, token_count)

    async def end(self) -> None:
        """Frees what it holds; ending twice is no error."""
        await self._client.end_session(self.session_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.end()


class AsyncClient:
    """Calls to one gateway, from one event loop; close it, or use it as an async context manager."""

    def __init__(self, address: str, *, token: str | None, timeout: float) -> None:
        self.address = address
        self._timeout = timeout
        self._metadata = call_metadata(token)
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._gateway = gateway_grpc.GatewayServiceStub(self._channel)
        self._admin = admin_grpc.AdminServiceStub(self._channel)

    async def generate(self, prompt: str | None = None, **options: Any) -> results.Generation:
        """Runs one turn and returns the whole of it; `options` are the fields of GenerateOptions."""
        async with self.generate_stream(prompt, **options) as stream:
            return await stream.result()

    def generate_stream(self, prompt: str | None = None, **options: Any) -> AsyncGenerationStream:
        """Runs one turn as it happens; it starts when the stream is entered or first read."""
        return AsyncGenerationStream(self, generate_request(GenerateOptions(prompt=prompt, **options)))

    async def create_session(self, *, model: str = "", idle_limit_ms: int = 0) -> AsyncSession:
        """Opens a session; idle_limit_ms 0 is the gateway's default."""
        request = gateway_pb.CreateSessionRequest(model=model, idle_limit_ms=idle_limit_ms)
        answer = await self._ask(self._gateway.CreateSession, request, is_read=False)
        return AsyncSession(self, translate.session(answer.session))

    async def session(self, session_id: str) -> AsyncSession:
        """A session that was opened before, perhaps by another process. Raises NotFound."""
        return AsyncSession(self, await self.get_session(session_id))

    async def get_session(self, session_id: str) -> results.SessionInfo:
        """Raises NotFound."""
        request = gateway_pb.GetSessionRequest(session_id=session_id)
        return translate.session((await self._ask(self._gateway.GetSession, request)).session)

    async def list_sessions(self, limit: int = 100) -> list[results.SessionInfo]:
        """The newest sessions first, at most `limit` (1 to 1000)."""
        answer = await self._ask(self._gateway.ListSessions, gateway_pb.ListSessionsRequest(page_size=limit))
        return [translate.session(each) for each in answer.sessions]

    async def fork_session(self, session_id: str, token_count: int = 0) -> AsyncSession:
        """Opens a session that begins with the first `token_count` tokens of another; 0 takes all. Raises NotFound."""
        request = gateway_pb.ForkSessionRequest(session_id=session_id, token_count=token_count)
        answer = await self._ask(self._gateway.ForkSession, request, is_read=False)
        return AsyncSession(self, translate.session(answer.session))

    async def end_session(self, session_id: str) -> None:
        """Ends a session; an unknown one is no error."""
        request = gateway_pb.EndSessionRequest(session_id=session_id)
        await self._ask(self._gateway.EndSession, request, is_read=False)

    async def get_turn(self, turn_id: str) -> results.Turn:
        """A recent turn with its rounds. Raises NotFound."""
        request = gateway_pb.GetTurnRequest(turn_id=turn_id)
        return translate.turn((await self._ask(self._gateway.GetTurn, request)).turn)

    async def list_turns(self, limit: int = 100, session_id: str = "") -> list[results.Turn]:
        """Recent turns without their rounds, newest first, at most `limit` (1 to 1000)."""
        request = gateway_pb.ListTurnsRequest(page_size=limit, session_id=session_id)
        return [translate.turn(each) for each in (await self._ask(self._gateway.ListTurns, request)).turns]

    async def list_models(self) -> list[results.Model]:
        """The models that can be asked for, by name."""
        answer = await self._ask(self._gateway.ListModels, gateway_pb.ListModelsRequest())
        return [translate.model(each) for each in answer.models]

    async def workers(self) -> list[results.Worker]:
        """The verifiers this gateway knows, and their drafters."""
        answer = await self._ask(self._admin.ListWorkers, admin_pb.ListWorkersRequest())
        return [translate.worker(each) for each in answer.workers]

    async def drain_worker(self, address: str) -> results.Worker:
        """Sends no new sessions to a verifier; those it has go on."""
        request = admin_pb.DrainWorkerRequest(address=address)
        return translate.worker((await self._ask(self._admin.DrainWorker, request, is_read=False)).worker)

    async def watch_rounds(self, session_id: str = "") -> AsyncIterator[results.WatchedRound]:
        """Rounds as they happen, of one session or of all, until the iterator is closed."""
        request = gateway_pb.WatchRoundsRequest(session_id=session_id)
        call: Any = self._gateway.WatchRounds(request, metadata=self._metadata)
        guard = CallGuard(call)
        try:
            async for message in call:
                yield translate.watched_round(message)
        except grpc.RpcError as failure:
            raise error_of(failure, self.address) from failure
        finally:
            guard.release()

    async def close(self) -> None:
        """Closes the connection; calls under way end Cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _start(self, request: gateway_pb.GenerateRequest) -> tuple[Any, gateway_pb.GenerateResponse]:
        async def start() -> tuple[Any, gateway_pb.GenerateResponse]:
            call: Any = self._gateway.Generate(request, timeout=self._timeout, metadata=self._metadata)
            try:
                return call, await call.read()
            except BaseException:
                call.cancel()
                raise

        return await self._repeated(start, is_read=False)

    async def _ask(self, method: Any, request: Any, *, is_read: bool = True) -> Any:
        timeout = min(self._timeout, QUERY_TIMEOUT_S)

        async def ask() -> Any:
            return await method(request, timeout=timeout, metadata=self._metadata)

        return await self._repeated(ask, is_read=is_read)

    async def _repeated(self, attempt: Callable[[], Awaitable[T]], *, is_read: bool) -> T:
        for pause_s in (*RETRY_PAUSES_S, None):
            try:
                return await attempt()
            except grpc.RpcError as failure:
                if pause_s is None or not may_repeat(failure, is_read=is_read):
                    raise error_of(failure, self.address) from failure
                await asyncio.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")
