"""Where the engine, the turns and the drafters meet: events are handed to whom they concern, decisions become
commands and frames."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import structlog

from sparkrelay.frames import Context, Invite, Joined, Rewound, TurnEnded, TurnStarted
from sparkrelay.outcomes import Reason, Refusal, field_refusal
from sparkrelay.protocol import Greeted, InviteDeclined, JoinAsked, RefuseJoin
from verifier_service.drafters import CloseLink, Drafter, Drafters, Effect, SendInvite
from verifier_service.events import (
    AddMember,
    BlockArrived,
    BlockDropped,
    CancelTurn,
    Command,
    Committed,
    DrafterUnavailable,
    EndSession,
    Event,
    ForkRefused,
    MemberAdded,
    MemberContext,
    MemberRemoved,
    MemberRewound,
    MemberTurnEnded,
    MemberTurnStarted,
    MemberVerdict,
    RemoveMember,
    SessionForked,
    StartTurn,
    TurnAccepted,
    TurnEvent,
    TurnOver,
    TurnRefused,
)
from verifier_service.servicer.drafter_link import DrafterLink, LinkSettings
from verifier_service.servicer.forks import PendingForks
from verifier_service.servicer.turn_output import TurnOutput
from verifier_service.servicer.validation import NOISE_VERSION

log = structlog.get_logger(__name__)

SECRET_BYTES = 16
STEPS_AHEAD = 2  # steps whose events may wait for the event loop
LOOP_LAG_S = 1.0  # the longest that the engine waits for a loop that does not come: it may be at its end


class Hub:
    """Lives on the event loop; only `deliver` may be called from another thread.

    post     hands commands to the engine, together
    crashed  called once if an event cannot be handled: a bug, the process must end
    """

    def __init__(
        self,
        link_settings: LinkSettings,
        *,
        post: Callable[[Sequence[Command]], object],
        crashed: Callable[[BaseException], None],
        now_s: Callable[[], float],
        new_secret: Callable[[], bytes] = lambda: os.urandom(SECRET_BYTES),
    ) -> None:
        self.drafters = Drafters(new_secret)
        self.turns: dict[str, TurnOutput] = {}
        self._ending: set[str] = set()  # turns that were cancelled and whose end the engine has not told
        self.idle = asyncio.Event()  # no turn is under way
        self.idle.set()
        self._link_settings = link_settings
        self._post = post
        self._crashed = crashed
        self._now_s = now_s
        self._new_secret = new_secret
        self._loop = asyncio.get_running_loop()
        self.forks = PendingForks(self._loop, post)
        self._room = threading.Semaphore(STEPS_AHEAD)
        self._links: dict[int, DrafterLink] = {}
        self._link_of: dict[int, DrafterLink] = {}  # member id -> its link
        self._watchers: set[asyncio.Event] = set()
        self._last_link_id = 0
        self._handlers: dict[type, Callable[[Any], None]] = {
            **dict.fromkeys((TurnAccepted, TurnOver, TurnRefused), self._turn_event),
            **dict.fromkeys((SessionForked, ForkRefused), self.forks.answer),
            MemberAdded: self._member_added,
            MemberRemoved: self._member_removed,
            MemberTurnStarted: self._member_turn_started,
            MemberRewound: self._member_rewound,
            MemberContext: self._member_context,
            MemberTurnEnded: self._member_turn_ended,
            BlockDropped: lambda event: None,  # the round reports count them
        }

    # ---- from the engine ------------------------------------------------------------------------------------------------------

    def deliver(self, events: Sequence[Event]) -> None:
        """What one step did; on the device thread. Waits while the event loop is too many steps behind.

        Without it an engine whose steps are shorter than their handling would starve the loop, and the backlog would grow.
        """
        has_room = self._room.acquire(timeout=LOOP_LAG_S)
        self._loop.call_soon_threadsafe(self._handle_delivered, events, has_room)

    def _handle_delivered(self, events: Sequence[Event], has_room: bool) -> None:
        try:
            self.handle(events)
        finally:
            if has_room:
                self._room.release()

    def handle(self, events: Sequence[Event]) -> None:
        """What one step did; on the event loop."""
        try:
            self._dispatch(events)
        except Exception as crash:
            log.exception("an event of the engine cannot be handled")
            self._crashed(crash)

    def _dispatch(self, events: Sequence[Event]) -> None:
        turns, link_of, turn_count = self.turns, self._link_of, len(self.turns)
        for event in events:
            kind = type(event)
            if kind is MemberVerdict:
                link = link_of.get(event.handle)  # type: ignore[union-attr]
                if link is not None:
                    link.judge(event)  # type: ignore[arg-type]
            elif kind is Committed:
                turn = turns.get(event.turn_id)  # type: ignore[union-attr]
                if turn is not None:
                    turn.add(event, turn_count)  # type: ignore[arg-type]
            else:
                self._handlers[kind](event)
        for each in self._links.values():
            each.flush()

    def _turn_event(self, event: TurnEvent) -> None:
        if not isinstance(event, TurnAccepted):
            self._ending.discard(event.turn_id)
        turn = self.turns.get(event.turn_id)
        if turn is not None:
            turn.add(event, len(self.turns))

    def _member_added(self, event: MemberAdded) -> None:
        link = self._link_of.get(event.member_id)
        if link is not None:
            self.drafters.joined(event.member_id)
            link.joined(Joined(event.session_id, event.member_id, event.keep_tokens))

    def _member_removed(self, event: MemberRemoved) -> None:
        link = self._link_of.pop(event.member_id, None)
        if link is not None:
            link.removed(event.member_id, event.session_id, event.reason, event.message)
            self._apply(self.drafters.end(event.member_id, event.reason))

    def _member_turn_started(self, event: MemberTurnStarted) -> None:
        link = self._link_of.get(event.member_id)
        if link is not None:
            turn = self.turns.get(event.turn_id)
            link.say(
                TurnStarted(
                    handle=event.member_id,
                    turn_id=event.turn_id,
                    base_len=event.base_len,
                    sampling=event.sampling,
                    noise_version=NOISE_VERSION,
                    remaining_count=event.remaining_count,
                    output_start=event.output_start,
                    stop_token_ids=tuple(sorted(event.stop_ids)),
                    draft_budget=event.draft_budget,
                    traceparent=turn.trace if turn is not None else b"",
                )
            )

    def _member_rewound(self, event: MemberRewound) -> None:
        link = self._link_of.get(event.member_id)
        if link is not None:
            link.rewind(Rewound(event.member_id, event.length))

    def _member_context(self, event: MemberContext) -> None:
        link = self._link_of.get(event.member_id)
        if link is not None:
            link.owe(Context(event.member_id, event.start, event.token_ids, event.rows_start, event.rows))

    def _member_turn_ended(self, event: MemberTurnEnded) -> None:
        link = self._link_of.get(event.member_id)
        if link is not None:
            link.say(TurnEnded(event.member_id, event.turn_id, event.finish_reason))

    # ---- turns ----------------------------------------------------------------------------------------------------------------

    def open_turn(self, command: StartTurn, drafter_ids: tuple[str, ...], output: TurnOutput) -> None:
        """Starts a turn and invites a drafter for it. Raises Refusal(SESSION_BUSY) if a turn of this id runs, or still ends."""
        if command.turn_id in self.turns or command.turn_id in self._ending:
            message = f"{command.turn_id} is under way already; wait for its end, or use another id"
            raise field_refusal("turn_id", message, Reason.SESSION_BUSY)
        self.turns[command.turn_id] = output
        self.idle.clear()
        invited, effects = self.drafters.want(command.session_id, command.turn_id, drafter_ids)
        self._post((replace(command, expect_drafter=True) if invited else command,))
        self._apply(effects)

    def close_turn(self, command: StartTurn) -> None:
        """The caller has all it will get: what still runs is cancelled."""
        output = self.turns.pop(command.turn_id)
        if not self.turns:
            self.idle.set()
        output.close()
        self.drafters.turn_over(command.session_id, command.turn_id)
        if not output.over:
            self._cancel(command.turn_id)

    def _cancel(self, turn_id: str) -> None:
        """What the engine still says of it, and blocks drafted for it, must not be taken for those of a turn of the same id."""
        self._ending.add(turn_id)
        self._post((CancelTurn(turn_id),))

    def fail_turns(self, refusal: Refusal) -> None:
        """Ends all turns, and forks that are asked for, for the same reason."""
        self.forks.fail(refusal)
        for turn_id, output in self.turns.items():
            if not output.over:
                output.fail(Refusal(refusal.reason, refusal.message))
                self._cancel(turn_id)

    def end_session(self, session_id: str) -> None:
        self.drafters.session_over(session_id)
        self._post((EndSession(session_id),))

    # ---- who watches ----------------------------------------------------------------------------------------------------------

    def watch(self) -> asyncio.Event:
        """An event that is set when drafters come or go, or the drain begins. Give it back to `unwatch`."""
        event = asyncio.Event()
        self._watchers.add(event)
        return event

    def unwatch(self, event: asyncio.Event) -> None:
        self._watchers.discard(event)

    def announce(self) -> None:
        for event in self._watchers:
            event.set()

    # ---- drafters -------------------------------------------------------------------------------------------------------------

    def open_link(self) -> DrafterLink:
        """A drafter dials: a link that waits for its hello."""
        self._last_link_id += 1
        link = DrafterLink(self._last_link_id, self._new_secret(), self, self._link_settings, self._now_s)
        self._links[link.link_id] = link
        return link

    def link_of_stream(self, stream_id: bytes) -> DrafterLink | None:
        return next((link for link in self._links.values() if link.stream_id == stream_id), None)

    def close_link(self, link: DrafterLink, reason: Reason, message: str) -> None:
        """Its stream is over, for this reason."""
        link.close()
        if self._links.pop(link.link_id, None) is None:
            return
        self._lost(link.link_id, reason, message)

    def refuse_link(self, link: DrafterLink, refusal: Refusal) -> None:
        """Its hello was refused: remembered, so that people see why nobody drafts."""
        if link.hello is not None:
            self.drafters.refuse(link.hello, refusal.reason, refusal.message)
            drafter_id, reason = link.hello.drafter_id, refusal.reason.name
            log.warning("drafter refused", drafter_id=drafter_id, reason=reason, message=refusal.message)
            self.announce()

    def links(self) -> Iterable[DrafterLink]:
        return list(self._links.values())

    def welcomed(self, link: DrafterLink, greeted: Greeted) -> Drafter:
        effects = self.drafters.connect(link.link_id, greeted.hello, greeted.block_size)
        self._forget_members_of_lost_links()
        log.info(
            "drafter connected",
            drafter_id=greeted.hello.drafter_id,
            kind=greeted.hello.fingerprint.proposal_kind,
        )
        self.announce()
        # After the welcome has been queued and the link knows its drafter.
        self._loop.call_soon(self._apply, effects)
        return self._drafter_of(link)

    def join_asked(self, link: DrafterLink, decision: JoinAsked) -> None:
        join, drafter = decision.join, self._drafter_of(link)
        member = self.drafters.join(link.link_id, join.session_id)
        self._link_of[member.member_id] = link
        self._post(
            (
                AddMember(
                    session_id=join.session_id,
                    member_id=member.member_id,
                    drafter_id=member.drafter_id,
                    tokens_held=join.tokens_held,
                    held_hash=join.held_hash,
                    block_size=drafter.block_size,
                    reads_rows=drafter.reads_rows,
                ),
            )
        )

    def join_refused(self, link: DrafterLink, decision: RefuseJoin) -> None:
        """A drafter asked for a session and may not have it."""
        self._apply(self.drafters.join_refused(link.link_id, decision.session_id, decision.reason))

    def invite_declined(self, link: DrafterLink, decision: InviteDeclined) -> None:
        """A drafter does not want the session: the next one is asked."""
        self._apply(self.drafters.declined(link.link_id, decision.session_id))

    def member_gone(self, member_id: int, reason: Reason, *, may_return: bool = False) -> None:
        """A membership ended on the link's side."""
        self._link_of.pop(member_id, None)
        self._post((RemoveMember(member_id),))
        self._apply(self.drafters.end(member_id, reason, may_return=may_return))

    def blocks_arrived(self, blocks: Iterable[BlockArrived]) -> None:
        self._post(tuple(blocks))

    def _drafter_of(self, link: DrafterLink) -> Drafter:
        drafter = self.drafters.linked(link.link_id)
        assert drafter is not None
        return drafter

    def _lost(self, link_id: int, reason: Reason, message: str) -> None:
        drafter = self.drafters.linked(link_id)
        if drafter is None:
            return
        log.warning("drafter lost", drafter_id=drafter.drafter_id, reason=reason.name, message=message)
        effects = self.drafters.lose(link_id, reason, message)
        self._forget_members_of_lost_links()
        self._apply(effects)
        self.announce()

    def _forget_members_of_lost_links(self) -> None:
        for member_id in [each for each in self._link_of if self.drafters.member(each) is None]:
            del self._link_of[member_id]

    def _apply(self, effects: Iterable[Effect]) -> None:
        commands: list[Command] = []
        for effect in effects:
            match effect:
                case RemoveMember() | DrafterUnavailable():
                    commands.append(effect)
                case SendInvite():
                    self._invite(effect)
                case CloseLink(link_id):
                    if (link := self._links.get(link_id)) is not None:
                        link.close(Refusal(Reason.SUPERSEDED, "this drafter connected again"))
        if commands:
            self._post(tuple(commands))

    def _invite(self, effect: SendInvite) -> None:
        link, turn = self._links.get(effect.link_id), self.turns.get(effect.turn_id)
        if link is not None and not link.ended and link.invitable:
            link.say(Invite(effect.session_id, effect.token, turn.trace if turn is not None else b""))
