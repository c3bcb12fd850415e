"""A verifier in this process: the real servicer, engine and gRPC server around the toy model, and drafters made of raw stubs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio

from sparkrelay import wire
from sparkrelay.device.thread import DeviceThread
from sparkrelay.frames import (
    Block,
    Blocks,
    Context,
    Credit,
    FeedAttach,
    Fingerprint,
    Hello,
    Join,
    Ping,
    Pong,
    TurnStarted,
    VerifierFrame,
)
from sparkrelay.protocol import (
    ContextArrived,
    DrafterSide,
    MemberJoined,
    SessionRewound,
    VerdictsArrived,
    chain_hash,
)
from sparkrelay.sampling import Sampling
from sparkrelay.server import SERVER_INTERCEPTORS, SERVER_OPTIONS
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.v1 import verifier_service_pb2_grpc
from sparkrelay.wire import drafter_frame_pb, feed_request_pb, feed_response, sampling_pb, verifier_frame
from verifier_service.depth_policies import parse_depth_policy
from verifier_service.engine import Engine, EngineSettings
from verifier_service.events import Command, Event
from verifier_service.models import FloatRows, TargetModel
from verifier_service.models.toy import ToyModel
from verifier_service.ragged_batch import RaggedBatch
from verifier_service.servicer import VerifierIdentity, VerifierServicer
from verifier_service.servicer.formats import Formats

WAIT_S = 10.0  # of anything that must happen
Request = pb2.VerifierServiceGenerateRequest


class SlowToyModel(ToyModel):
    """A toy whose forward takes its time, so that a long turn is still running when a test does something to it."""

    def forward(self, batch: RaggedBatch) -> FloatRows:
        time.sleep(0.002)
        return super().forward(batch)


class Rig:
    """What a test holds: the servicer, a stub to it, and what crashed."""

    def __init__(
        self, servicer: VerifierServicer, channel: grpc.aio.Channel, engine: Engine, address: str = ""
    ) -> None:
        self.servicer = servicer
        self.address = address
        self.channel = channel
        self.engine = engine
        self.stub: Any = verifier_service_pb2_grpc.VerifierServiceStub(channel)
        self.crashes: list[BaseException] = []

    async def generate(self, request: Request, **call: Any) -> list[pb2.VerifierServiceGenerateResponse]:
        return [response async for response in self.stub.Generate(request, **call)]

    async def load_where(self, holds: Callable[[pb2.VerifierServiceWatchLoadResponse], bool]) -> Any:
        """The first load report for which it holds."""
        call = self.stub.WatchLoad(pb2.VerifierServiceWatchLoadRequest())
        try:
            async with asyncio.timeout(WAIT_S):
                async for report in call:
                    if holds(report):
                        return report
        finally:
            call.cancel()
        raise AssertionError("the reports ended")

    async def connected(self, count: int = 1) -> None:
        """So many drafters are connected."""
        state = pb2.DrafterStatus.STATE_CONNECTED
        await self.load_where(lambda report: sum(each.state == state for each in report.drafters) == count)


@asynccontextmanager
async def rig(
    *,
    model: TargetModel | None = None,
    policy: str = "auto",
    block_wait_ms: int = 5_000,
    now_s: Callable[[], float] = time.monotonic,
    formats: Formats | None = None,
    **link: Any,
) -> AsyncIterator[Rig]:
    """link: fields of LinkSettings to set otherwise."""
    target = model or ToyModel()
    servicers: list[VerifierServicer] = []
    crashes: list[BaseException] = []
    settings = EngineSettings(block_count=4096, block_wait_us=block_wait_ms * 1000)
    engine = Engine(target, settings, parse_depth_policy(policy))
    thread: DeviceThread[Command, Event] = DeviceThread(
        lambda: engine,
        lambda events: servicers[0].deliver(events),
        crashes.append,
        lambda: time.monotonic_ns() // 1000,
    )
    identity = VerifierIdentity("verifier", "epoch", target.info, policy)
    servicer = VerifierServicer(
        identity,
        post=thread.post_all,
        load=engine.load,
        crashed=crashes.append,
        now_s=now_s,
        formats=formats,
        link_settings=replace(identity.link_settings, **link),
    )
    servicers.append(servicer)
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=SERVER_INTERCEPTORS)
    verifier_service_pb2_grpc.add_VerifierServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    thread.start()
    await server.start()
    try:
        address = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(address) as channel:
            made = Rig(servicer, channel, engine, address)
            made.crashes = crashes
            yield made
            engine.check_integrity()
    finally:
        await server.stop(0)
        assert thread.stop(WAIT_S)
    assert crashes == [], crashes


def request(
    turn: str = "t1",
    *,
    session: str = "s1",
    ids: Iterable[int] = (1, 2, 3),
    kept: Iterable[int] = (),
    max_tokens: int = 12,
    drafters: Iterable[str] = (),
    sampling: Sampling | None = None,
    **fields: Any,
) -> Request:
    kept = tuple(kept)
    made = Request(
        session_id=session,
        turn_id=turn,
        keep_len=len(kept),
        keep_hash=chain_hash(kept),
        append_token_ids=tuple(ids),
        sampling=sampling_pb(sampling or Sampling()),
        drafter_ids=tuple(drafters),
        **fields,
    )
    made.stop.max_token_count = max_tokens
    made.stop.ignore_default_stop_ids = True
    made.output_start = made.keep_len + len(made.append_token_ids)
    return made


def token_ids(responses: Iterable[pb2.VerifierServiceGenerateResponse]) -> list[int]:
    return [token for each in responses for token in each.committed.token_ids]


def rounds(responses: Iterable[pb2.VerifierServiceGenerateResponse]) -> list[Any]:
    every = [commit for each in responses for commit in wire.commits(each.committed)]
    return [commit.report for commit in every if commit.report is not None]


class RawDrafter:
    """A drafter without a service: raw stubs and the product's DrafterSide, which checks whatever is said and heard.

    frames    what the verifier said on Speculate, in order
    ids       handle -> the ids it was told of
    """

    def __init__(self, rig: Rig, name: str = "d1", **fingerprint: Any) -> None:
        self.side = DrafterSide()
        self.frames: list[VerifierFrame] = []
        self.contexts: list[Context] = []
        self.context_bytes = 0
        self.ids: dict[int, list[int]] = {}
        self.turns: dict[int, TurnStarted] = {}
        self.name = name
        self.speculate = rig.stub.Speculate()
        self.feed = rig.stub.FeedContext()
        self._offered: dict[str, list[int]] = {}  # session -> ids that a join said are held
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        fields = {"block_size": 15, "proposal_kind": "raw", **fingerprint}
        self._hello = Hello(1, 1, name, "run", Fingerprint(**fields))

    async def connect(self, *, credit: int = 1 << 20, answer: bool = True) -> RawDrafter:
        """Says hello, waits for the welcome and attaches. answer=False: never answers a ping."""
        await self.say(self._hello)
        self._tasks.append(asyncio.create_task(self._hear(answer)))
        welcome = await self.frame("Welcome")
        await self.feed.write(feed_request_pb(FeedAttach(welcome.stream_id)))
        await self.grant(credit)
        self._tasks.append(asyncio.create_task(self._hear_feed(answer)))
        return self

    async def grant(self, credit: int) -> None:
        if credit:
            await self.feed.write(feed_request_pb(Credit(credit)))

    async def say(self, frame: Any, *, check: bool = True) -> None:
        if check:
            self.side.send(frame)
        await self.speculate.write(drafter_frame_pb(frame))

    async def frame(self, kind: str, *, index: int = 0) -> Any:
        """The frame of this kind that came first (index 0), second, ..."""
        await self.until(lambda: len(self.of(kind)) > index)
        return self.of(kind)[index]

    def of(self, kind: str) -> list[Any]:
        return [frame for frame in self.frames if type(frame).__name__ == kind]

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(holds)

    async def join(self, *, index: int = 0, held: Iterable[int] = ()) -> int:
        """Takes the invite; returns the handle."""
        invite, ids = await self.frame("Invite", index=index), tuple(held)
        earlier = len(self.of("Joined"))
        self._offered[invite.session_id] = list(ids)
        await self.say(Join(invite.session_id, invite.token, len(ids), chain_hash(ids)))
        joined = await self.frame("Joined", index=earlier)
        return int(joined.handle)

    async def may_draft(self, handle: int) -> list[int]:
        """Waits until a block may be sent; returns the ids it follows."""
        await self.until(lambda: self.side.may_draft(handle))
        return self.ids[handle]

    async def draft(self, handle: int, ids: Iterable[int], *, confidences: bytes | None = None) -> None:
        """Sends a block at the drafter's own base."""
        tokens = tuple(ids)
        block = Block(handle, 0, len(self.ids[handle]), tokens, confidences or b"\xff" * len(tokens))
        await self.say(Blocks((block,)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.speculate.cancel()
        self.feed.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _hear(self, answer: bool) -> None:
        while (message := await self.speculate.read()) is not grpc.aio.EOF:
            frame = verifier_frame(message)
            for decision in self.side.receive(frame):
                if isinstance(decision, VerdictsArrived):
                    for verdict, ids in decision.entries:
                        self._fill(verdict.handle, verdict.base_len, ids)
                elif isinstance(decision, ContextArrived):
                    self._fill(decision.context.handle, decision.context.start, decision.context.token_ids)
                elif isinstance(decision, MemberJoined):
                    joined = decision.joined
                    self.ids[joined.handle] = self._offered[joined.session_id][: joined.keep_tokens]
                elif isinstance(decision, SessionRewound):
                    del self.ids[decision.rewound.handle][decision.rewound.length :]
            if isinstance(frame, TurnStarted):
                self.turns[frame.handle] = frame
            if isinstance(frame, Ping):
                if answer:
                    await self.say(Pong(frame.sequence))
                continue
            async with self._changed:
                self.frames.append(frame)
                self._changed.notify_all()

    async def _hear_feed(self, answer: bool) -> None:
        while (message := await self.feed.read()) is not grpc.aio.EOF:
            frame = feed_response(message)
            if isinstance(frame, Ping) and answer:
                await self.feed.write(feed_request_pb(Pong(frame.sequence)))
            if isinstance(frame, Context):
                self.context_bytes = max(self.context_bytes, message.ByteSize())
                async with self._changed:
                    self.contexts.append(frame)
                    for decision in self.side.receive(frame):
                        if isinstance(decision, ContextArrived):
                            self._fill(frame.handle, frame.start, frame.token_ids)
                    self._changed.notify_all()

    def _fill(self, handle: int, start: int, ids: Iterable[int]) -> None:
        held, told = self.ids.setdefault(handle, []), list(ids)
        held += [-1] * (start + len(told) - len(held))
        held[start : start + len(told)] = told
