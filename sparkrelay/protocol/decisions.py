"""What the conversation decides, and how it fails.

Receiving a frame returns decisions: what the caller must now do. Faults come in three sizes, told apart by type:

* `LocalProtocolError`: we were about to break the rules. A bug of ours; the process may crash.
* `EndMembership`: the peer broke the rules in one session. That membership is over, everything else goes on.
* `RemoteProtocolError`: the peer broke the stream itself (no hello, two hellos, no common version). The stream
  ends with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparkrelay.frames import (
    Block,
    Context,
    Drain,
    Hello,
    Invite,
    Join,
    Joined,
    Left,
    Rewound,
    TurnEnded,
    TurnStarted,
    Verdict,
    Welcome,
)
from sparkrelay.outcomes import Reason, Refusal


class LocalProtocolError(Exception):
    """We were about to send what the conversation does not allow now: a bug."""


class RemoteProtocolError(Refusal):
    """The peer broke the stream: close it with this reason."""


@dataclass(frozen=True, slots=True)
class EndMembership:
    """The peer broke the rules of one session. Already over on this side: send the returned `farewell` and free what it held."""

    handle: int
    session_id: str
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """Something came too late to matter, or about a membership that is over. Count it; nothing else."""

    handle: int
    message: str


@dataclass(frozen=True, slots=True)
class AnswerPong:
    """Send this pong at once, before anything that is decided later: the peer reads from it what we have seen."""

    sequence: int


@dataclass(frozen=True, slots=True)
class PongReceived:
    sequence: int


# ---- decisions of a verifier ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Greeted:
    """The drafter fits: answer with a Welcome of this version. block_size: the most tokens its blocks will have."""

    hello: Hello
    version: int
    block_size: int


@dataclass(frozen=True, slots=True)
class JoinAsked:
    """An invited drafter wants in: answer with Joined or with Left of that session."""

    join: Join


@dataclass(frozen=True, slots=True)
class RefuseJoin:
    """Answer with Left(handle=0, session_id, reason, message)."""

    session_id: str
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class BlocksAccepted:
    """Blocks of running turns that obey the rules, in order. Some may be overtaken by what was committed
    meanwhile: match them."""

    entries: list[Block]


@dataclass(frozen=True, slots=True)
class MemberLeft:
    """The drafter gave the session up."""

    handle: int
    session_id: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class InviteDeclined:
    """The drafter does not want the session: its invitation is void, ask another one."""

    session_id: str
    reason: Reason


# ---- decisions of a drafter -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcomed:
    welcome: Welcome


@dataclass(frozen=True, slots=True)
class Invited:
    """Answer with Join, or with Leave(0, why, session_id)."""

    invite: Invite


@dataclass(frozen=True, slots=True)
class MemberJoined:
    joined: Joined


@dataclass(frozen=True, slots=True)
class JoinRefused:
    left: Left


@dataclass(frozen=True, slots=True)
class SessionRewound:
    rewound: Rewound


@dataclass(frozen=True, slots=True)
class SessionTurnStarted:
    turn: TurnStarted


@dataclass(frozen=True, slots=True)
class ContextArrived:
    """Committed ids, delivered after the TurnStarted they belong to and in order of position, whatever stream was faster."""

    context: Context


@dataclass(frozen=True, slots=True)
class VerdictsArrived:
    """Each verdict with the ids it commits from verdict.base_len on: accepted draft ids, then the target's own token."""

    entries: list[tuple[Verdict, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class SessionTurnEnded:
    turn: TurnEnded


@dataclass(frozen=True, slots=True)
class MembershipOver:
    """The verifier ended the membership."""

    left: Left
    session_id: str


@dataclass(frozen=True, slots=True)
class VerifierDraining:
    drain: Drain


VerifierDecision = (
    Greeted
    | JoinAsked
    | RefuseJoin
    | BlocksAccepted
    | MemberLeft
    | InviteDeclined
    | EndMembership
    | Ignored
    | AnswerPong
    | PongReceived
)
DrafterDecision = (
    Welcomed
    | Invited
    | MemberJoined
    | JoinRefused
    | SessionRewound
    | SessionTurnStarted
    | ContextArrived
    | VerdictsArrived
    | SessionTurnEnded
    | MembershipOver
    | VerifierDraining
    | EndMembership
    | Ignored
    | AnswerPong
    | PongReceived
)
