"""One verifier's address, dialled for ever: streams on one side, the engine's commands and events on the other.

A `VerifierLink` makes one `_Conversation` after another. A conversation pumps frames and knows four things of its own:
pings, silence, credit, and how streams end. What the frames mean is decided in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
import structlog

from drafter_service.backoff import Backoff
from drafter_service.events import FrameArrived, LinkLost, LinkOpened
from drafter_service.links import Links, LinkState, LinkStatus
from drafter_service.models import Tamper
from sparkrelay.errors import refusal_of
from sparkrelay.frames import (
    Blocks,
    Context,
    Credit,
    DrafterFrame,
    FeedAttach,
    FeedRequestFrame,
    Ping,
    Pong,
    Welcome,
)
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.protocol import PING_EVERY_S, SILENCE_LIMIT_S, Keepalive
from sparkrelay.security import PLAINTEXT, Dialling, explain_handshake
from sparkrelay.server import CHANNEL_OPTIONS
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.v1 import verifier_service_pb2_grpc
from sparkrelay.wire import drafter_frame_pb, feed_request_pb, feed_response, verifier_frame

log = structlog.get_logger(__name__)

_SpeculateCall: TypeAlias = grpc.aio.StreamStreamCall[pb2.SpeculateRequest, pb2.SpeculateResponse]
_FeedCall: TypeAlias = grpc.aio.StreamStreamCall[pb2.FeedContextRequest, pb2.FeedContextResponse]

FEED_CREDIT_BYTES = 4 * 2**20
"""Context that may be under way to this drafter's engine, a link."""

PARTING_S = 1.0
"""What the end of a conversation may take before it is left to itself: a lost verifier must be known as lost."""

CUT_WHILE_WRITING = "Internal error from Core"
"""What gRPC's Python client says of a stream that the server ended during a write: the status is lost to it."""

# Refusals that stand until somebody changes a setting: no need to knock often.
LASTING = frozenset(
    (
        Reason.FINGERPRINT_MISMATCH,
        Reason.PROTOCOL_VERSION,
        Reason.PROTOCOL_VIOLATION,
        Reason.UNAUTHENTICATED,
        Reason.INVALID_FIELD,
        Reason.NOT_IMPLEMENTED,
    )
)


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """welcome_s: from dialling to the welcome; the others are those of the protocol."""

    welcome_s: float = 5.0
    ping_every_s: float = PING_EVERY_S
    silence_limit_s: float = SILENCE_LIMIT_S


class VerifierLink:
    """See the module.

    tamper  rewrites blocks before they are sent; None for every honest kind
    """

    def __init__(
        self,
        address: str,
        links: Links,
        backoff: Backoff,
        *,
        clock_us: Callable[[], int],
        times: LinkTimes | None = None,
        tamper: Tamper | None = None,
        dialling: Dialling = PLAINTEXT,
    ) -> None:
        self.status = LinkStatus(address, LinkState.CONNECTING)
        self.link_id = 0
        self._links = links
        self._backoff = backoff
        self._clock_us = clock_us
        self._times = times if times is not None else LinkTimes()
        self._tamper = tamper
        self._dialling = dialling

    async def run(self) -> None:
        """Dials, talks, and dials again; returns only once the drafter drains."""
        while True:
            conversation = _Conversation(
                self.status.address,
                self._links,
                self._clock_us,
                self._times,
                self._tamper,
                self._dialling,
            )
            self.link_id = conversation.link_id
            conversation.on_welcome = self._welcomed
            conversation.on_drain = self._verifier_drains
            why = await conversation.run()
            if self._links.draining:
                return
            if conversation.lasted_s * 1000 > self._backoff.max_ms:
                self._backoff.reset()
            wait_ms = self._backoff.next_ms()
            if why.reason in LASTING:
                wait_ms = self._backoff.max_ms
                self._report(LinkState.REFUSED, why.message)
            else:
                self._report(LinkState.CONNECTING, why.message)
            await asyncio.sleep(wait_ms / 1000)

    def _welcomed(self, welcome: Welcome) -> None:
        self._report(LinkState.CONNECTED, "", welcome.verifier_id)

    def _verifier_drains(self, deadline_ms: int) -> None:
        self._report(
            LinkState.CONNECTED, f"the verifier ends within {deadline_ms} ms", self.status.verifier_id
        )

    def _report(self, state: LinkState, message: str, verifier_id: str = "") -> None:
        """Changes the status; a line in the log for a change, not for every attempt."""
        before = self.status
        self.status = replace(before, state=state, message=message, verifier_id=verifier_id)
        told = state is LinkState.CONNECTING and before.message != ""
        if self.status == before or (before.state is state and told):
            return  # why it cannot be reached may change from attempt to attempt: the status says so, the log need not
        say = log.info if state is LinkState.CONNECTED else log.warning
        say(_SAYINGS[state], verifier=before.address, verifier_id=verifier_id, reason=message)


