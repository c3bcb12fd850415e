"""Links over real gRPC on loopback, against a verifier whose every frame is written in the test."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio
import pytest
import structlog

from drafter_service import verifier_link
from drafter_service.backoff import Backoff
from drafter_service.engine import DraftEngine
from drafter_service.events import Command, Event
from drafter_service.links import Links, LinkState
from drafter_service.models import Tamper
from drafter_service.verifier_link import FEED_CREDIT_BYTES, LinkTimes, VerifierLink, _until_one_fails
from sparkrelay.device.thread import DeviceThread
from sparkrelay.errors import abort
from sparkrelay.frames import (
    Blocks,
    Context,
    Credit,
    DrafterFrame,
    Drain,
    FeedAttach,
    FeedResponseFrame,
    Hello,
    Invite,
    Join,
    Joined,
    Leave,
    Ping,
    Pong,
    TurnStarted,
    Verdict,
    Verdicts,
    VerifierFrame,
    Welcome,
)
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.sampling import Sampling
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.v1 import verifier_service_pb2_grpc as pb2_grpc
from sparkrelay.wire import drafter_frame, feed_request, feed_response_pb, verifier_frame_pb
from tests.drafter_service.fake_verifier import FormulaModel

PATIENCE_S = 10.0
QUICK = LinkTimes(welcome_s=0.3, ping_every_s=0.05, silence_limit_s=0.2)
CALM = LinkTimes(welcome_s=PATIENCE_S, ping_every_s=0.05, silence_limit_s=PATIENCE_S)
WELCOME = Welcome(1, "verifier-1", "epoch", b"stream", 16, 15, 2**22)
TURN = TurnStarted(1, "turn", 3, Sampling(), 1, 50, 3, (), 4)


class Stream:
    """The verifier's end of one stream: the test hears and says on it. Pings are answered unless it is `mute`."""

    def __init__(self, call: Any, decode: Any, encode: Any, requests: AsyncIterator[Any]) -> None:
        self.mute = False
        self.closed = asyncio.Event()  # by the drafter, cleanly
        self._call, self._decode, self._encode, self._requests = call, decode, encode, requests
        self._heard: asyncio.Queue[Any] = asyncio.Queue()
        self._over = asyncio.Event()
        self._refusal: Refusal | None = None

    async def serve(self) -> None:
        listening = asyncio.create_task(self._listen())
        await self._over.wait()
        listening.cancel()
        if self._refusal is not None:
            await abort(self._call, self._refusal)

    async def _listen(self) -> None:
        async for message in self._requests:
            frame = self._decode(message)
            if isinstance(frame, Ping):
                if not self.mute:
                    await self.say(Pong(frame.sequence))
            else:
                self._heard.put_nowait(frame)
        self.closed.set()
        self._over.set()

    async def hear(self) -> Any:
        return await asyncio.wait_for(self._heard.get(), PATIENCE_S)

    async def say(self, *frames: VerifierFrame | FeedResponseFrame) -> None:
        for frame in frames:
            await self._call.write(self._encode(frame))

    async def say_raw(self, message: Any) -> None:
        await self._call.write(message)

    def end(self, refusal: Refusal | None = None) -> None:
        self._refusal = refusal
        self._over.set()


class Servicer(pb2_grpc.VerifierServiceServicer):
    def __init__(self) -> None:
        self.speculates: asyncio.Queue[Stream] = asyncio.Queue()
        self.feeds: asyncio.Queue[Stream] = asyncio.Queue()

    async def Speculate(self, request_iterator: Any, context: Any) -> None:
        stream = Stream(context, drafter_frame, verifier_frame_pb, request_iterator)
        self.speculates.put_nowait(stream)
        await stream.serve()

    async def FeedContext(self, request_iterator: Any, context: Any) -> None:
        stream = Stream(context, feed_request, feed_response_pb, request_iterator)
        self.feeds.put_nowait(stream)
        await stream.serve()


