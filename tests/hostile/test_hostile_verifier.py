"""A verifier that says spoilt things: the drafter drops that link and dials again, and its other verifier never notices."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest

from drafter_service.verifier_link import LinkTimes
from sparkrelay.frames import (
    Context,
    Drain,
    Invite,
    Joined,
    Left,
    Ping,
    Pong,
    Rewound,
    TurnEnded,
    TurnStarted,
    Verdict,
    Verdicts,
    Welcome,
)
from sparkrelay.outcomes import FinishReason, Reason
from sparkrelay.sampling import Sampling
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.wire import drafter_frame, feed_response_pb, verifier_frame_pb
from tests.hostile.house import Drafter, house, until
from tests.hostile.mutations import mutated

COUNT = 10_000 if os.environ.get("SPARKRELAY_FULL") == "1" else 1_000
pytestmark = pytest.mark.timeout(900 if COUNT == 10_000 else 120)
SEED = 11_242_026
SAMPLING = Sampling(temperature=0.5, top_p=0.9, repetition_penalty=1.1, logit_bias=((3, 1.0),), seed=3)
WELCOME = Welcome(1, "liar", "epoch", b"stream", 64, 15, 1 << 22)
TURN = TurnStarted(1, "turn", 4, SAMPLING, 1, 50, 4, (2,), 5)
SPECULATE: tuple[Any, ...] = (
    WELCOME,
    Invite("s2", b"token"),
    Joined("s1", 1, 0),
    TURN,
    Verdicts((Verdict(1, 0, 4, 0, 0, 0, 7, 5), Verdict(2, 1, 9, 5, 3, 2, 8, 0))),
    Rewound(1, 2),
    TurnEnded(1, "turn", FinishReason.STOP),
    Left(1, "", Reason.SLOW, "why"),
    Drain(1000),
    Ping(4),
    Pong(1),
)
FEED: tuple[Any, ...] = (Context(1, 0, (1, 2, 3, 4)), Context(1, 4, (5,)), Ping(2), Pong(1))


def speculate_bytes(frame: Any) -> bytes:
    return verifier_frame_pb(frame).SerializeToString()


class Liar:
    """Speaks raw bytes: a good beginning, so that there is a member with a turn, then whatever the seed brings."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.sent = 0
        self._random = Random(SEED)
        self._spoilt = mutated([speculate_bytes(frame) for frame in SPECULATE], SEED)
        self._spoilt_feed = mutated([feed_response_pb(frame).SerializeToString() for frame in FEED], SEED)

    async def speculate(self, requests: AsyncIterator[bytes], context: Any) -> None:
        listening = asyncio.create_task(self._listen(requests))
        try:
            self.seen["streams"] += 1
            if self._random.random() < 0.95:
                for frame in (WELCOME, Invite("s1", b"token")):
                    await context.write(speculate_bytes(frame))
                if self._random.random() < 0.8:
                    await self._joined.wait()
                    await context.write(speculate_bytes(Joined("s1", 1, 0)))
                    await context.write(speculate_bytes(TURN))
            for _ in range(self._random.randint(1, 30)):
                await context.write(next(self._spoilt))
                self.sent += 1
                await asyncio.sleep(0)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def feed(self, requests: AsyncIterator[bytes], context: Any) -> None:
        for frame in FEED[:1]:
            await context.write(feed_response_pb(frame).SerializeToString())
        for _ in range(30):
            await context.write(next(self._spoilt_feed))
            self.sent += 1
            await asyncio.sleep(0)

    async def _listen(self, requests: AsyncIterator[bytes]) -> None:
        self._joined = asyncio.Event()
        async for data in requests:
            kind = type(drafter_frame(pb2.SpeculateRequest.FromString(data))).__name__
            self.seen[kind] += 1
            if kind == "Join":
                self._joined.set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = grpc.aio.server()
        calls = {
            "Speculate": grpc.stream_stream_rpc_method_handler(self.speculate),  # type: ignore[arg-type]
            "FeedContext": grpc.stream_stream_rpc_method_handler(self.feed),  # type: ignore[arg-type]
        }
        handler = grpc.method_handlers_generic_handler("sparkrelay.v1.VerifierService", calls)
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0)


async def test_spoilt_frames_of_a_verifier_cost_a_drafter_that_link_and_nothing_else() -> None:
    liar = Liar()
    async with house() as made, liar.serving() as address:
        times = LinkTimes(welcome_s=0.5)
        both = Drafter([made.verifier.address, address], "both", times, backoff_ms=(1, 2))
        async with both.running(), made.undisturbed():
            await until(lambda: liar.sent >= COUNT, limit_s=600)
            sessions = both.engine.totals.sessions_by_link
            assert both.dialled[0].status.state.name == "CONNECTED", "the honest verifier kept its link"
            assert len(sessions) <= 2, "no link is left behind"
            await until(lambda: "no message" in both.dialled[1].status.message)  # people are told why
    print(f"{liar.sent} frames, {dict(liar.seen)}")
    assert liar.seen["streams"] > 10
    assert min(liar.seen["Join"], liar.seen["Blocks"]) > 0, "it was believed before it lied"
