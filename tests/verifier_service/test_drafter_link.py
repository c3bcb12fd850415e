"""One drafter's link without a network: what is said in which order, what is measured, and what is bounded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

from sparkrelay.frames import (
    Block,
    Blocks,
    Fingerprint,
    Hello,
    Invite,
    Join,
    Joined,
    Ping,
    Pong,
    TurnEnded,
    TurnStarted,
    Verdict,
)
from sparkrelay.outcomes import FinishReason, Reason
from sparkrelay.protocol import Greeted, JoinAsked, RefuseJoin
from sparkrelay.sampling import Sampling
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.wire import drafter_frame_pb
from verifier_service.drafters import Drafter
from verifier_service.events import BlockArrived
from verifier_service.servicer.drafter_link import DrafterLink, LinkSettings
from verifier_service.servicer.speculate import _read

SETTINGS = LinkSettings(Fingerprint(), "verifier", "epoch", vocab_size=64, frame_limit_bytes=1 << 22)


class Owner:
    """Notes what the link asks of the hub."""

    def __init__(self) -> None:
        self.drafter = Drafter("d1")
        self.joins: list[str] = []
        self.refused: list[tuple[str, Reason]] = []
        self.blocks: list[BlockArrived] = []

    def welcomed(self, link: DrafterLink, greeted: Greeted) -> Drafter:
        return self.drafter

    def join_asked(self, link: DrafterLink, decision: JoinAsked) -> None:
        self.joins.append(decision.join.session_id)

    def join_refused(self, link: DrafterLink, decision: RefuseJoin) -> None:
        self.refused.append((decision.session_id, decision.reason))

    def member_gone(self, member_id: int, reason: Reason, *, may_return: bool = False) -> None:
        raise AssertionError(reason)

    def blocks_arrived(self, blocks: Iterable[BlockArrived]) -> None:
        self.blocks += blocks


class Link:
    """A link with one welcomed drafter, and its clock."""

    def __init__(self, settings: LinkSettings = SETTINGS) -> None:
        self.now_s = 100.0
        self.owner = Owner()
        self.link = DrafterLink(1, b"stream", self.owner, settings, lambda: self.now_s)
        self.link.hear(Hello(1, 1, "d1", "run", Fingerprint(block_size=7)))

    def member(self) -> None:
        """Session s is joined as member 1."""
        self.link.say(Invite("s", b"token"))
        self.link.hear(Join("s", b"token"))
        self.link.joined(Joined("s", 1, 0))

    def start(self, turn_id: str, base_len: int) -> None:
        self.link.say(TurnStarted(1, turn_id, base_len, Sampling(), 1, 50, base_len, (), 4))
        self.link.flush()

    def verdict(self, base_len: int, draft_budget: int = 4) -> None:
        """A round that commits one token."""
        self.link.judge(Verdict(1, 0, base_len, 0, 0, 0, 7, draft_budget))
        self.link.flush()

    def end(self, turn_id: str) -> None:
        self.link.say(TurnEnded(1, turn_id, FinishReason.STOP))

    def block(self, base_len: int) -> None:
        self.link.hear(Blocks((Block(1, 0, base_len, (9, 9), b"\xff\xff"),)))

    def answer_pings(self) -> None:
        for frame in list(self.link.outbox):
            if isinstance(frame, Ping):
                self.link.hear(Pong(frame.sequence))


async def test_the_time_from_a_verdict_to_a_block_is_the_turnaround() -> None:
    made = Link()
    made.member()
    made.start("t1", 3)
    made.verdict(3)
    made.now_s += 0.005
    made.block(4)
    assert abs(made.owner.drafter.turnaround_us - 5000) <= 1


async def test_an_idle_session_is_no_slow_drafter() -> None:
    made = Link()
    made.member()
    made.start("t1", 3)
    made.verdict(3)  # the turn is cancelled before its next block
    made.end("t1")
    made.now_s += 3 * 3600
    made.start("t2", 9)
    made.answer_pings()
    made.block(9)
    assert len(made.owner.blocks) == 1 and made.owner.drafter.turnaround_us == 0
    made.verdict(9)
    made.now_s += 0.002
    made.block(10)
    assert 1999 <= made.owner.drafter.turnaround_us <= 2001


async def test_the_last_verdict_of_a_turn_asks_for_no_block_and_starts_no_measurement() -> None:
    made = Link()
    made.member()
    made.start("t1", 3)
    made.verdict(3, draft_budget=0)
    made.end("t1")
    made.now_s += 1.0
    made.start("t2", 9)
    made.answer_pings()
    made.block(9)
    assert len(made.owner.blocks) == 1 and made.owner.drafter.turnaround_us == 0


async def test_the_fence_of_a_turn_goes_out_before_the_next_turn_starts() -> None:
    made = Link()
    made.member()
    made.start("t1", 3)
    made.link.judge(Verdict(1, 0, 3, 0, 0, 0, 7, 0))
    made.end("t1")
    made.start("t2", 9)  # in the same step
    kinds = [type(frame) for frame in made.link.outbox]
    ping = next(index for index, frame in enumerate(made.link.outbox) if isinstance(frame, Ping))
    assert kinds.index(TurnEnded) < ping < len(kinds) - 1 and kinds[-1] is TurnStarted
    made.answer_pings()  # the drafter answers in order: the pong first, then its block
    made.block(9)
    assert [block.base_len for block in made.owner.blocks] == [9]


async def test_pings_that_nobody_reads_the_answers_of_end_the_link() -> None:
    made = Link(replace(SETTINGS, outbox_limit=20))
    for sequence in range(20):
        made.link.hear_feed(Ping(sequence))
    assert not made.link.ended
    made.link.hear_feed(Ping(20))
    assert made.link.ended and made.link.refusal is not None and made.link.refusal.reason is Reason.SLOW


async def test_a_refused_join_is_told_to_the_hub() -> None:
    made = Link()
    made.link.hear(Join("s", b"guess"))
    assert made.owner.refused == [("s", Reason.JOIN_REFUSED)] and made.owner.joins == []
    full = Link(replace(SETTINGS, session_limit=0))
    full.link.say(Invite("s", b"token"))
    full.link.hear(Join("s", b"token"))
    assert full.owner.refused == [("s", Reason.OVERLOADED)]


async def test_what_comes_on_a_stream_that_has_ended_is_not_heard() -> None:
    made = Link()
    made.link.say(Invite("s", b"token"))

    async def requests() -> AsyncIterator[pb2.SpeculateRequest]:
        made.link.close()
        yield drafter_frame_pb(Join("s", b"token"))

    await _read(made.link, requests())
    assert made.owner.joins == []