class Verifier:
    """A server that can be stopped and started on one port."""

    def __init__(self) -> None:
        self.servicer = Servicer()
        self.port = 0

    async def start(self) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        pb2_grpc.add_VerifierServiceServicer_to_server(self.servicer, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def met(self) -> tuple[Stream, Hello]:
        """The next stream, and the hello on it."""
        stream = await asyncio.wait_for(self.servicer.speculates.get(), PATIENCE_S)
        hello = await stream.hear()
        assert isinstance(hello, Hello)
        return stream, hello

    async def welcomed(self) -> tuple[Stream, Stream]:
        """The next stream, welcomed, and its FeedContext behind attach and first credit."""
        speculate, _ = await self.met()
        await speculate.say(WELCOME)
        feed = await asyncio.wait_for(self.servicer.feeds.get(), PATIENCE_S)
        assert [await feed.hear(), await feed.hear()] == [FeedAttach(b"stream"), Credit(FEED_CREDIT_BYTES)]
        return speculate, feed


class Drafter:
    """Engine on its thread, and links."""

    def __init__(self) -> None:
        model = FormulaModel()
        hello = Hello(1, 1, "drafter-1", "run", model.fingerprint)
        self.crashes: list[BaseException] = []
        self.engine = DraftEngine(model, hello, now_us)
        self._thread: DeviceThread[Command, Event] = DeviceThread(
            lambda: self.engine, lambda events: self.links.deliver(events), self.crashes.append, now_us
        )
        self.links = Links(asyncio.get_running_loop(), self._thread.post)
        self._thread.start()
        self._running: asyncio.Task[None] | None = None

    def dial(
        self, *verifiers: Verifier, times: LinkTimes = CALM, tamper: Tamper | None = None
    ) -> list[VerifierLink]:
        links = [
            VerifierLink(
                verifier.address,
                self.links,
                Backoff(1, 20, random.Random(1)),
                clock_us=now_us,
                times=times,
                tamper=tamper,
            )
            for verifier in verifiers
        ]
        self._running = asyncio.create_task(self.links.run(links))
        return links

    async def ended(self) -> None:
        """The links have ended by themselves."""
        assert self._running is not None
        await asyncio.wait_for(self._running, PATIENCE_S)

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
        assert self._thread.stop(PATIENCE_S)
        assert self.crashes == []


def now_us() -> int:
    return time.monotonic_ns() // 1000


@pytest.fixture
async def verifier() -> AsyncIterator[Verifier]:
    verifier = Verifier()
    await verifier.start()
    yield verifier
    await verifier.stop()


@pytest.fixture
async def drafter() -> AsyncIterator[Drafter]:
    drafter = Drafter()
    yield drafter
    await drafter.stop()


async def join(speculate: Stream, session_id: str = "s", handle: int = 1) -> None:
    await speculate.say(Invite(session_id, b"token"))
    assert await speculate.hear() == Join(session_id, b"token")
    await speculate.say(Joined(session_id, handle, 0))


async def test_a_session_is_drafted_from_hello_to_the_second_block(
    drafter: Drafter, verifier: Verifier
) -> None:
    (link,) = drafter.dial(verifier)
    speculate, feed = await verifier.welcomed()
    assert (link.status.state, link.status.verifier_id) == (LinkState.CONNECTED, "verifier-1")
    await join(speculate)
    await speculate.say(TURN)
    await feed.say(Context(1, 0, (1, 2)), Context(1, 2, (3,)))
    first = await speculate.hear()
    assert isinstance(first, Blocks)
    (block,) = first.entries
    assert (block.handle, block.base_len, len(block.token_ids)) == (1, 3, 4)
    await speculate.say(Verdicts((Verdict(1, 0, 3, 3, 4, 4, 5, 2),)))
    second = await speculate.hear()
    assert [(b.base_len, len(b.token_ids)) for b in second.entries] == [(8, 2)]
    assert drafter.engine.totals.sessions_by_link == {link.link_id: 1}


async def test_a_ping_is_answered_on_both_streams(drafter: Drafter, verifier: Verifier) -> None:
    drafter.dial(verifier)
    speculate, feed = await verifier.welcomed()
    for stream in (speculate, feed):
        await stream.say(Ping(77))
        assert await stream.hear() == Pong(77)


async def test_credit_comes_back_as_context_is_taken(drafter: Drafter, verifier: Verifier) -> None:
    drafter.dial(verifier)
    speculate, feed = await verifier.welcomed()
    await join(speculate)
    await speculate.say(TURN)
    frames = [Context(1, 0, (1, 2)), Context(1, 2, (3,))]
    await feed.say(*frames)
    returned, sent = 0, sum(feed_response_pb(frame).ByteSize() for frame in frames)
    while returned < sent:
        credit = await feed.hear()
        assert isinstance(credit, Credit)
        returned += credit.add_bytes
    assert returned == sent


async def test_a_refusal_names_the_fields_is_logged_once_and_is_tried_again(
    drafter: Drafter, verifier: Verifier
) -> None:
    refusal = Refusal(Reason.FINGERPRINT_MISMATCH, "vocab_size: 8 here, 9 there")
    with structlog.testing.capture_logs() as lines:
        (link,) = drafter.dial(verifier)
        for _ in range(3):
            speculate, _ = await verifier.met()
            speculate.end(refusal)
        speculate, _ = await verifier.met()
    assert (link.status.state, link.status.message) == (LinkState.REFUSED, refusal.message)
    assert [(line["event"], line["reason"]) for line in lines] == [
        ("refused by a verifier; asking again now and then", refusal.message)
    ]
    await speculate.say(WELCOME)
    await asyncio.wait_for(verifier.servicer.feeds.get(), PATIENCE_S)
    assert link.status.state is LinkState.CONNECTED


async def test_a_verifier_that_is_not_there_yet_is_dialled_until_it_is(drafter: Drafter) -> None:
    verifier = Verifier()
    await verifier.start()
    await verifier.stop()  # the port is known now, and closed
    (link,) = drafter.dial(verifier)
    await verifier.start()
    await verifier.welcomed()
    assert link.status.state is LinkState.CONNECTED
    await verifier.stop()


async def test_a_lost_verifier_is_dialled_again_and_the_session_brings_its_ids(
    drafter: Drafter, verifier: Verifier
) -> None:
    (link,) = drafter.dial(verifier)
    speculate, feed = await verifier.welcomed()
    await join(speculate)
    await speculate.say(TURN)
    await feed.say(Context(1, 0, (1, 2, 3)))
    await speculate.hear()
    await verifier.stop()
    await verifier.start()
    speculate, _ = await verifier.welcomed()
    assert link.status.state is LinkState.CONNECTED
    await speculate.say(Invite("s", b"again"))
    again = await speculate.hear()
    assert (again.tokens_held, len(again.held_hash)) == (3, 16)


@pytest.mark.parametrize("silent", ["speculate", "feed"])
async def test_a_silent_stream_is_a_lost_verifier(drafter: Drafter, verifier: Verifier, silent: str) -> None:
    (link,) = drafter.dial(verifier, times=QUICK)
    speculate, feed = await verifier.welcomed()
    (speculate if silent == "speculate" else feed).mute = True
    await verifier.met()
    assert (link.status.state, link.status.message) == (LinkState.CONNECTING, "silent for 0.2 s")


async def test_a_stall_of_this_process_is_no_silence_of_the_verifier(
    drafter: Drafter, verifier: Verifier
) -> None:
    drafter.dial(verifier, times=QUICK)
    speculate, _ = await verifier.welcomed()
    time.sleep(2 * QUICK.silence_limit_s)  # noqa: ASYNC251  the stall
    for sequence in range(3):
        await speculate.say(Ping(sequence))
        assert await speculate.hear() == Pong(sequence)
        await asyncio.sleep(QUICK.ping_every_s)  # for the next look at what was heard
    assert verifier.servicer.speculates.empty()


async def test_a_channel_that_does_not_close_holds_up_no_new_attempt(
    drafter: Drafter, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier_link, "PARTING_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(type(grpc.aio.insecure_channel("")), "close", lambda channel: asyncio.Event().wait())
        (link,) = drafter.dial(verifier)
        speculate, _ = await verifier.welcomed()
        speculate.end()
        await verifier.met()
    assert (link.status.state, link.status.message) == (
        LinkState.CONNECTING,
        "the verifier closed the stream",
    )


async def broken() -> None:
    raise Refusal(Reason.SILENT, "silent")


async def test_a_part_that_does_not_end_does_not_hide_that_another_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await released.wait()
        await released.wait()

    released = asyncio.Event()
    monkeypatch.setattr(verifier_link, "PARTING_S", 0.01)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(Refusal, match="silent"):
            await _until_one_fails(stubborn(), broken())
    released.set()


async def test_a_part_that_was_cancelled_has_failed_and_one_that_returned_has_not() -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(Refusal, match="cancelled"):
            await _until_one_fails(asyncio.sleep(0), asyncio.Event().wait(), cancelled())
        with pytest.raises(Refusal, match="silent"):
            await _until_one_fails(asyncio.sleep(0), asyncio.Event().wait(), broken())


async def test_a_verifier_that_never_welcomes_is_given_up(drafter: Drafter, verifier: Verifier) -> None:
    (link,) = drafter.dial(verifier, times=QUICK)
    await verifier.met()
    await verifier.met()
    assert (link.status.state, link.status.message) == (LinkState.CONNECTING, "no welcome within 0.3 s")


async def test_a_verifier_that_closes_the_stream_is_dialled_again(
    drafter: Drafter, verifier: Verifier
) -> None:
    (link,) = drafter.dial(verifier)
    speculate, _ = await verifier.welcomed()
    speculate.end()
    await verifier.met()
    assert (link.status.state, link.status.message) == (
        LinkState.CONNECTING,
        "the verifier closed the stream",
    )


HOSTILE = {
    "an empty message": pb2.SpeculateResponse(),
    "columns of unequal length": pb2.SpeculateResponse(verdicts=pb2.Verdicts(handles=[1, 2], rounds=[0])),
    "a second welcome": verifier_frame_pb(WELCOME),
    "a join that nobody asked for": verifier_frame_pb(Joined("nobody", 1, 0)),
}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_frame_that_breaks_the_stream_ends_the_link_and_not_the_drafter(
    drafter: Drafter, verifier: Verifier, message: pb2.SpeculateResponse
) -> None:
    (link,) = drafter.dial(verifier)
    speculate, _ = await verifier.welcomed()
    await speculate.say_raw(message)
    await verifier.welcomed()
    assert link.status.state is LinkState.CONNECTED


async def test_a_verifier_that_lies_about_a_session_is_told_to_leave_it(
    drafter: Drafter, verifier: Verifier
) -> None:
    drafter.dial(verifier)
    speculate, feed = await verifier.welcomed()
    await join(speculate)
    await join(speculate, "other", 2)
    await speculate.say(TURN, Verdicts((Verdict(1, 0, 99, 0, 0, 0, 1, 4),)))
    assert await speculate.hear() == Leave(1, Reason.PROTOCOL_VIOLATION)
    await speculate.say(TurnStarted(2, "turn", 1, Sampling(), 1, 50, 1, (), 4))
    await feed.say(Context(2, 0, (1,)))
    assert isinstance(await speculate.hear(), Blocks)


async def test_two_verifiers_are_served_at_once(drafter: Drafter, verifier: Verifier) -> None:
    second = Verifier()
    await second.start()
    try:
        drafter.dial(verifier, second)
        for each in (verifier, second):
            speculate, feed = await each.welcomed()
            await join(speculate)
            await speculate.say(TURN)
            await feed.say(Context(1, 0, (1, 2, 3)))
            assert isinstance(await speculate.hear(), Blocks)
    finally:
        await second.stop()


async def test_a_verifier_that_drains_is_said_so(drafter: Drafter, verifier: Verifier) -> None:
    (link,) = drafter.dial(verifier)
    speculate, _ = await verifier.welcomed()
    await speculate.say(Drain(700), Ping(5))
    assert await speculate.hear() == Pong(5)
    assert link.status.message == "the verifier ends within 700 ms"


async def test_a_drain_leaves_every_session_and_closes_cleanly(drafter: Drafter, verifier: Verifier) -> None:
    drafter.dial(verifier)
    speculate, _ = await verifier.welcomed()
    await join(speculate)
    await speculate.say(Ping(1))
    assert await speculate.hear() == Pong(1)
    await drafter.links.drain()
    assert await speculate.hear() == Leave(1, Reason.DRAINING)
    await asyncio.wait_for(speculate.closed.wait(), PATIENCE_S)
    await drafter.ended()


async def test_what_is_tampered_with_is_what_is_sent(drafter: Drafter, verifier: Verifier) -> None:
    def twice(blocks: Sequence[Any]) -> list[Any]:
        return [*blocks, *blocks]

    drafter.dial(verifier, tamper=twice)
    speculate, feed = await verifier.welcomed()
    await join(speculate)
    await speculate.say(TURN)
    await feed.say(Context(1, 0, (1, 2, 3)))
    frame: DrafterFrame = await speculate.hear()
    assert isinstance(frame, Blocks)
    assert len(frame.entries) == 2


def test_the_wait_doubles_to_its_limit_with_jitter_and_begins_anew() -> None:
    backoff = Backoff(100, 1000, random.Random(1))
    waits = [backoff.next_ms() for _ in range(6)]
    for wait, ceiling in zip(waits, (100, 200, 400, 800, 1000, 1000), strict=True):
        assert ceiling / 2 <= wait <= ceiling
    backoff.reset()
    assert backoff.next_ms() <= 100
