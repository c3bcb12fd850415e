"""The two streams of a drafter: bytes to frames, frames to bytes, and who waits for whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc.aio

from sparkrelay.errors import abort
from sparkrelay.frames import FeedAttach
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.protocol import RemoteProtocolError
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.wire import (
    Unreadable,
    drafter_frame,
    feed_request,
    feed_response_pb,
    readable,
    verifier_frame_pb,
)
from verifier_service.servicer.drafter_link import DrafterLink
from verifier_service.servicer.hub import Hub

Context = grpc.aio.ServicerContext[Any, Any]

LAST_WRITE_S = 0.5  # for a peer that does not read: then the stream is cut off without a word


async def speculate(
    hub: Hub, requests: AsyncIterator[pb2.SpeculateRequest], context: Context, tick_s: float
) -> None:
    """One Speculate stream, from hello to its end. tick_s: how often pings and silence are looked at."""
    link = hub.open_link()
    reason, message = Reason.UNSPECIFIED, "the drafter's stream broke"
    try:
        await _first_of(link, _write(link, context), _read(link, requests), _tick(link, tick_s))
        message = "the drafter closed its stream"
        if link.refusal is not None:
            reason, message = link.refusal.reason, link.refusal.message
    except RemoteProtocolError as error:
        link.close(error)
        reason, message = error.reason, error.message
        hub.refuse_link(link, error)
    finally:
        # Also when this handler is cancelled: the drafter is gone, its sessions must not wait for it.
        hub.close_link(link, reason, message)
    if link.refusal is not None:
        await abort(context, link.refusal)


async def feed_context(hub: Hub, requests: AsyncIterator[pb2.FeedContextRequest], context: Context) -> None:
    """One FeedContext stream. It lives as long as its Speculate stream."""
    try:
        link = await _attached(hub, requests)
    except Refusal as refusal:
        await abort(context, refusal)
    try:
        await _first_of(link, _write_feed(link, context), _read_feed(link, requests))
    except Refusal as refusal:
        link.close(refusal)
    finally:
        link.close(Refusal(Reason.PROTOCOL_VIOLATION, "FeedContext ended before Speculate"))
    if link.refusal is not None:
        await abort(context, link.refusal)


# ---- Speculate --------------------------------------------------------------------------------------------------------------


async def _read(link: DrafterLink, requests: AsyncIterator[pb2.SpeculateRequest]) -> None:
    async for request in requests:
        if link.ended:
            return  # this drafter is known by another stream already, or by none
        try:
            frame = drafter_frame(readable(request))
        except Refusal as refusal:
            _unreadable(link, request, refusal)
            continue
        link.hear(frame)


def _unreadable(link: DrafterLink, request: pb2.SpeculateRequest | Unreadable, refusal: Refusal) -> None:
    if link.hello is None:
        raise RemoteProtocolError(refusal.reason, refusal.message, violations=refusal.violations)
    named = () if isinstance(request, Unreadable) else request.blocks.handles
    link.hear_malformed(named, refusal)


async def _write(link: DrafterLink, context: Context) -> None:
    while True:
        await link.wake.wait()
        link.wake.clear()
        frames, link.outbox = link.outbox, []
        for frame in frames:
            await context.write(verifier_frame_pb(frame))
        if link.ended:
            return


async def _tick(link: DrafterLink, tick_s: float) -> None:
    while not link.ended:
        await asyncio.sleep(tick_s)
        link.tick()


# ---- FeedContext ------------------------------------------------------------------------------------------------------------


async def _attached(hub: Hub, requests: AsyncIterator[pb2.FeedContextRequest]) -> DrafterLink:
    async for request in requests:
        frame = feed_request(readable(request))
        link = hub.link_of_stream(frame.stream_id) if isinstance(frame, FeedAttach) else None
        if link is None or link.ended or link.feed_attached:
            message = "the first frame must be attach with the stream_id of a welcome, once"
            raise Refusal(Reason.PROTOCOL_VIOLATION, message)
        link.attach_feed()
        return link
    raise Refusal(Reason.PROTOCOL_VIOLATION, "the stream ended before attach")


async def _read_feed(link: DrafterLink, requests: AsyncIterator[pb2.FeedContextRequest]) -> None:
    async for request in requests:
        frame = feed_request(readable(request))
        if isinstance(frame, FeedAttach):
            raise Refusal(Reason.PROTOCOL_VIOLATION, "attach came twice")
        link.hear_feed(frame)
    await link.over.wait()  # a half-closed stream still takes context


async def _write_feed(link: DrafterLink, context: Context) -> None:
    while not link.ended:
        await link.feed_wake.wait()
        link.feed_wake.clear()
        while not link.ended:
            if link.feed_outbox:
                await context.write(feed_response_pb(link.feed_outbox.popleft()))
            elif (head := link.feed.head()) is not None:
                message = feed_response_pb(head)
                if not link.feed.take(message.ByteSize()):
                    break
                link.side.send(head)
                await context.write(message)
            elif link.feed.ping_wanted:
                link.ping_feed()
            else:
                break


# ---- tasks ------------------------------------------------------------------------------------------------------------------


async def _first_of(
    link: DrafterLink, writer: Coroutine[Any, Any, None], *others: Coroutine[Any, Any, None]
) -> None:
    """Runs all until the first one ends, then ends the others. Raises what the first one raised.

    A write under way is let end first: gRPC takes no status from us, and the peer gets none, while one is in the air.
    """
    writing = asyncio.ensure_future(writer)
    tasks = [writing, *map(asyncio.ensure_future, others)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = task.exception()
            if error is None or isinstance(error, Refusal):
                link.close(error)  # tells the writer to end
        await asyncio.wait([writing], timeout=LAST_WRITE_S)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
