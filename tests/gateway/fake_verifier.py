"""A scripted verifier behind a real port, and a real gateway in front of it.

Its tokens follow a rule that can be worked out by hand, it commits them in rounds, and it keeps sessions as the contract
says: keep_hash must match, EndSession forgets. It refuses, holds turns open, falls silent or dies when told.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from gateway.journal import JournalStore
from gateway.servicer import AdminServicer, FrontDesk, GatewayServicer, Outside
from gateway.settings import GatewaySettings
from sparkrelay.errors import abort
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.protocol import chain_hash
from sparkrelay.server import SERVER_INTERCEPTORS, SERVER_OPTIONS
from sparkrelay.v1 import admin_service_pb2_grpc as admin_grpc
from sparkrelay.v1 import gateway_service_pb2_grpc as gateway_grpc
from sparkrelay.v1 import generation_pb2 as generation_pb
from sparkrelay.v1 import verifier_service_pb2 as verifier_pb
from sparkrelay.v1 import verifier_service_pb2_grpc as verifier_grpc

Event = verifier_pb.VerifierServiceGenerateResponse
VOCAB_SIZE = 64
STOP_ID = 2
WAIT_S = 10.0


def next_token(tokens: Sequence[int]) -> int:
    """The default rule; never the stop id, which is even smaller than its results."""
    return 3 + (7 * tokens[-1] + len(tokens)) % (VOCAB_SIZE - 3)


def continuation(
    prompt: Sequence[int], count: int, rule: Callable[[Sequence[int]], int] = next_token
) -> tuple[int, ...]:
    """What a turn of `count` tokens after `prompt` gives."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(rule(tokens))
    return tuple(tokens[len(prompt) :])


