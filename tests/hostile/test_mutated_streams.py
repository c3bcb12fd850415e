"""The two streams of a drafter under thousands of spoilt frames: sent by strangers, and by one who truly is a member.

What is bad ends a membership or its own stream. The turns that a hostile member drafts for give the tokens of plain decoding.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest

from sparkrelay.errors import STATUS_OF, refusal_of
from sparkrelay.frames import (
    Block,
    Blocks,
    Invite,
    Join,
    Joined,
    Left,
    Ping,
    Pong,
    TurnStarted,
    Verdicts,
    Welcome,
)
from sparkrelay.outcomes import Reason
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.wire import drafter_frame_pb, verifier_frame
from tests.hostile.house import House, house
from tests.hostile.mutations import mutated
from tests.hostile.recorded import feed_frames, hello, recorded
from tests.verifier_service.servicer_rig import request, token_ids

COUNT = 10_000 if os.environ.get("SPARKRELAY_FULL") == "1" else 1_000
pytestmark = pytest.mark.timeout(900 if COUNT == 10_000 else 120)
SEED = 4_112_026
WAIT_S = 20.0
GOOD_BEGINNINGS = 0.9
SERVICE = "/sparkrelay.v1.VerifierService/"
OURS = {Reason.INVALID_FIELD, Reason.PROTOCOL_VIOLATION, Reason.PROTOCOL_VERSION, Reason.TOO_LARGE,
        Reason.FINGERPRINT_MISMATCH, Reason.SUPERSEDED, Reason.SLOW}  # fmt: skip

# What gRPC's Python client says of a stream that the server ended during a write: the status is lost to it.
CUT_WHILE_WRITING = ("Internal error from Core", "Locally cancelled by application!")


class RawStream:
    """One stream of bytes. What the verifier says is handed to `hear`; how it ended is noted."""

    def __init__(self, channel: grpc.aio.Channel, name: str, hear: Callable[[bytes], None]) -> None:
        self.outcome = "OK"
        self._call: Any = channel.stream_stream(SERVICE + name)()
        self._reading = asyncio.create_task(self._read(hear))

    async def send(self, data: bytes) -> bool:
        """False: the stream is over."""
        if self._reading.done():
            return False
        try:
            await self._call.write(data)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return False
        return True

    async def end(self, *, cleanly: bool) -> str:
        """Closes it, or breaks it; the reason of the status that it ended with."""
        if cleanly and not self._reading.done():
            try:
                await self._call.done_writing()
                async with asyncio.timeout(WAIT_S):
                    await asyncio.shield(self._reading)
            except asyncio.InvalidStateError:
                pass
        self._call.cancel()
        await self._reading
        return self.outcome

    async def _read(self, hear: Callable[[bytes], None]) -> None:
        try:
            while (data := await self._call.read()) is not grpc.aio.EOF:
                hear(data)
        except grpc.aio.AioRpcError as error:
            self.outcome = outcome_of(error)
        except asyncio.CancelledError:
            self.outcome = "left"


def outcome_of(error: grpc.aio.AioRpcError) -> str:
    """How the verifier ended the stream; one of the ways in which it may."""
    if error.details() in CUT_WHILE_WRITING:
        return "cut while writing"
    refusal = refusal_of(error)
    assert refusal.reason in OURS and STATUS_OF[refusal.reason] is error.code(), error
    return refusal.reason.name


class Member:
    """A drafter that joins whatever it is invited to, and knows where a true block would have to begin."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.stream_id = b""
        self.welcomed = asyncio.Event()
        self.to_say: list[bytes] = []
        self._base: dict[int, int] = {}

    def hear(self, data: bytes) -> None:
        frame = verifier_frame(pb2.SpeculateResponse.FromString(data))
        self.seen[type(frame).__name__] += 1
        match frame:
            case Welcome():
                self.stream_id = frame.stream_id
                self.welcomed.set()
            case Invite(session_id, token):
                self._say(Join(session_id, token))
            case Joined():
                self._base[frame.handle] = 0
            case TurnStarted():
                self._base[frame.handle] = frame.base_len
            case Verdicts(entries):
                for each in entries:
                    self._base[each.handle] = each.base_len + each.accepted_count + (each.next_token_id >= 0)
                    self.seen["used"] += each.block_base_len > 0
            case Ping(sequence):
                self._say(Pong(sequence))
            case Left():
                self.seen[frame.reason.name] += 1
                self._base.pop(frame.handle, None)

    def block(self, random: Random) -> bytes:
        """A good block for one of its sessions, if it has any."""
        handle, base_len = random.choice([*self._base.items()] or [(1, 5)])
        ids = tuple(random.randrange(64) for _ in range(random.randint(1, 6)))
        return _bytes(Blocks((Block(handle, 0, base_len, ids, b"\xff" * len(ids)),)))

    def _say(self, frame: Any) -> None:
        self.to_say.append(_bytes(frame))


