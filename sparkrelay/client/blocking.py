"""The blocking client.

with sparkrelay.connect() as client:
    print(client.generate("The capital of France is", max_tokens=8).text)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from sparkrelay.client import results, translate
from sparkrelay.client.address import (
    CHANNEL_OPTIONS,
    GENERATE_TIMEOUT_S,
    QUERY_TIMEOUT_S,
    call_metadata,
    resolve_address,
)
from sparkrelay.client.calls import RETRY_PAUSES_S, CallGuard, TurnTranscript, may_repeat
from sparkrelay.client.errors import error_of
from sparkrelay.client.requests import GenerateOptions, generate_request
from sparkrelay.runtime import read_runtime
from sparkrelay.v1 import admin_service_pb2 as admin_pb
from sparkrelay.v1 import admin_service_pb2_grpc as admin_grpc
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import gateway_service_pb2_grpc as gateway_grpc

T = TypeVar("T")


def connect(
    address: str | None = None, *, token: str | None = None, timeout: float = GENERATE_TIMEOUT_S
) -> Client:
    """A client of the gateway at `address` (host:port); without it, of SPARKRELAY_GATEWAY or of what `sparkrelay up` started.

    timeout is in seconds and bounds every call; questions about state are bounded by 30 s in any case. Nothing is sent
    yet. Raises Unavailable if nothing names a gateway.
    """
    return Client(resolve_address(address, os.environ, read_runtime()), token=token, timeout=timeout)


class GenerationStream:
    """One turn as it happens: iterate over its deltas, then read `result`. Leaving it, by any way, cancels what still runs."""

    def __init__(self, call: Any, first: gateway_pb.GenerateResponse, address: str) -> None:
        self._call = call
        self._guard = CallGuard(call)
        self._address = address
        self._transcript = TurnTranscript()
        self._transcript.add(first)

    @property
    def started(self) -> results.TurnStarted:
        """Turn id, seed, verifier, drafter: known before the first token."""
        assert self._transcript.started is not None, "the first event of a turn is `started`"
        return self._transcript.started

    @property
    def result(self) -> results.Generation:
        """The whole turn; reads the rest of it first if there is any."""
        for _ in self:
            pass
        return self._transcript.whole

    def cancel(self) -> None:
        """Ends the turn now; what it has committed stays in the session."""
        self._guard.release()

    def __iter__(self) -> Iterator[results.Delta]:
        try:
            while self._transcript.generation is None:
                event = next(self._call, None)
                if event is None:
                    break
                delta = self._transcript.add(event)
                if delta is not None:
                    yield delta
        except grpc.RpcError as failure:
            raise error_of(failure, self._address) from failure
        finally:
            self._guard.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.release()


class Session:
    """A conversation whose state stays warm on one verifier. Every turn is given the whole conversation so far."""

    def __init__(self, client: Client, info: results.SessionInfo) -> None:
        self._client = client
        self.session_id = info.session_id
        self.model = info.model

    def generate(self, prompt: str | None = None, **options: Any) -> results.Generation:
        """Runs one turn; the options are those of `Client.generate`."""
        with self.generate_stream(prompt, **options) as stream:
            return stream.result

    def generate_stream(self, prompt: str | None = None, **options: Any) -> GenerationStream:
        """Runs one turn as it happens."""
        return self._client._open(GenerateOptions(prompt=prompt, **options), self.session_id)

    def info(self) -> results.SessionInfo:
        """What the gateway knows of it."""
        return self._client.get_session(self.session_id)

    def fork(self, token_count: int = 0) -> Session:
        """A new session that begins with the first `token_count` tokens of this one, 0 for all, and shares what was computed.

        A turn of this one may be under way.
        """
        return self._client.fork_session(self.session_id, token_count)

    def end(self) -> None:
        """Frees what it holds; ending twice is no error."""
        self._client.end_session(self.session_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class Client:
    """Calls to one gateway. Safe to use from several threads; close it, or use it as a context manager."""

    def __init__(self, address: str, *, token: str | None, timeout: float) -> None:
        self.address = address
        self._timeout = timeout
        self._metadata = call_metadata(token)
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._gateway = gateway_grpc.GatewayServiceStub(self._channel)
        self._admin = admin_grpc.AdminServiceStub(self._channel)

    def generate(self, prompt: str | None = None, **options: Any) -> results.Generation:
        """Runs one turn and returns the whole of it; `options` are the fields of GenerateOptions."""
        with self.generate_stream(prompt, **options) as stream:
            return stream.result

    def generate_stream(self, prompt: str | None = None, **options: Any) -> GenerationStream:
        """Runs one turn as it happens; returns once it was accepted."""
        return self._open(GenerateOptions(prompt=prompt, **options), "")

    def create_session(self, *, model: str = "", idle_limit_ms: int = 0) -> Session:
        """Opens a session; idle_limit_ms 0 is the gateway's default."""
        request = gateway_pb.CreateSessionRequest(model=model, idle_limit_ms=idle_limit_ms)
        answer = self._ask(self._gateway.CreateSession, request, is_read=False)
        return Session(self, translate.session(answer.session))

    def session(self, session_id: str) -> Session:
        """A session that was opened before, perhaps by another process. Raises NotFound."""
        return Session(self, self.get_session(session_id))

    def get_session(self, session_id: str) -> results.SessionInfo:
        """Raises NotFound."""
        request = gateway_pb.GetSessionRequest(session_id=session_id)
        return translate.session(self._ask(self._gateway.GetSession, request).session)

    def list_sessions(self, limit: int = 100) -> list[results.SessionInfo]:
        """The newest sessions first, at most `limit` (1 to 1000)."""
        answer = self._ask(self._gateway.ListSessions, gateway_pb.ListSessionsRequest(page_size=limit))
        return [translate.session(each) for each in answer.sessions]

    def fork_session(self, session_id: str, token_count: int = 0) -> Session:
        """Opens a session that begins with the first `token_count` tokens of another; 0 takes all. Raises NotFound."""
        request = gateway_pb.ForkSessionRequest(session_id=session_id, token_count=token_count)
        answer = self._ask(self._gateway.ForkSession, request, is_read=False)
        return Session(self, translate.session(answer.session))

    def end_session(self, session_id: str) -> None:
        """Ends a session; an unknown one is no error."""
        request = gateway_pb.EndSessionRequest(session_id=session_id)
        self._ask(self._gateway.EndSession, request, is_read=False)

    def get_turn(self, turn_id: str) -> results.Turn:
        """A recent turn with its rounds. Raises NotFound."""
        return translate.turn(
            self._ask(self._gateway.GetTurn, gateway_pb.GetTurnRequest(turn_id=turn_id)).turn
        )

    def list_turns(self, limit: int = 100, session_id: str = "") -> list[results.Turn]:
        """Recent turns without their rounds, newest first, at most `limit` (1 to 1000)."""
        request = gateway_pb.ListTurnsRequest(page_size=limit, session_id=session_id)
        return [translate.turn(each) for each in self._ask(self._gateway.ListTurns, request).turns]

    def list_models(self) -> list[results.Model]:
        """The models that can be asked for, by name."""
        answer = self._ask(self._gateway.ListModels, gateway_pb.ListModelsRequest())
        return [translate.model(each) for each in answer.models]

    def workers(self) -> list[results.Worker]:
        """The verifiers this gateway knows, and their drafters."""
        answer = self._ask(self._admin.ListWorkers, admin_pb.ListWorkersRequest())
        return [translate.worker(each) for each in answer.workers]

    def drain_worker(self, address: str) -> results.Worker:
        """Sends no new sessions to a verifier; those it has go on."""
        request = admin_pb.DrainWorkerRequest(address=address)
        return translate.worker(self._ask(self._admin.DrainWorker, request, is_read=False).worker)

    def watch_rounds(self, session_id: str = "") -> Iterator[results.WatchedRound]:
        """Rounds as they happen, of one session or of all, until the iterator is closed."""
        request = gateway_pb.WatchRoundsRequest(session_id=session_id)
        call = self._gateway.WatchRounds(request, metadata=self._metadata)
        guard = CallGuard(call)
        try:
            for message in call:
                yield translate.watched_round(message)
        except grpc.RpcError as failure:
            raise error_of(failure, self.address) from failure
        finally:
            guard.release()

    def close(self) -> None:
        """Closes the connection; calls under way end Cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, options: GenerateOptions, session_id: str) -> GenerationStream:
        request = generate_request(options, session_id)

        def start() -> GenerationStream:
            call = self._gateway.Generate(request, timeout=self._timeout, metadata=self._metadata)
            try:
                return GenerationStream(call, next(call), self.address)
            except BaseException:
                call.cancel()
                raise

        return self._repeated(start, is_read=False)

    def _ask(self, method: Any, request: Any, *, is_read: bool = True) -> Any:
        timeout = min(self._timeout, QUERY_TIMEOUT_S)
        return self._repeated(
            lambda: method(request, timeout=timeout, metadata=self._metadata), is_read=is_read
        )

    def _repeated(self, attempt: Callable[[], T], *, is_read: bool) -> T:
        for pause_s in (*RETRY_PAUSES_S, None):
            try:
                return attempt()
            except grpc.RpcError as failure:
                if pause_s is None or not may_repeat(failure, is_read=is_read):
                    raise error_of(failure, self.address) from failure
                time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")