class Bell:
    """Rung on every change; `until` waits for a condition that changes bring about."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._rung.clear()
                await self._rung.wait()


@dataclass
class FakeVerifier(verifier_grpc.VerifierServiceServicer):
    """hold_after: a turn stops after so many tokens until `go_on` is set. round_size: tokens of a commit.

    found_later: prompt tokens that others have read between the acceptance of a turn and its first step
    """

    bell: Bell
    name: str = "fake"
    model: str = "toy"
    vocab_size: int = VOCAB_SIZE
    context_limit: int = 200
    tokenizer_hash: str = ""
    round_size: int = 3
    rule: Callable[[Sequence[int]], int] = next_token
    refusals: list[Refusal] = field(default_factory=list)
    hold_after: int | None = None
    found_later: int = 0
    drafters: list[verifier_pb.DrafterStatus] = field(default_factory=list)
    sessions: dict[str, list[int]] = field(default_factory=dict)
    requests: list[verifier_pb.VerifierServiceGenerateRequest] = field(default_factory=list)
    forks: list[verifier_pb.VerifierServiceForkSessionRequest] = field(default_factory=list)
    hold_forks: bool = False
    metadata: list[dict[str, Any]] = field(default_factory=list)
    times_left: list[float | None] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    ended_sessions: list[str] = field(default_factory=list)
    epoch: str = "epoch-1"
    address: str = "127.0.0.1:0"
    silent: bool = False
    has_response_format: bool = False

    async def start(self) -> None:
        self.go_on = asyncio.Event()
        self.report_now = asyncio.Event()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        verifier_grpc.add_VerifierServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self.address)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def die(self) -> None:
        """Gone at once, with all it held."""
        await self._server.stop(0)
        self.sessions.clear()

    async def restart(self) -> None:
        """Back at the same address as another incarnation."""
        self.epoch += "'"
        self.hold_after = None
        await self.start()

    async def Generate(self, request: Any, context: Any) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.times_left.append(context.time_remaining())
        self.bell.ring()
        finished = False
        try:
            if self.refusals:
                await abort(context, self.refusals.pop(0))
            held = self.sessions.get(request.session_id, [])
            if request.keep_len > len(held) or request.keep_hash != chain_hash(held[: request.keep_len]):
                await abort(context, Refusal(Reason.PREFIX_MISMATCH, "other tokens are held here"))
            tokens = [*held[: request.keep_len], *request.append_token_ids]
            self.sessions[request.session_id] = tokens
            yield self._started(request, len(tokens))
            async for event in self._output(request, tokens):
                yield event
            finished = True
        finally:
            if not finished:
                self.cancelled.append(request.turn_id)
            self.bell.ring()

    async def _output(self, request: Any, tokens: list[int]) -> AsyncGenerator[Event, None]:
        produced, reason = 0, generation_pb.FINISH_REASON_LENGTH
        while produced < request.stop.max_token_count:
            if self.hold_after is not None and produced >= self.hold_after:
                await self.go_on.wait()
            start, room = len(tokens), request.stop.max_token_count - produced
            for _ in range(1 if produced == 0 else min(self.round_size, room)):
                tokens.append(self.rule(tokens))
                produced += 1
                if tokens[-1] == STOP_ID and not request.stop.ignore_default_stop_ids:
                    reason = generation_pb.FINISH_REASON_STOP
                    break
            yield self._committed(request, start, tokens[start:])
            if reason == generation_pb.FINISH_REASON_STOP:
                break
            await asyncio.sleep(0)
        yield Event(
            finished=verifier_pb.VerifierTurnFinished(
                finish_reason=reason,
                usage=generation_pb.Usage(cached_token_count=request.keep_len + self.found_later),
                session_token_count=len(tokens),
            )
        )

    def _started(self, request: Any, token_count: int) -> Event:
        return Event(
            started=verifier_pb.VerifierTurnStarted(
                turn_id=request.turn_id,
                verifier_id=self.name,
                epoch=self.epoch,
                prompt_token_count=token_count,
                cached_token_count=request.keep_len,
            )
        )

    def _committed(self, request: Any, start: int, ids: list[int]) -> Event:
        first = start == request.output_start
        zero = [0]
        rounds = verifier_pb.RoundColumns(
            first_index=(start - request.output_start - 1) // self.round_size,
            drafted_counts=[4],
            depths=[3],
            accepted_counts=[len(ids) - 1],
            block_states=[generation_pb.RoundReport.BLOCK_STATE_FRESH],
            confidences=bytes([255, 51, 51, 51]),
            wait_us=zero,
            verify_us=zero,
            draft_us=zero,
            queue_us=zero,
            batch_row_counts=zero,
            batch_session_counts=zero,
            dropped_block_counts=zero,
            drafter_ids=[request.drafter_ids[0] if request.drafter_ids else ""],
        )
        logprobs = [generation_pb.TokenLogprob(token_id=each, logprob=-0.5) for each in ids]
        batch = verifier_pb.CommitBatch(
            start=start,
            token_counts=[len(ids)],
            token_ids=ids,
            logprobs=logprobs if request.HasField("logprob_count") else (),
            opens=first,
            rounds=None if first else rounds,
        )
        return Event(committed=batch)

    async def Describe(self, request: Any, context: Any) -> verifier_pb.VerifierServiceDescribeResponse:
        return verifier_pb.VerifierServiceDescribeResponse(
            verifier_id=self.name,
            epoch=self.epoch,
            model_id=self.model,
            tokenizer_hash=self.tokenizer_hash,
            vocab_size=self.vocab_size,
            context_limit=self.context_limit,
            default_stop_ids=[STOP_ID],
            exact=True,
            has_response_format=self.has_response_format,
        )

    async def WatchLoad(
        self, request: Any, context: Any
    ) -> AsyncIterator[verifier_pb.VerifierServiceWatchLoadResponse]:
        while True:
            if not self.silent:
                yield verifier_pb.VerifierServiceWatchLoadResponse(epoch=self.epoch, drafters=self.drafters)
            self.report_now.clear()
            try:
                await asyncio.wait_for(self.report_now.wait(), 0.1)
            except TimeoutError:
                continue

    async def ForkSession(self, request: Any, context: Any) -> verifier_pb.VerifierServiceForkSessionResponse:
        self.forks.append(request)
        self.times_left.append(context.time_remaining())
        self.bell.ring()
        if self.hold_forks:
            await self.go_on.wait()
        if self.refusals:
            await abort(context, self.refusals.pop(0))
        ids = self.sessions.get(request.session_id, [])[: request.token_count]
        if len(ids) < request.token_count or request.token_hash != chain_hash(ids):
            await abort(context, Refusal(Reason.PREFIX_MISMATCH, "other tokens are held here"))
        self.sessions[request.fork_session_id] = ids
        return verifier_pb.VerifierServiceForkSessionResponse(cached_token_count=len(ids) - 1)

    async def EndSession(self, request: Any, context: Any) -> verifier_pb.VerifierServiceEndSessionResponse:
        self.sessions.pop(request.session_id, None)
        self.ended_sessions.append(request.session_id)
        self.bell.ring()
        return verifier_pb.VerifierServiceEndSessionResponse()

    async def Speculate(self, request: Any, context: Any) -> None:
        raise NotImplementedError

    async def FeedContext(self, request: Any, context: Any) -> None:
        raise NotImplementedError


@dataclass
class Stack:
    """A running gateway and its verifiers."""

    address: str
    desk: FrontDesk
    verifiers: list[FakeVerifier]
    bell: Bell

    @property
    def verifier(self) -> FakeVerifier:
        return self.verifiers[0]

    async def until(self, condition: Callable[[], bool]) -> None:
        await self.bell.until(condition)


@asynccontextmanager
async def running(
    *changes: dict[str, Any], wait: bool = True, store: JournalStore | None = None, **settings: Any
) -> AsyncGenerator[Stack, None]:
    """A gateway in front of one verifier for each dict of changes (one plain one if there is none).

    store  where it writes turns down; None for nowhere
    """
    bell = Bell()
    verifiers = [FakeVerifier(bell, **each) for each in changes or ({},)]
    for verifier in verifiers:
        await verifier.start()
    outside = Outside(
        clock_us=lambda: time.monotonic_ns() // 1000,
        wall_s=time.time,
        now=lambda: datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC),
        random_bytes=os.urandom,
    )
    addresses = ",".join(verifier.address for verifier in verifiers)
    values = {"verifiers": addresses, "backoff_min_ms": 20, "backoff_max_ms": 100} | settings
    desk = FrontDesk(GatewaySettings(**values), outside, on_ready=lambda ready: bell.ring(), store=store)
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=SERVER_INTERCEPTORS)
    gateway_grpc.add_GatewayServiceServicer_to_server(GatewayServicer(desk), server)
    admin_grpc.add_AdminServiceServicer_to_server(AdminServicer(desk), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    desk.start()
    try:
        stack = Stack(f"127.0.0.1:{port}", desk, verifiers, bell)
        if wait:
            await stack.until(lambda: all(view.state.name == "READY" for view in desk.pool.views))
        yield stack
    finally:
        await server.stop(0)
        await desk.close()
        for verifier in verifiers:
            await verifier.die()