def _bytes(frame: Any) -> bytes:
    return drafter_frame_pb(frame).SerializeToString()


async def test_spoilt_frames_on_speculate_harm_no_other_session() -> None:
    random, seen, outcomes = Random(SEED), Counter[str](), Counter[str]()
    async with house() as made, grpc.aio.insecure_channel(made.verifier.address) as channel:
        spoilt = mutated(recorded("s")["VerifierService.Speculate"], SEED)
        over = asyncio.Event()
        async with made.undisturbed():
            turns = asyncio.create_task(turns_for("mutant", made, over))
            sent = 0
            while sent < COUNT:
                member = Member()
                stream = RawStream(channel, "Speculate", member.hear)
                sent += await speculate(stream, member, spoilt, random, COUNT - sent)
                outcomes[await stream.end(cleanly=random.random() < 0.5)] += 1
                seen += member.seen
            over.set()
            async with asyncio.timeout(WAIT_S):
                assert await turns > 0
        await made.quiet()
    print(f"Speculate: {sent} frames, {dict(outcomes)}, heard {dict(seen)}")
    assert seen["Joined"] > 0 and seen["used"] > 0, "it was a member, and was believed"
    assert seen["PROTOCOL_VIOLATION"] > 0, "and was thrown out"
    assert outcomes.total() > 20, "what ends a stream ends no more than it"


async def speculate(
    stream: RawStream, member: Member, spoilt: Iterator[bytes], random: Random, limit: int
) -> int:
    """Sends until the stream ends, now and then with a good block between the bad ones; how many were sent."""
    sent = 0
    if random.random() < GOOD_BEGINNINGS:
        await stream.send(hello())
        async with asyncio.timeout(WAIT_S):
            await member.welcomed.wait()
    for _ in range(min(limit, random.randint(1, 60))):
        answers, member.to_say = member.to_say, []
        good = member.block(random)
        bad = next(mutated([good], random.getrandbits(32))) if random.random() < 0.5 else next(spoilt)
        for data in (*answers, bad, good):
            if not await stream.send(data):
                return sent
        sent += 1
        await asyncio.sleep(0)
    return sent


async def turns_for(drafter_id: str, made: House, over: asyncio.Event) -> int:
    """Turns that name the hostile drafter; their tokens are those of plain decoding. Returns how many there were."""
    (plain,) = {tuple(token_ids(await made.verifier.generate(a_turn("plain", ())))) for _ in range(1)}
    count = 0
    while not over.is_set() or not count:
        turn = await made.verifier.generate(a_turn(f"m{count}", (drafter_id,)))
        assert tuple(token_ids(turn)) == plain, "a hostile drafter changed the text"
        count += 1
    return count


def a_turn(name: str, drafters: tuple[str, ...]) -> Any:
    return request(f"turn-{name}", session=f"session-{name}", max_tokens=60, drafters=drafters)


async def test_spoilt_frames_on_feed_context_harm_no_other_session() -> None:
    random, outcomes = Random(SEED), Counter[str]()
    async with house() as made, grpc.aio.insecure_channel(made.verifier.address) as channel:
        async with made.undisturbed():
            sent = 0
            while sent < COUNT:
                member = Member()
                speculate = RawStream(channel, "Speculate", member.hear)
                await speculate.send(hello())
                async with asyncio.timeout(WAIT_S):
                    await member.welcomed.wait()
                frames = feed_frames(member.stream_id)
                spoilt = mutated(frames, random.getrandbits(32))
                feed = RawStream(channel, "FeedContext", lambda data: None)
                if random.random() < GOOD_BEGINNINGS:
                    await feed.send(frames[0])
                for _ in range(min(COUNT - sent, 40)):
                    if not await feed.send(next(spoilt)):
                        break
                    sent += 1
                    await asyncio.sleep(0)
                outcomes[await feed.end(cleanly=False)] += 1
                await speculate.end(cleanly=False)
        await made.quiet()
    print(f"FeedContext: {sent} frames, {dict(outcomes)}")
    assert outcomes.total() > outcomes["left"] >= 0, "some were ended by the verifier"
