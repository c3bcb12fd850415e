"""The blocking client.

with sparkrelay.connect() as client:
    print(client.generate("The capital of France is", max_tokens=8).text)
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

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
from sparkrelay.client.blocking_stream import GenerationStream
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
) -> Client:
    """A client of the gateway at `address` (host:port); without it, of SPARKRELAY_GATEWAY or of what `sparkrelay up` started.

    token      the bearer token to show; else the first one of the file that SPARKRELAY_TOKEN_FILE names
    ca         PEM file with the CA that signed the gateway's certificate (SPARKRELAY_CA_FILE): the connection is over TLS
    cert, key  PEM files with this client's own certificate, for a gateway that asks for one (SPARKRELAY_CERT_FILE, _KEY_FILE)
    tls        True: over TLS also without a `ca`, by the system's CAs. False: never
    timeout    seconds, bounds every call; questions about state are bounded by 30 s in any case

    Nothing is sent yet. Raises Unavailable if nothing names a gateway, InvalidRequest for files that cannot be used.
    """
    access = Access(token, tls, ca, cert, key)
    where = resolve_address(address, os.environ, read_runtime())
    return Client(resolve_peer(where, access, os.environ), timeout=timeout)


class Session:
    """A conversation whose state stays warm on one verifier; what was computed for it is not computed again.

    with client.create_session() as session:
        print(session.chat("Name a colour.").text)
        print(session.chat("And another one.").text)

    `chat` keeps the messages. `generate` does not: it is given the whole conversation each time.
    """

    def __init__(self, client: Client, info: results.SessionInfo) -> None:
        self._client = client
        self.session_id = info.session_id
        self.model = info.model
        self.messages: list[Message] = []

    def generate(self, prompt: str | None = None, **options: Any) -> results.Generation:
        """Runs one turn; the options are those of `Client.generate`."""
        with self.generate_stream(prompt, **options) as stream:
            return stream.result

    def generate_stream(self, prompt: str | None = None, **options: Any) -> GenerationStream:
        """Runs one turn as it happens; returns once it was accepted."""
        return self._client._open(GenerateOptions(prompt=prompt, **options), self.session_id)

    def chat(self, message: str | Sequence[Message], **options: Any) -> results.Generation:
        """Adds a message (or messages) to the conversation, and the answer to it."""
        with self.chat_stream(message, **options) as stream:
            return stream.result

    def chat_stream(self, message: str | Sequence[Message], **options: Any) -> GenerationStream:
        """The same as it happens; the conversation has the answer once it is whole."""
        messages = chat_messages(message, self.messages)

        def remember(answer: results.Generation) -> None:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]

        return self._client._open(GenerateOptions(messages=messages, **options), self.session_id, remember)

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

    def __init__(self, peer: Peer, *, timeout: float, policy: RetryPolicy | None = None) -> None:
        self.peer = peer
        self.address = peer.address
        self.policy = policy or RetryPolicy(random.random)
        self._timeout = timeout
        self._metadata = peer.metadata
        self._cancels: set[Any] = set()  # CancelTurn calls whose answers are still to come
        self._channel = peer.blocking_channel()
        self._gateway = gateway_grpc.GatewayServiceStub(self._channel)
        self._admin = admin_grpc.AdminServiceStub(self._channel)

    def generate(self, prompt: str | None = None, **options: Any) -> results.Generation:
        """Runs one turn and returns the whole of it; `options` are the fields of GenerateOptions."""
        with self.generate_stream(prompt, **options) as stream:
            return stream.result

    def generate_stream(self, prompt: str | None = None, **options: Any) -> GenerationStream:
        """Runs one turn as it happens; returns once it was accepted."""
        return self._open(GenerateOptions(prompt=prompt, **options), "")

    def chat(self, message: str | Sequence[Message], **options: Any) -> results.Generation:
        """Runs one turn by the model's chat template: a user's message, or messages {"role": ..., "content": ...}."""
        with self.chat_stream(message, **options) as stream:
            return stream.result

    def chat_stream(self, message: str | Sequence[Message], **options: Any) -> GenerationStream:
        """The same as it happens."""
        return self._open(GenerateOptions(messages=chat_messages(message), **options), "")

    def resume(self, turn_id: str, next_index: int = 0, *, timeout: float | None = None) -> GenerationStream:
        """Another stream of a turn, from its token number `next_index` (from 0) on; its result has what came from there on.

        For a turn that another process has begun to read; a stream that breaks resumes by itself. Whoever still reads the turn
        is told Cancelled. Raises NotFound if the turn is unknown or was asked for with resume=False, ResumeLost if what came
        from there on is gone.
        """
        return GenerationStream(self, resume_request(turn_id, next_index), timeout=timeout or self._timeout)

    def cancel_turn(self, turn_id: str) -> None:
        """Ends a turn under way, whoever reads it; one that is over stays as it is. Raises NotFound."""
        request = gateway_pb.CancelTurnRequest(turn_id=turn_id)
        self._ask(self._gateway.CancelTurn, request)

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
            raise self.peer.error_of(failure) from failure
        finally:
            guard.release()

    def close(self) -> None:
        """Closes the connection; calls under way end Cancelled."""
        deadline = time.monotonic() + PARTING_S
        for call in tuple(self._cancels):
            with contextlib.suppress(grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
                call.result(timeout=max(deadline - time.monotonic(), 0.0))
        self._channel.close()

    def open_turn(self, request: gateway_pb.GenerateRequest, timeout: float) -> Any:
        """For streams: a Generate call."""
        return self._gateway.Generate(request, timeout=timeout, metadata=self._metadata)

    def cancel_soon(self, turn_id: str) -> None:
        """For streams: ends a turn without waiting for the answer."""
        request = gateway_pb.CancelTurnRequest(turn_id=turn_id)
        with contextlib.suppress(
            ValueError
        ):  # the channel is closed: the turn ends when nobody has listened for a while
            call = self._gateway.CancelTurn.future(request, timeout=CANCEL_TIMEOUT_S, metadata=self._metadata)
            self._cancels.add(call)
            call.add_done_callback(self._cancels.discard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(
        self,
        options: GenerateOptions,
        session_id: str,
        on_end: Callable[[results.Generation], None] | None = None,
    ) -> GenerationStream:
        request = generate_request(options, session_id)
        return GenerationStream(self, request, timeout=options.timeout or self._timeout, on_end=on_end)

    def _ask(self, method: Any, request: Any, *, is_read: bool = True) -> Any:
        timeout, attempt = min(self._timeout, QUERY_TIMEOUT_S), 0
        while True:
            try:
                answer = method(request, timeout=timeout, metadata=self._metadata)
            except grpc.RpcError as failure:
                pause_s = self.policy.repeat_pause_s(failure, attempt, is_read=is_read)
                if pause_s is None:
                    raise self.peer.error_of(failure) from failure
            else:
                self.policy.budget.succeeded()
                return answer
            attempt += 1
            time.sleep(pause_s)
