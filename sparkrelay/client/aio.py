"""The asyncio client: the same calls, results and errors as the blocking one.

async with sparkrelay.aio.connect() as client:
    async with client.generate_stream("Once upon a time", max_tokens=64) as stream:
        async for delta in stream:
            print(delta.text, end="")
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from sparkrelay.client import results, translate
from sparkrelay.client.address import (
    CANCEL_TIMEOUT_S,
    GENERATE_TIMEOUT_S,
    PARTING_S,
    QUERY_TIMEOUT_S,
    Access,
    Peer,
    resolve_address,
    resolve_peer,
)
from sparkrelay.client.aio_stream import AsyncGenerationStream
from sparkrelay.client.calls import CallGuard
from sparkrelay.client.requests import (
    GenerateOptions,
    Message,
    chat_messages,
    generate_request,
    resume_request,
)
from sparkrelay.client.retries import RetryPolicy
from sparkrelay.runtime import read_runtime
from sparkrelay.v1 import admin_service_pb2 as admin_pb
from sparkrelay.v1 import admin_service_pb2_grpc as admin_grpc
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import gateway_service_pb2_grpc as gateway_grpc


def connect(
    address: str | None = None,
    *,
    token: str | None = None,
    tls: bool | None = None,
    ca: str | None = None,
    cert: str | None = None,
    key: str | None = None,
    timeout: float = GENERATE_TIMEOUT_S,
) -> AsyncClient:
    """As `sparkrelay.connect`, for asyncio; to be called inside a running event loop."""
    access = Access(token, tls, ca, cert, key)
    where = resolve_address(address, os.environ, read_runtime())
    return AsyncClient(resolve_peer(where, access, os.environ), timeout=timeout)


class AsyncSession:
    """A conversation whose state stays warm on one verifier; what was computed for it is not computed again.

    async with await client.create_session() as session:
        print((await session.chat("Name a colour.")).text)
        print((await session.chat("And another one.")).text)

    `chat` keeps the messages. `generate` does not: it is given the whole conversation each time.
    """

    def __init__(self, client: AsyncClient, info: results.SessionInfo) -> None:
        self._client = client
        self.session_id = info.session_id
        self.model = info.model
        self.messages: list[Message] = []

    async def generate(self, prompt: str | None = None, **options: Any) -> results.Generation:
        """Runs one turn; the options are those of `AsyncClient.generate`."""
        async with self.generate_stream(prompt, **options) as stream:
            return await stream.result()

    def generate_stream(self, prompt: str | None = None, **options: Any) -> AsyncGenerationStream:
        """Runs one turn as it happens; it starts when the stream is entered or first read."""
        return self._client._open(GenerateOptions(prompt=prompt, **options), self.session_id)

    async def chat(self, message: str | Sequence[Message], **options: Any) -> results.Generation:
        """Adds a message (or messages) to the conversation, and the answer to it."""
        async with self.chat_stream(message, **options) as stream:
            return await stream.result()

    def chat_stream(self, message: str | Sequence[Message], **options: Any) -> AsyncGenerationStream:
        """The same as it happens; the conversation has the answer once it is whole."""
        messages = chat_messages(message, self.messages)

        def remember(answer: results.Generation) -> None:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]

        return self._client._open(GenerateOptions(messages=messages, **options), self.session_id, remember)

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

    def __init__(self, peer: Peer, *, timeout: float, policy: RetryPolicy | None = None) -> None:
        self.peer = peer
        self.address = peer.address
        self.policy = policy or RetryPolicy(random.random)
        self._timeout = timeout
        self._metadata = peer.metadata
        self._loop = asyncio.get_running_loop()
        self._cancels: set[asyncio.Task[None]] = set()  # CancelTurn calls whose answers are still to come
        self._channel = peer.aio_channel()
        self._gateway = gateway_grpc.GatewayServiceStub(self._channel)
        self._admin = admin_grpc.AdminServiceStub(self._channel)

    async def generate(self, prompt: str | None = None, **options: Any) -> results.Generation:
        """Runs one turn and returns the whole of it; `options` are the fields of GenerateOptions."""
        async with self.generate_stream(prompt, **options) as stream:
            return await stream.result()

    def generate_stream(self, prompt: str | None = None, **options: Any) -> AsyncGenerationStream:
        """Runs one turn as it happens; it starts when the stream is entered or first read."""
        return self._open(GenerateOptions(prompt=prompt, **options), "")

    async def chat(self, message: str | Sequence[Message], **options: Any) -> results.Generation:
        """Runs one turn by the model's chat template: a user's message, or messages {"role": ..., "content": ...}."""
        async with self.chat_stream(message, **options) as stream:
            return await stream.result()

    def chat_stream(self, message: str | Sequence[Message], **options: Any) -> AsyncGenerationStream:
        """The same as it happens."""
        return self._open(GenerateOptions(messages=chat_messages(message), **options), "")

    def resume(
        self, turn_id: str, next_index: int = 0, *, timeout: float | None = None
    ) -> AsyncGenerationStream:
        """Another stream of a turn, from its token number `next_index` (from 0) on; its result has what came from there on.

        For a turn that another process has begun to read; a stream that breaks resumes by itself. Whoever still reads the turn
        is told Cancelled. Raises NotFound if the turn is unknown or was asked for with resume=False, ResumeLost if what came
        from there on is gone.
        """
        request = resume_request(turn_id, next_index)
        return AsyncGenerationStream(self, request, timeout=timeout or self._timeout)

    async def cancel_turn(self, turn_id: str) -> None:
        """Ends a turn under way, whoever reads it; one that is over stays as it is. Raises NotFound."""
        await self._ask(self._gateway.CancelTurn, gateway_pb.CancelTurnRequest(turn_id=turn_id))

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
            raise self.peer.error_of(failure) from failure
        finally:
            guard.release()

    async def close(self) -> None:
        """Closes the connection; calls under way end Cancelled."""
        await asyncio.sleep(0)  # what was to be sent soon is sent
        if self._cancels:
            await asyncio.wait(tuple(self._cancels), timeout=PARTING_S)
        await self._channel.close()

    def open_turn(self, request: gateway_pb.GenerateRequest, timeout: float) -> Any:
        """For streams: a Generate call."""
        return self._gateway.Generate(request, timeout=timeout, metadata=self._metadata)

    def cancel_soon(self, turn_id: str) -> None:
        """For streams: ends a turn without waiting for the answer. Any thread may call it."""
        with contextlib.suppress(
            RuntimeError
        ):  # the loop is closed: the turn ends when nobody has listened for a while
            self._loop.call_soon_threadsafe(self._post_cancel, turn_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _post_cancel(self, turn_id: str) -> None:
        task = self._loop.create_task(self._cancel(turn_id))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _cancel(self, turn_id: str) -> None:
        request = gateway_pb.CancelTurnRequest(turn_id=turn_id)
        # Refused, lost, or the channel was closed meanwhile: the turn ends when nobody has listened for a while.
        with contextlib.suppress(grpc.RpcError, asyncio.CancelledError, grpc.aio.UsageError):
            await self._gateway.CancelTurn(request, timeout=CANCEL_TIMEOUT_S, metadata=self._metadata)

    def _open(
        self,
        options: GenerateOptions,
        session_id: str,
        on_end: Callable[[results.Generation], None] | None = None,
    ) -> AsyncGenerationStream:
        request = generate_request(options, session_id)
        return AsyncGenerationStream(self, request, timeout=options.timeout or self._timeout, on_end=on_end)

    async def _ask(self, method: Any, request: Any, *, is_read: bool = True) -> Any:
        timeout, attempt = min(self._timeout, QUERY_TIMEOUT_S), 0
        while True:
            try:
                answer = await method(request, timeout=timeout, metadata=self._metadata)
            except grpc.RpcError as failure:
                pause_s = self.policy.repeat_pause_s(failure, attempt, is_read=is_read)
                if pause_s is None:
                    raise self.peer.error_of(failure) from failure
            else:
                self.policy.budget.succeeded()
                return answer
            attempt += 1
            await asyncio.sleep(pause_s)
