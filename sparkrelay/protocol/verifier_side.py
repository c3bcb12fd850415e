"""The verifier's side of one Speculate stream."""

from __future__ import annotations

import hmac
from collections.abc import Callable, MutableMapping
from enum import Enum

from sparkrelay.frames import (
    Block,
    Blocks,
    Context,
    DrafterFrame,
    Drain,
    Fingerprint,
    Hello,
    Invite,
    Join,
    Joined,
    Leave,
    Left,
    Ping,
    Pong,
    Rewound,
    TurnEnded,
    TurnStarted,
    Verdicts,
    VerifierFrame,
    Welcome,
)
from sparkrelay.outcomes import Reason
from sparkrelay.protocol.decisions import (
    AnswerPong,
    BlocksAccepted,
    EndMembership,
    Ignored,
    InviteDeclined,
    JoinAsked,
    LocalProtocolError,
    MemberLeft,
    PongReceived,
    RefuseJoin,
    RemoteProtocolError,
    VerifierDecision,
)
from sparkrelay.protocol.handshake import BLOCK_LIMIT, PROTOCOL_MAX, PROTOCOL_MIN, negotiate
from sparkrelay.protocol.membership import Broken, Membership, Phase

SESSION_LIMIT = 4096


class Stream(Enum):
    """Where a stream stands, seen from the verifier."""

    NEW = "no hello yet"
    GREETED = "hello came, no welcome yet"
    OPEN = "welcomed"
    DRAINING = "drain announced"


_ANY = frozenset((Stream.OPEN, Stream.DRAINING))

# frame we send -> the states in which we may
SENDS: dict[type, frozenset[Stream]] = {
    Welcome: frozenset((Stream.GREETED,)),
    Invite: frozenset((Stream.OPEN,)),
    Drain: frozenset((Stream.OPEN,)),
    **dict.fromkeys((Joined, TurnStarted, Rewound, Verdicts, TurnEnded, Left, Ping, Pong, Context), _ANY),
}
# frame the drafter sends -> the states in which it may
RECEIVES: dict[type, frozenset[Stream]] = {
    Hello: frozenset((Stream.NEW,)),
    **dict.fromkeys((Join, Blocks, Leave, Ping, Pong), _ANY),
}


