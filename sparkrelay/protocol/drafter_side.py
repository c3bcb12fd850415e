"""The drafter's side of one Speculate stream and its FeedContext."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

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
from sparkrelay.outcomes import Reason
from sparkrelay.protocol.decisions import (
    AnswerPong,
    ContextArrived,
    DrafterDecision,
    EndMembership,
    Ignored,
    Invited,
    JoinRefused,
    LocalProtocolError,
    MemberJoined,
    MembershipOver,
    PongReceived,
    RemoteProtocolError,
    SessionRewound,
    SessionTurnEnded,
    SessionTurnStarted,
    VerdictsArrived,
    VerifierDraining,
    Welcomed,
)
from sparkrelay.protocol.membership import Broken, Membership, Phase

EARLY_LIMIT = 4096  # context frames that may be ahead of what Speculate has said


class Stream(Enum):
    """Where a stream stands, seen from the drafter."""

    NEW = "hello not sent yet"
    GREETED = "hello sent, no welcome yet"
    OPEN = "welcomed"
    DRAINING = "drain announced"


_ANY = frozenset((Stream.OPEN, Stream.DRAINING))

# frame we send -> the states in which we may
SENDS: dict[type, frozenset[Stream]] = {
    Hello: frozenset((Stream.NEW,)),
    **dict.fromkeys((Join, Blocks, Leave, Ping, Pong), _ANY),
}
# frame the verifier sends -> the states in which it may
RECEIVES: dict[type, frozenset[Stream]] = {
    Welcome: frozenset((Stream.GREETED,)),
    Invite: frozenset((Stream.OPEN,)),
    Drain: frozenset((Stream.OPEN,)),
    **dict.fromkeys((Joined, TurnStarted, Rewound, Verdicts, TurnEnded, Left, Ping, Pong, Context), _ANY),
}


class DrafterSide:
    """`receive` what the verifier says on either stream, `send` before telling it anything. Not thread-safe; no clock, no I/O."""

    def __init__(self) -> None:
        self.state = Stream.NEW
        self._block_size = 0  # the most tokens of our blocks, as the hello says; 0: as many as are taken
        self._block_limit = 0
        self._session_limit = 0
        self._versions = (0, 0)
        self._members: dict[int, Membership] = {}
        self._asked: set[str] = set()  # joins without an answer
        self._last_handle = 0
        self._early: dict[int, list[Context]] = {}  # handle -> context ahead of its Joined or TurnStarted
        self._early_count = 0
        self._receive: dict[type, Callable[..., list[DrafterDecision]]] = {
            Welcome: self._welcome,
            Invite: lambda frame: [Invited(frame)],
            Joined: self._joined,
            TurnStarted: self._turn_started,
            Rewound: self._rewound,
            Context: self._context,
            Verdicts: self._verdicts,
            TurnEnded: self._turn_ended,
            Left: self._left,
            Drain: self._drain,
            Ping: lambda frame: [AnswerPong(frame.sequence)],
            Pong: lambda frame: [PongReceived(frame.sequence)],
        }
        self._send: dict[type, Callable[..., None]] = {
            Hello: self._hello,
            Join: self._join,
            Blocks: self._blocks,
            Leave: self._leave,
            Ping: lambda frame: None,
            Pong: lambda frame: None,
        }

    @property
    def handles(self) -> list[int]:
        return list(self._members)

    def member(self, handle: int) -> Membership | None:
        return self._members.get(handle)

    def may_draft(self, handle: int) -> bool:
        """A turn runs, all its committed ids are here, and no block is in flight."""
        member = self._members.get(handle)
        return (
            member is not None and member.phase is Phase.RUNNING and not member.owed and member.block is None
        )

    # ---- what the verifier says ---------------------------------------------------------------------------------------------

    def receive(self, frame: VerifierFrame | Context) -> list[DrafterDecision]:
        """What to do about a frame. Raises RemoteProtocolError if the stream must be closed."""
        kind = type(frame)
        if self.state not in RECEIVES[kind]:
            raise RemoteProtocolError(
                Reason.PROTOCOL_VIOLATION, f"{kind.__name__} is not allowed: {self.state.value}"
            )
        return self._receive[kind](frame)

    def _welcome(self, welcome: Welcome) -> list[DrafterDecision]:
        low, high = self._versions
        if not low <= welcome.protocol_version <= high:
            message = f"welcome of protocol version {welcome.protocol_version}: {low} to {high} were offered"
            raise RemoteProtocolError(Reason.PROTOCOL_VERSION, message)
        if welcome.block_limit < max(self._block_size, 1):
            message = (
                f"welcome with block_limit {welcome.block_limit}: blocks of {self._block_size} were announced"
            )
            raise RemoteProtocolError(Reason.PROTOCOL_VIOLATION, message)
        self.state = Stream.OPEN
        self._block_limit, self._session_limit = welcome.block_limit, welcome.session_limit
        return [Welcomed(welcome)]

    def _joined(self, joined: Joined) -> list[DrafterDecision]:
        if (
            joined.session_id not in self._asked
            or joined.handle <= self._last_handle
            or joined.keep_tokens < 0
        ):
            message = (
                f"joined {joined.session_id!r} as {joined.handle}: not asked for, or the handle is not new"
            )
            raise RemoteProtocolError(Reason.PROTOCOL_VIOLATION, message)
        self._asked.discard(joined.session_id)
        self._last_handle = joined.handle
        self._members[joined.handle] = Membership(joined.handle, joined.session_id, joined.keep_tokens)
        for handle in [
            early for early in self._early if early < joined.handle and early not in self._members
        ]:
            self._drop_early(handle)  # numbers that were passed over are never used
        return [MemberJoined(joined)]

    def _turn_started(self, turn: TurnStarted) -> list[DrafterDecision]:
        member = self._members.get(turn.handle)
        if member is None:
            return [Ignored(turn.handle, "turn of no membership")]
        try:
            member.start_turn(turn)
        except Broken as broken:
            return [self._end(turn.handle, str(broken))]
        decisions: list[DrafterDecision] = [SessionTurnStarted(turn)]
        for context in self._drop_early(turn.handle):
            decisions += self._context(context)
        return decisions

    def _rewound(self, rewound: Rewound) -> list[DrafterDecision]:
        member = self._members.get(rewound.handle)
        if member is None:
            return [Ignored(rewound.handle, "rewind of no membership")]
        try:
            member.rewind(rewound)
        except Broken as broken:
            return [self._end(rewound.handle, str(broken))]
        return [SessionRewound(rewound)]

    def _context(self, context: Context) -> list[DrafterDecision]:
        member = self._members.get(context.handle)
        if member is not None and member.owed:
            try:
                member.take_context(context)
            except Broken as broken:
                return [self._end(context.handle, str(broken))]
            return [ContextArrived(context)]
        if member is None and context.handle <= self._last_handle:
            return [Ignored(context.handle, "context of no membership")]
        # FeedContext was faster than Speculate: the turn (or the membership) that it belongs to is still to come.
        if self._early_count >= EARLY_LIMIT:
            raise RemoteProtocolError(
                Reason.PROTOCOL_VIOLATION, f"{EARLY_LIMIT} context frames of turns that never started"
            )
        self._early.setdefault(context.handle, []).append(context)
        self._early_count += 1
        return []

    def _verdicts(self, frame: Verdicts) -> list[DrafterDecision]:
        arrived: list[tuple[Verdict, tuple[int, ...]]] = []
        decisions: list[DrafterDecision] = [VerdictsArrived(arrived)]
        members = self._members
        for verdict in frame.entries:
            member = members.get(verdict.handle)
            if member is None:
                decisions.append(Ignored(verdict.handle, "verdict of no membership"))
                continue
            try:
                arrived.append((verdict, member.commit(verdict)))
            except Broken as broken:
                decisions.append(self._end(verdict.handle, str(broken)))
        return decisions

    def _turn_ended(self, turn: TurnEnded) -> list[DrafterDecision]:
        member = self._members.get(turn.handle)
        if member is None:
            return [Ignored(turn.handle, "turn of no membership")]
        try:
            member.end_turn()
        except Broken as broken:
            return [self._end(turn.handle, str(broken))]
        return [SessionTurnEnded(turn)]

    def _left(self, left: Left) -> list[DrafterDecision]:
        if left.handle == 0:
            self._asked.discard(left.session_id)
            return [JoinRefused(left)]
        member = self._forget(left.handle)
        if member is None:
            return [Ignored(left.handle, "left of no membership")]
        return [MembershipOver(left, member.session_id)]

    def _drain(self, drain: Drain) -> list[DrafterDecision]:
        self.state = Stream.DRAINING
        return [VerifierDraining(drain)]

    # ---- what we say --------------------------------------------------------------------------------------------------------

    def send(self, frame: DrafterFrame) -> None:
        """Checks and remembers what we are about to say. Raises LocalProtocolError."""
        kind = type(frame)
        if self.state not in SENDS[kind]:
            raise LocalProtocolError(f"{kind.__name__} is not allowed: {self.state.value}")
        try:
            self._send[kind](frame)
        except Broken as broken:
            raise LocalProtocolError(str(broken)) from broken

    def _hello(self, hello: Hello) -> None:
        self.state = Stream.GREETED
        self._versions = (hello.protocol_min, hello.protocol_max)
        self._block_size = hello.fingerprint.block_size

    def _join(self, join: Join) -> None:
        if join.session_id in self._asked:
            raise Broken(f"Join of {join.session_id!r}: the last one is not answered yet")
        if len(self._members) + len(self._asked) >= self._session_limit:
            raise Broken(f"Join of {join.session_id!r}: this stream has its {self._session_limit} sessions")
        self._asked.add(join.session_id)

    def _blocks(self, frame: Blocks) -> None:
        for block in frame.entries:
            member = self._members.get(block.handle)
            if member is None:
                raise Broken(f"block of handle {block.handle}, which is no membership")
            if len(block.token_ids) > self._block_limit:
                raise Broken(
                    f"block of {len(block.token_ids)} tokens; at most {self._block_limit} are allowed"
                )
            if member.owed:
                raise Broken(f"block of handle {block.handle} before all its context is here")
            if not member.put_in_flight(block):
                raise Broken(
                    f"block of handle {block.handle} for base_len {block.base_len} was overtaken before it was sent"
                )

    def _leave(self, leave: Leave) -> None:
        self._forget(leave.handle)  # None after EndMembership: this is the farewell

    def _end(self, handle: int, message: str) -> EndMembership:
        member = self._forget(handle)
        session_id = member.session_id if member is not None else ""
        return EndMembership(handle, session_id, Reason.PROTOCOL_VIOLATION, message)

    def _forget(self, handle: int) -> Membership | None:
        self._drop_early(handle)
        return self._members.pop(handle, None)

    def _drop_early(self, handle: int) -> list[Context]:
        frames = self._early.pop(handle, [])
        self._early_count -= len(frames)
        return frames