_SAYINGS = {
    LinkState.CONNECTING: "no verifier; dialling again",
    LinkState.CONNECTED: "connected to a verifier",
    LinkState.REFUSED: "refused by a verifier; asking again now and then",
}


class _Conversation:
    """One Speculate stream and its FeedContext, from dialling to the end."""

    def __init__(
        self,
        address: str,
        links: Links,
        clock_us: Callable[[], int],
        times: LinkTimes,
        tamper: Tamper | None,
        dialling: Dialling,
    ) -> None:
        self.on_welcome: Callable[[Welcome], None] = lambda welcome: None
        self.on_drain: Callable[[int], None] = lambda deadline_ms: None
        self.link_id = links.add(self)
        self.lasted_s = 0.0
        self._address = address
        self._links = links
        self._clock_us = clock_us
        self._times = times
        self._tamper = tamper
        self._dialling = dialling
        self._outbox: asyncio.Queue[DrafterFrame | Refusal | None] = (
            asyncio.Queue()
        )  # None: nothing more will be said
        self._feed_outbox: asyncio.Queue[FeedRequestFrame] = asyncio.Queue()
        self._welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._broken: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        self._context_sizes: deque[int] = (
            deque()
        )  # bytes of each context frame that the engine has not taken yet

    # ---- from the engine -------------------------------------------------------------------------------------------------------

    def send(self, frames: Sequence[DrafterFrame]) -> None:
        for frame in frames:
            if self._tamper is not None and isinstance(frame, Blocks):
                frame = Blocks(tuple(self._tamper(frame.entries)))
            self._outbox.put_nowait(frame)

    def welcomed(self, welcome: Welcome) -> None:
        if not self._welcome.done():
            self._welcome.set_result(welcome)
            self.on_welcome(welcome)

    def context_taken(self, frame_count: int) -> None:
        taken_bytes = sum(self._context_sizes.popleft() for _ in range(frame_count))
        self._feed_outbox.put_nowait(Credit(taken_bytes))

    def draining(self, deadline_ms: int) -> None:
        self.on_drain(deadline_ms)

    def close(self, why: Refusal | None) -> None:
        if why is None:
            self._outbox.put_nowait(None)
        elif not self._broken.done():
            self._broken.set_exception(why)

    # ---- streams ---------------------------------------------------------------------------------------------------------------

    async def run(self) -> Refusal:
        """Talks until it is over; returns why it is."""
        started_s = time.monotonic()
        link_id = self.link_id
        channel = self._dialling.channel(self._address, CHANNEL_OPTIONS)
        try:
            await self._talk(link_id, verifier_service_pb2_grpc.VerifierServiceStub(channel))
        except Refusal as refusal:
            return refusal
        except grpc.aio.AioRpcError as error:
            why, encrypted = refusal_of(error), self._dialling.certificates is not None
            why.message = explain_handshake(why.message, encrypted=encrypted) or why.message
            return why
        finally:
            self._links.post(LinkLost(link_id))
            self._links.remove(link_id)
            self.lasted_s = time.monotonic() - started_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PARTING_S):
                    await channel.close()

    async def _talk(self, link_id: int, stub: verifier_service_pb2_grpc.VerifierServiceAsyncStub) -> NoReturn:
        """Speculate, from hello to whatever ends it."""
        call = stub.Speculate(metadata=self._dialling.metadata)
        alive = self._keepalive()
        self._links.post(LinkOpened(link_id))
        await _until_one_fails(
            self._read(call, link_id, alive),
            self._write(call, self._outbox, drafter_frame_pb),
            self._after_welcome(stub, link_id, alive),
            self._broken,
        )

    async def _after_welcome(
        self, stub: verifier_service_pb2_grpc.VerifierServiceAsyncStub, link_id: int, alive: Keepalive
    ) -> NoReturn:
        """FeedContext, on credit: what the engine has not taken yet counts against it. And the pings of both streams."""
        try:
            async with asyncio.timeout(self._times.welcome_s):
                welcome = await self._welcome
        except TimeoutError:
            raise Refusal(Reason.SILENT, f"no welcome within {self._times.welcome_s:g} s") from None
        feed = stub.FeedContext(metadata=self._dialling.metadata)
        feed_alive = self._keepalive()
        self._feed_outbox.put_nowait(FeedAttach(welcome.stream_id))
        self._feed_outbox.put_nowait(Credit(FEED_CREDIT_BYTES))
        await _until_one_fails(
            self._read_feed(feed, link_id, feed_alive),
            self._write(feed, self._feed_outbox, feed_request_pb),
            self._beat(feed_alive, self._feed_outbox),
            self._beat(alive, self._outbox),
        )

    def _keepalive(self) -> Keepalive:
        times = self._times
        return Keepalive(
            time.monotonic(), ping_every_s=times.ping_every_s, silence_limit_s=times.silence_limit_s
        )

    async def _write(self, call: Any, outbox: asyncio.Queue[Any], encode: Callable[[Any], Any]) -> None:
        """Says what is in the outbox, until a None closes the stream cleanly."""
        try:
            while (frame := await outbox.get()) is not None:
                await call.write(encode(frame))
            await call.done_writing()
        except asyncio.InvalidStateError:
            await call.read()  # the stream is over: this raises what ended it
            raise Refusal(Reason.UNSPECIFIED, "the verifier closed the stream") from None

    async def _read(self, call: _SpeculateCall, link_id: int, alive: Keepalive) -> NoReturn:
        """Hands every frame to the engine as soon as it is here; pongs end here."""
        while isinstance(message := await call.read(), pb2.SpeculateResponse):
            frame = verifier_frame(message)
            now_s = time.monotonic()
            alive.heard(now_s)
            if isinstance(frame, Pong):
                alive.pong(frame.sequence, now_s)
            else:
                self._links.post(FrameArrived(link_id, frame, self._clock_us()))
        raise _end_of(message, "the stream")

    async def _read_feed(self, call: _FeedCall, link_id: int, alive: Keepalive) -> NoReturn:
        while isinstance(message := await call.read(), pb2.FeedContextResponse):
            frame = feed_response(message)
            now_s = time.monotonic()
            alive.heard(now_s)
            if isinstance(frame, Context):
                self._context_sizes.append(message.ByteSize())
                self._links.post(FrameArrived(link_id, frame, self._clock_us()))
            elif isinstance(frame, Ping):
                self._feed_outbox.put_nowait(Pong(frame.sequence))
            else:
                alive.pong(frame.sequence, now_s)
        raise _end_of(message, "FeedContext")

    async def _beat(self, alive: Keepalive, outbox: asyncio.Queue[Any]) -> NoReturn:
        """Pings one stream, and calls it lost when nothing has been heard for too long."""
        times = self._times
        while True:
            pinged_s = time.monotonic()
            outbox.put_nowait(alive.ping(pinged_s))
            await asyncio.sleep(times.ping_every_s)
            now_s = time.monotonic()
            if now_s - pinged_s > 2 * times.ping_every_s:
                alive.heard(now_s)  # we were stalled ourselves: what was said meanwhile is still to be read
            if alive.silent(now_s):
                raise Refusal(Reason.SILENT, f"silent for {times.silence_limit_s:g} s")