class VerifierSide:
    """`receive` what the drafter says, `send` before telling it anything. Not thread-safe; keeps no clock and does no I/O.

    invites  session id -> token that proves its invitation. Given from outside: it outlives this stream, so that a drafter may
             return after a lost one; who owns it withdraws invitations by deleting them

    Handles are chosen by the caller and must grow.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        *,
        versions: tuple[int, int] = (PROTOCOL_MIN, PROTOCOL_MAX),
        block_limit: int = BLOCK_LIMIT,
        session_limit: int = SESSION_LIMIT,
        invites: MutableMapping[str, bytes] | None = None,
    ) -> None:
        self.state = Stream.NEW
        self.invites: MutableMapping[str, bytes] = {} if invites is None else invites
        self._fingerprint = fingerprint
        self._versions = versions
        self._block_limit = block_limit
        self._session_limit = session_limit
        self._members: dict[int, Membership] = {}
        self._handles: dict[str, int] = {}
        self._joining: set[str] = set()
        self._last_handle = 0
        self._ping_sent = 0
        self._pong_seen = 0
        self._fence = 0  # sequence that the next ping must have for all fences to be covered
        self._receive: dict[type, Callable[..., list[VerifierDecision]]] = {
            Hello: self._hello,
            Join: self._join,
            Blocks: self._blocks,
            Leave: self._leave,
            Ping: lambda frame: [AnswerPong(frame.sequence)],
            Pong: self._pong,
        }
        self._send: dict[type, Callable[..., None]] = {
            Welcome: self._welcome,
            Invite: self._invite,
            Joined: self._joined,
            TurnStarted: lambda frame: self._member(frame.handle).start_turn(frame),
            Rewound: lambda frame: self._member(frame.handle).rewind(frame),
            Context: lambda frame: self._member(frame.handle).take_context(frame),
            Verdicts: self._verdicts,
            TurnEnded: self._turn_ended,
            Left: self._left,
            Drain: self._drain,
            Ping: self._ping,
            Pong: lambda frame: None,
        }

    @property
    def ping_wanted(self) -> bool:
        """A turn has ended since the last ping: send one now, so that late blocks can be told from those of the next turn."""
        return self._fence > self._ping_sent

    @property
    def handles(self) -> list[int]:
        return list(self._members)

    def handle_of(self, session_id: str) -> int | None:
        return self._handles.get(session_id)

    def session_of(self, handle: int) -> str:
        return self._member(handle).session_id

    def member(self, handle: int) -> Membership | None:
        return self._members.get(handle)

    # ---- what the drafter says ----------------------------------------------------------------------------------------------

    def receive(self, frame: DrafterFrame) -> list[VerifierDecision]:
        """What to do about a frame. Raises RemoteProtocolError if the stream must be closed."""
        kind = type(frame)
        if self.state not in RECEIVES[kind]:
            raise RemoteProtocolError(
                Reason.PROTOCOL_VIOLATION,
                f"{kind.__name__} is not allowed: {self.state.value}; send hello first, and once",
            )
        return self._receive[kind](frame)

    def _hello(self, hello: Hello) -> list[VerifierDecision]:
        greeted = negotiate(hello, self._fingerprint, self._versions, self._block_limit)
        self._block_limit = greeted.block_size
        self.state = Stream.GREETED
        return [greeted]

    def _join(self, join: Join) -> list[VerifierDecision]:
        session_id = join.session_id
        expected = self.invites.get(session_id)
        if session_id in self._joining:
            return [Ignored(0, "join of a session that is being joined")]
        if expected is None or not hmac.compare_digest(expected, join.token):
            return [
                RefuseJoin(session_id, Reason.JOIN_REFUSED, "not invited, or the token is not the invite's")
            ]
        if len(self._members) + len(self._joining) >= self._session_limit:
            return [
                RefuseJoin(
                    session_id, Reason.OVERLOADED, f"this stream has its {self._session_limit} sessions"
                )
            ]
        self._joining.add(session_id)
        return [JoinAsked(join)]

    def _blocks(self, frame: Blocks) -> list[VerifierDecision]:
        accepted: list[Block] = []
        decisions: list[VerifierDecision] = [BlocksAccepted(accepted)]
        members, pong_seen, limit = self._members, self._pong_seen, self._block_limit
        for block in frame.entries:
            member = members.get(block.handle)
            if member is None:
                decisions.append(Ignored(block.handle, "block of no membership"))
            elif member.phase is not Phase.RUNNING or member.fence > pong_seen:
                decisions.append(Ignored(block.handle, "block of a turn that is over"))
            elif len(block.token_ids) > limit or block.assumed_count:
                message = f"block of {len(block.token_ids)} tokens, {block.assumed_count} assumed; at most {limit}, none assumed"
                decisions.append(self.end_membership(block.handle, Reason.PROTOCOL_VIOLATION, message))
            else:
                try:
                    member.put_in_flight(block)
                    accepted.append(
                        block
                    )  # also one that was overtaken: it tells that the drafter is at work
                except Broken as broken:
                    decisions.append(
                        self.end_membership(block.handle, Reason.PROTOCOL_VIOLATION, str(broken))
                    )
        return decisions

    def _leave(self, leave: Leave) -> list[VerifierDecision]:
        session_id = leave.session_id
        invited = leave.handle == 0 and session_id not in self._joining
        if invited and self.invites.pop(session_id, b"") != b"":
            return [InviteDeclined(session_id, leave.reason)]
        member = self._forget(leave.handle)
        if member is None:
            return [Ignored(leave.handle, "leave of no membership")]
        return [MemberLeft(leave.handle, member.session_id, leave.reason)]

    def _pong(self, pong: Pong) -> list[VerifierDecision]:
        if self._pong_seen < pong.sequence <= self._ping_sent:
            self._pong_seen = pong.sequence
        return [PongReceived(pong.sequence)]

    # ---- what we say --------------------------------------------------------------------------------------------------------

    def send(self, frame: VerifierFrame | Context) -> None:
        """Checks and remembers what we are about to say (Context goes out on FeedContext). Raises LocalProtocolError."""
        kind = type(frame)
        if self.state not in SENDS[kind]:
            raise LocalProtocolError(f"{kind.__name__} is not allowed: {self.state.value}")
        try:
            self._send[kind](frame)
        except Broken as broken:
            raise LocalProtocolError(str(broken)) from broken

    def end_membership(self, handle: int, reason: Reason, message: str) -> EndMembership:
        """Ends a membership for the peer's fault (ours to find, or the caller's: a token that is not in the
        vocabulary). Say Left with it."""
        member = self._forget(handle)
        if member is None:
            raise LocalProtocolError(f"handle {handle} is no membership")
        return EndMembership(handle, member.session_id, reason, message)

    def _welcome(self, frame: Welcome) -> None:
        self.state = Stream.OPEN

    def _invite(self, frame: Invite) -> None:
        self.invites[frame.session_id] = frame.token

    def _joined(self, frame: Joined) -> None:
        if frame.session_id not in self._joining:
            raise Broken(f"Joined: session {frame.session_id} has not asked")
        if frame.handle <= self._last_handle:
            raise Broken(f"Joined: handle {frame.handle} after {self._last_handle}: handles must grow")
        self._joining.discard(frame.session_id)
        self._last_handle = frame.handle
        self._members[frame.handle] = Membership(frame.handle, frame.session_id, frame.keep_tokens)
        self._handles[frame.session_id] = frame.handle

    def _verdicts(self, frame: Verdicts) -> None:
        members = self._members
        for verdict in frame.entries:
            member = members.get(verdict.handle)
            if member is None:
                raise Broken(f"verdict for handle {verdict.handle}, which is no membership")
            member.commit(verdict)

    def _turn_ended(self, frame: TurnEnded) -> None:
        member = self._member(frame.handle)
        member.end_turn()
        member.fence = self._fence = self._ping_sent + 1

    def _left(self, frame: Left) -> None:
        if frame.handle == 0:
            self._joining.discard(frame.session_id)
        else:
            self._forget(frame.handle)  # None after end_membership: this is the farewell

    def _drain(self, frame: Drain) -> None:
        self.state = Stream.DRAINING

    def _ping(self, frame: Ping) -> None:
        if frame.sequence <= self._ping_sent:
            raise Broken(f"Ping {frame.sequence} after {self._ping_sent}: sequences must grow")
        self._ping_sent = frame.sequence

    def _member(self, handle: int) -> Membership:
        member = self._members.get(handle)
        if member is None:
            raise Broken(f"handle {handle} is no membership")
        return member

    def _forget(self, handle: int) -> Membership | None:
        member = self._members.pop(handle, None)
        if member is not None and self._handles.get(member.session_id) == handle:
            del self._handles[member.session_id]
        return member
