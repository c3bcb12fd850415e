"""One drafter's two streams without their I/O: frames in, commands for the engine and frames out."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any, Protocol

from sparkrelay.frames import (
    Block,
    Context,
    DrafterFrame,
    Fingerprint,
    Hello,
    Joined,
    Left,
    Ping,
    Pong,
    Rewound,
    TurnEnded,
    TurnStarted,
    Verdict,
    Verdicts,
    VerifierFrame,
    Welcome,
)
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.protocol import (
    BLOCK_LIMIT,
    PING_EVERY_S,
    SESSION_LIMIT,
    SILENCE_LIMIT_S,
    AnswerPong,
    BlocksAccepted,
    EndMembership,
    Greeted,
    Ignored,
    InviteDeclined,
    JoinAsked,
    Keepalive,
    MemberLeft,
    PongReceived,
    RefuseJoin,
    VerifierSide,
)
from sparkrelay.protocol.verifier_side import Stream
from verifier_service.context_feed import ContextFeed
from verifier_service.drafters import Drafter
from verifier_service.events import BlockArrived
from verifier_service.servicer.verdict_frames import verdict_frames

MERGED_ENTRIES = 1024  # verdicts of one frame
OUTBOX_LIMIT = 1024  # frames that may wait for a drafter that does not read
NEVER_S = float("-inf")
CONFIDENCES = tuple(step / 255 for step in range(256))


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What a verifier says of itself in a welcome, and its limits. vocab_size: drafted ids must be below it."""

    fingerprint: Fingerprint
    verifier_id: str
    epoch: str
    vocab_size: int
    frame_limit_bytes: int
    session_limit: int = SESSION_LIMIT
    block_limit: int = BLOCK_LIMIT
    outbox_limit: int = OUTBOX_LIMIT
    ping_every_s: float = PING_EVERY_S
    silence_limit_s: float = SILENCE_LIMIT_S


class LinkOwner(Protocol):
    """What a link asks of the hub."""

    def welcomed(self, link: DrafterLink, greeted: Greeted) -> Drafter: ...
    def join_asked(self, link: DrafterLink, decision: JoinAsked) -> None: ...
    def join_refused(self, link: DrafterLink, decision: RefuseJoin) -> None: ...
    def invite_declined(self, link: DrafterLink, decision: InviteDeclined) -> None: ...
    def member_gone(self, member_id: int, reason: Reason, *, may_return: bool = False) -> None: ...
    def blocks_arrived(self, blocks: Iterable[BlockArrived]) -> None: ...