def _end_of(message: object, stream: str) -> Refusal:
    """Why a stream brings no more messages: its end, or (None) bytes that gRPC could not parse."""
    if message is grpc.aio.EOF:
        return Refusal(Reason.UNSPECIFIED, f"the verifier closed {stream}")
    return Refusal(
        Reason.PROTOCOL_VIOLATION, f"the verifier sent bytes on {stream} that are no message; update it"
    )


async def _until_one_fails(*parts: Awaitable[object]) -> NoReturn:
    """Runs all parts until one raises, ends the others, and raises what it raised. A part that returns ends nothing.

    A part that is cancelled (a read does that to itself when its call was cancelled) counts as failed. Not a TaskGroup: this
    caller's own cancelling must never be taken for, or lost behind, a stream that breaks meanwhile.
    """
    tasks = [asyncio.ensure_future(part) for part in parts]
    running = set(tasks)
    try:
        while running:
            _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    _raise_failure(task)
    finally:
        for task in tasks:
            task.cancel()
            task.add_done_callback(_look_at)
        await asyncio.wait(tasks, timeout=PARTING_S)
    raise AssertionError("reading a stream ends only by raising")


def _raise_failure(task: asyncio.Future[object]) -> None:
    if task.cancelled():
        raise Refusal(Reason.UNSPECIFIED, "the stream was cancelled")
    if (error := task.exception()) is not None:
        raise error


def _look_at(task: asyncio.Future[object]) -> None:
    """What a part raises after it was cancelled is of no interest; asyncio would log it as forgotten."""
    if not task.cancelled():
        task.exception()
