"""All sessions of one link: the conversation's rules (`sparkrelay.protocol.DrafterSide`) tied to the sessions they are about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from drafter_service.session import DraftSession, SessionViolation
from sparkrelay.frames import (
    Blocks,
    Context,
    DrafterFrame,
    Drain,
    Hello,
    Invite,
    Join,
    Joined,
    Leave,
    Left,
    Pong,
    Rewound,
    TurnEnded,
    TurnStarted,
    Verdict,
    VerifierFrame,
    Welcome,
)
from sparkrelay.outcomes import Reason
from sparkrelay.protocol import (
    AnswerPong,
    ContextArrived,
    DrafterDecision,
    DrafterSide,
    EndMembership,
    Ignored,
    Invited,
    JoinRefused,
    MemberJoined,
    MembershipOver,
    SessionRewound,
    SessionTurnEnded,
    SessionTurnStarted,
    VerdictsArrived,
    VerifierDraining,
    Welcomed,
    chain_hash,
)

TakeSession = Callable[[str], DraftSession | None]
"""session_id -> the session for a new membership, or None to decline."""
PutBack = Callable[[str, DraftSession, bool], None]
"""(session_id, session, whether to keep it): its membership is over."""


class Member:
    """A membership. ready_us: when the session last came to want a block."""

    __slots__ = ("handle", "link", "ready_us", "session", "session_id")

    def __init__(self, link: LinkSessions, handle: int, session_id: str, session: DraftSession) -> None:
        self.link = link
        self.handle = handle
        self.session_id = session_id
        self.session = session
        self.ready_us = 0


@dataclass(slots=True)
class Heard:
    """What follows from one frame.

    answers   to be sent, in order
    touched   memberships whose session may have come to want a block, or no longer wants one
    gone      memberships that are over
    given_up  (session_id, what was wrong) of memberships that were ended here
    """

    answers: list[DrafterFrame] = field(default_factory=list)
    touched: list[Member] = field(default_factory=list)
    gone: list[Member] = field(default_factory=list)
    given_up: list[tuple[str, str]] = field(default_factory=list)
    ignored_count: int = 0
    welcome: Welcome | None = None
    drain: Drain | None = None


class LinkSessions:
    """See the module. One thread calls it."""

    def __init__(self, take_session: TakeSession, put_back: PutBack) -> None:
        self._side = DrafterSide()
        self._take_session = take_session
        self._put_back = put_back
        self._session_limit = 0
        self._members: dict[int, Member] = {}
        self._joining: dict[str, DraftSession] = {}  # asked, not answered yet

    @property
    def members(self) -> list[Member]:
        return list(self._members.values())

    @property
    def session_count(self) -> int:
        return len(self._members)

    # ---- what we say -----------------------------------------------------------------------------------------------------------

    def hello(self, hello: Hello) -> Hello:
        self._side.send(hello)
        return hello

    def blocks(self, blocks: Blocks) -> Blocks:
        self._side.send(blocks)
        return blocks

    def leave_all(self) -> list[DrafterFrame]:
        """Gives up every session because this drafter ends."""
        leaves = [Leave(handle, Reason.DRAINING) for handle in self._members]
        for leave in leaves:
            self._side.send(leave)
        self.close()
        return list(leaves)

    def close(self) -> None:
        """No more frames: every membership is over."""
        for member in self._members.values():
            self._put_back(member.session_id, member.session, True)
        for session_id, session in self._joining.items():
            self._put_back(session_id, session, True)
        self._members.clear()
        self._joining.clear()

    # ---- what the verifier says ------------------------------------------------------------------------------------------------

    def hear(self, frame: VerifierFrame | Context) -> Heard:
        """Takes a frame of either stream. Raises RemoteProtocolError if the stream must be closed."""
        heard = Heard()
        for decision in self._side.receive(frame):
            if type(decision) is VerdictsArrived:
                self._commit(decision.entries, heard)
            else:
                self._obey(decision, heard)
        return heard

    def _commit(self, entries: Sequence[tuple[Verdict, tuple[int, ...]]], heard: Heard) -> None:
        """The hot path: one entry a session and round."""
        members, touched = self._members, heard.touched
        for verdict, token_ids in entries:
            member = members.get(verdict.handle)
            if member is None:
                continue
            try:
                member.session.committed(verdict, token_ids)
            except SessionViolation as violation:
                self._give_up(member, Reason.PROTOCOL_VIOLATION, str(violation), heard)
            else:
                touched.append(member)

    def _obey(self, decision: DrafterDecision, heard: Heard) -> None:
        match decision:
            case AnswerPong(sequence):
                heard.answers.append(Pong(sequence))
            case (
                SessionTurnStarted(frame)
                | ContextArrived(frame)
                | SessionRewound(frame)
                | SessionTurnEnded(frame)
            ):
                self._tell(frame, heard)
            case Invited(invite):
                self._answer_invite(invite, heard)
            case MemberJoined(joined):
                self._begin(joined, heard)
            case JoinRefused(left):
                self._join_refused(left)
            case MembershipOver(left):
                self._over(left, heard)
            case EndMembership(handle, _, reason, message):
                if (member := self._members.get(handle)) is not None:
                    self._give_up(member, reason, message, heard)
            case Welcomed(welcome):
                self._session_limit = welcome.session_limit
                heard.welcome = welcome
            case VerifierDraining(drain):
                heard.drain = drain
            case Ignored():
                heard.ignored_count += 1

    def _tell(self, frame: TurnStarted | Context | Rewound | TurnEnded, heard: Heard) -> None:
        member = self._members.get(frame.handle)
        if member is None:
            return
        session = member.session
        try:
            match frame:
                case Context():
                    session.context(frame)
                case TurnStarted():
                    session.turn_started(frame)
                case Rewound():
                    session.rewound(frame.length)
                case TurnEnded():
                    session.turn_ended()
        except SessionViolation as violation:
            self._give_up(member, Reason.PROTOCOL_VIOLATION, str(violation), heard)
        else:
            heard.touched.append(member)

    def _answer_invite(self, invite: Invite, heard: Heard) -> None:
        session_id = invite.session_id
        if session_id in self._joining:
            heard.ignored_count += 1
            return
        full = len(self._members) + len(self._joining) >= self._session_limit
        session = None if full else self._take_session(session_id)
        if session is None:
            # Said, not kept quiet: the verifier asks another drafter at once instead of waiting for this one.
            leave = Leave(0, Reason.DRAFTER_DECLINED, session_id)
            self._side.send(leave)
            heard.answers.append(leave)
            return
        self._joining[session_id] = session
        held_len = session.held_len
        join = Join(session_id, invite.token, held_len, chain_hash(session.ids[:held_len]))
        self._side.send(join)
        heard.answers.append(join)

    def _begin(self, joined: Joined, heard: Heard) -> None:
        session = self._joining.pop(joined.session_id, None)
        membership = self._side.member(joined.handle)
        if session is None or membership is None:
            return
        member = Member(self, joined.handle, joined.session_id, session)
        self._members[joined.handle] = member
        try:
            session.joined(membership, joined.keep_tokens)
        except SessionViolation as violation:
            self._give_up(member, Reason.PROTOCOL_VIOLATION, str(violation), heard)

    def _join_refused(self, left: Left) -> None:
        session = self._joining.pop(left.session_id, None)
        if session is not None:
            self._put_back(left.session_id, session, left.reason is not Reason.SESSION_ENDED)

    def _over(self, left: Left, heard: Heard) -> None:
        member = self._members.pop(left.handle, None)
        if member is not None:
            heard.gone.append(member)
            self._put_back(member.session_id, member.session, left.reason is not Reason.SESSION_ENDED)

    def _give_up(self, member: Member, reason: Reason, message: str, heard: Heard) -> None:
        """Ends a membership because of what the verifier said; its ids are not trusted any more."""
        del self._members[member.handle]
        leave = Leave(member.handle, reason)
        self._side.send(leave)
        heard.answers.append(leave)
        heard.gone.append(member)
        heard.given_up.append((member.session_id, message))
        self._put_back(member.session_id, member.session, False)