class DrafterLink:
    """Lives on the event loop. `wake` is set when `outbox` has something or the link is to end, `feed_wake` likewise.

    refusal  why the link ends, once it does
    """

    def __init__(
        self,
        link_id: int,
        stream_id: bytes,
        owner: LinkOwner,
        settings: LinkSettings,
        now_s: Callable[[], float],
    ) -> None:
        self.link_id = link_id
        self.stream_id = stream_id
        self.side = VerifierSide(
            settings.fingerprint, block_limit=settings.block_limit, session_limit=settings.session_limit
        )
        self.feed = ContextFeed()
        self.outbox: list[VerifierFrame] = []
        self.feed_outbox: deque[Ping | Pong] = deque()
        self.wake = asyncio.Event()
        self.feed_wake = asyncio.Event()
        self.over = asyncio.Event()
        self.refusal: Refusal | None = None
        self.feed_attached = False
        self.hello: Hello | None = None
        self.ignored_count = 0
        self._owner = owner
        self._settings = settings
        self._now_s = now_s
        self._drafter: Drafter | None = None
        self._keepalive = self._new_keepalive()
        self._feed_keepalive = self._new_keepalive()
        self._ticked_s = now_s()
        self._verdicts: list[Verdict] = []  # of the engine's step under way
        self._judged: set[int] = set()  # handles in _verdicts
        self._after: list[VerifierFrame] = []  # about them, to be said after the verdicts
        self._judged_at_s = NEVER_S  # when verdicts that ask for blocks went out, until the first block
        self._act: dict[type, Callable[[Any], None]] = {
            Greeted: self._greet,
            JoinAsked: lambda decision: self._owner.join_asked(self, decision),
            RefuseJoin: self._refuse_join,
            BlocksAccepted: self._blocks_accepted,
            MemberLeft: self._member_left,
            InviteDeclined: lambda decision: self._owner.invite_declined(self, decision),
            EndMembership: self._end_membership,
            Ignored: self._ignore,
            AnswerPong: lambda decision: self.say(Pong(decision.sequence)),
            PongReceived: self._pong_received,
        }

    @property
    def ended(self) -> bool:
        return self.over.is_set()

    @property
    def invitable(self) -> bool:
        """Welcomed, and not draining."""
        return self.side.state is Stream.OPEN

    # ---- from the drafter -----------------------------------------------------------------------------------------------------

    def hear(self, frame: DrafterFrame) -> None:
        """A frame on Speculate. Raises RemoteProtocolError if the stream must end."""
        self._keepalive.heard(self._now_s())
        if isinstance(frame, Hello):
            self.hello = frame
        for decision in self.side.receive(frame):
            self._act[type(decision)](decision)
        self.flush()

    def hear_malformed(self, handles: Iterable[int], refusal: Refusal) -> None:
        """A frame that cannot be read: it ends the memberships that it names, nothing else."""
        self._keepalive.heard(self._now_s())
        self.ignored_count += 1
        for handle in set(handles):
            if self.side.member(handle) is not None:
                self._end_membership(
                    self.side.end_membership(handle, Reason.PROTOCOL_VIOLATION, refusal.message)
                )

    def hear_feed(self, frame: object) -> None:
        """Credit, Ping or Pong on FeedContext."""
        now_s = self._now_s()
        self._feed_keepalive.heard(now_s)
        if isinstance(frame, Ping):
            self._say_on_feed(Pong(frame.sequence))
        elif isinstance(frame, Pong):
            self._feed_keepalive.pong(frame.sequence, now_s)
            self.feed.ponged(frame.sequence)
        else:
            self.feed.grant(frame.add_bytes)  # type: ignore[attr-defined]  # Credit: FeedAttach was handled before
        self.feed_wake.set()

    def attach_feed(self) -> None:
        self.feed_attached = True
        self._feed_keepalive = self._new_keepalive()
        self.feed_wake.set()

    def _greet(self, greeted: Greeted) -> None:
        settings = self._settings
        welcome = Welcome(
            protocol_version=greeted.version,
            verifier_id=settings.verifier_id,
            epoch=settings.epoch,
            stream_id=self.stream_id,
            session_limit=settings.session_limit,
            block_limit=settings.block_limit,
            frame_limit_bytes=settings.frame_limit_bytes,
        )
        self.say(welcome)
        self._drafter = self._owner.welcomed(self, greeted)
        self.side.invites = self._drafter.invites

    def _blocks_accepted(self, decision: BlocksAccepted) -> None:
        drafter, now_s = self._drafter, self._now_s()
        assert drafter is not None
        received_us = int(now_s * 1e6)
        member_of, vocab_size = self.side.member, self._settings.vocab_size
        confidence = CONFIDENCES.__getitem__
        arrived: list[BlockArrived] = []
        for block in decision.entries:
            ids, member = block.token_ids, member_of(block.handle)
            if member is None:
                continue  # a later entry of the same frame ended it
            if ids and (min(ids) < 0 or max(ids) >= vocab_size):
                self._end_for_bad_ids(block)
                continue
            drafter.drafted_count += len(ids)
            arrived.append(
                BlockArrived(
                    block.handle,
                    block.base_len,
                    ids,
                    tuple(map(confidence, block.confidences)),
                    block.draft_us,
                    block.queue_us,
                    received_us,
                    member.turn_id,
                )
            )
        if arrived:
            measured_s = now_s - self._judged_at_s
            if measured_s < self._settings.silence_limit_s:  # longer: the sessions were idle
                drafter.turnaround_us = _smoothed(drafter.turnaround_us, int(measured_s * 1e6))
            self._judged_at_s = NEVER_S
            self._owner.blocks_arrived(arrived)

    def _end_for_bad_ids(self, block: Block) -> None:
        message = f"a drafted id is outside of the vocabulary, 0 to {self._settings.vocab_size - 1}"
        self._end_membership(self.side.end_membership(block.handle, Reason.INVALID_TOKEN, message))

    def _refuse_join(self, decision: RefuseJoin) -> None:
        self.say(Left(0, decision.session_id, decision.reason, decision.message))
        self._owner.join_refused(self, decision)

    def _member_left(self, decision: MemberLeft) -> None:
        self.feed.forget(decision.handle)
        self._owner.member_gone(decision.handle, decision.reason)

    def _end_membership(self, decision: EndMembership) -> None:
        self.feed.forget(decision.handle)
        self.say(Left(decision.handle, "", decision.reason, decision.message))
        self._owner.member_gone(decision.handle, decision.reason)

    def _pong_received(self, decision: PongReceived) -> None:
        self._keepalive.pong(decision.sequence, self._now_s())
        if self._drafter is not None and self._keepalive.round_trip_s is not None:
            self._drafter.round_trip_us = int(self._keepalive.round_trip_s * 1e6)

    def _ignore(self, decision: Ignored) -> None:
        self.ignored_count += 1

    # ---- from the engine ------------------------------------------------------------------------------------------------------

    def say(self, frame: VerifierFrame) -> None:
        """Queues a frame. One about a session whose verdict is waiting is said after the verdict."""
        if isinstance(frame, TurnEnded | Rewound | TurnStarted | Left) and frame.handle in self._judged:
            self._after.append(frame)
            return
        if self.side.ping_wanted and isinstance(frame, TurnStarted):
            # The fence of the turn before it: a block of this turn that came before the pong would count as a late one.
            self.say(self._keepalive.ping(self._now_s()))
        self.side.send(frame)
        self._queue(frame)

    def judge(self, verdict: Verdict) -> None:
        """A verdict of the engine's step: all of a step travel in one frame, at `flush`."""
        if verdict.handle in self._judged:
            self.flush()
        self._judged.add(verdict.handle)
        self._verdicts.append(verdict)

    def joined(self, frame: Joined) -> None:
        self.say(frame)

    def owe(self, context: Context) -> None:
        """Ids that a member lacks."""
        if not self.feed.push(context):
            self.end_member(context.handle, Reason.SLOW, "too much context is waiting for this drafter")
        self.feed_wake.set()

    def rewind(self, frame: Rewound) -> None:
        """Context that is still on its way would be taken for the ids after the cut: then the member has to join
        again instead."""
        member = self.side.member(frame.handle)
        if (member is not None and member.owed) or self.feed.on_its_way(frame.handle):
            message = "the session was cut while its context was on the way: join again"
            self.end_member(frame.handle, Reason.SLOW, message, may_return=True)
        else:
            self.say(frame)

    def end_member(self, handle: int, reason: Reason, message: str, *, may_return: bool = False) -> None:
        """Ends a membership for a reason of ours."""
        self.flush()
        if self.side.member(handle) is None:
            return
        self.feed.forget(handle)
        self.say(Left(handle, "", reason, message))
        self._owner.member_gone(handle, reason, may_return=may_return)

    def removed(self, handle: int, session_id: str, reason: Reason, message: str) -> None:
        """The engine ended a membership, or refused a join."""
        self.feed.forget(handle)
        known = self.side.member(handle) is not None
        self.say(Left(handle, "", reason, message) if known else Left(0, session_id, reason, message))

    def flush(self) -> None:
        """The step is over: its verdicts go out in one frame, then what had to wait for them."""
        if self._verdicts:
            verdicts, self._verdicts = self._verdicts, []
            after, self._after = self._after, []
            self._judged.clear()
            for frame in verdict_frames(verdicts):
                self.side.send(frame)
                self._queue(frame)
            for each in after:
                self.say(each)
            if self._drafter is not None:
                self._drafter.verified_count += sum([verdict.depth for verdict in verdicts])
                self._drafter.accepted_count += sum([verdict.accepted_count for verdict in verdicts])
            if any(verdict.draft_budget for verdict in verdicts):
                self._judged_at_s = self._now_s()
        if self.side.ping_wanted:
            self.say(self._keepalive.ping(self._now_s()))

    def _queue(self, frame: VerifierFrame) -> None:
        last = self.outbox[-1] if self.outbox else None
        if isinstance(frame, Verdicts) and isinstance(last, Verdicts) and frame.entries[0].rows is None:
            entries = last.entries + frame.entries  # the drafter is behind: steps that wait travel together
            if len(entries) <= MERGED_ENTRIES:
                self.outbox[-1] = Verdicts(entries)
                return
        self.outbox.append(frame)
        self.wake.set()
        self._bound(self.outbox)

    def _bound(self, outbox: Sized) -> None:
        if len(outbox) > self._settings.outbox_limit:
            self.close(Refusal(Reason.SLOW, f"{len(outbox) - 1} frames wait, the limit; dial again"))

    # ---- the life of the streams ----------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """To be called about every ping interval: pings, and ends a link whose peer is silent."""
        now_s = self._now_s()
        late = now_s - self._ticked_s > 2 * self._settings.ping_every_s
        self._ticked_s = now_s
        if late:  # we were stalled ourselves: what the peer said meanwhile is still waiting to be read
            self._keepalive.heard(now_s)
            self._feed_keepalive.heard(now_s)
        if self._keepalive.silent(now_s) or (self.feed_attached and self._feed_keepalive.silent(now_s)):
            self.close(Refusal(Reason.SILENT, f"silent for {self._settings.silence_limit_s:g} s; dial again"))
            return
        if self._drafter is not None and (ping := self._keepalive.tick(now_s)) is not None:
            self.say(ping)
        if self.feed_attached and (ping := self._feed_keepalive.tick(now_s)) is not None:
            self.ping_feed(ping)

    def ping_feed(self, ping: Ping | None = None) -> None:
        """Pings on FeedContext, now or with a ping that was due."""
        frame = ping or self._feed_keepalive.ping(self._now_s())
        self.feed.pinged(frame.sequence)
        self._say_on_feed(frame)

    def _say_on_feed(self, frame: Ping | Pong) -> None:
        self.feed_outbox.append(frame)
        self.feed_wake.set()
        self._bound(self.feed_outbox)

    def close(self, refusal: Refusal | None = None) -> None:
        """Ends both streams: with a status that tells why, or cleanly."""
        if not self.ended:
            self.refusal = refusal
            self.over.set()
        self.wake.set()
        self.feed_wake.set()

    def _new_keepalive(self) -> Keepalive:
        settings = self._settings
        return Keepalive(
            self._now_s(), ping_every_s=settings.ping_every_s, silence_limit_s=settings.silence_limit_s
        )


def _smoothed(before: int, measured: int) -> int:
    return measured if not before else (3 * before + measured) // 4
