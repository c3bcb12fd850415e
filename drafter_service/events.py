"""What goes into the drafter's engine and what comes out: plain values between a link's task and the device thread.

A link is one Speculate stream and its FeedContext. Its number is never used again: a link that is dialled anew is a new one.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparkrelay.frames import Context, DrafterFrame, VerifierFrame, Welcome
from sparkrelay.outcomes import Reason

# ---- commands ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinkOpened:
    """A stream to a verifier stands: say hello on it."""

    link_id: int


@dataclass(frozen=True, slots=True)
class FrameArrived:
    """The verifier said this, on either stream of the link. received_us: when, on the engine's clock."""

    link_id: int
    frame: VerifierFrame | Context
    received_us: int


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The link is gone and with it all its memberships; an unknown one is no error."""

    link_id: int


@dataclass(frozen=True, slots=True)
class LeaveAll:
    """This drafter will end: give up every session of every link, and take no invites any more."""


Command = LinkOpened | FrameArrived | LinkLost | LeaveAll

# ---- events -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FramesToSend:
    """All that one step has to say on one link, in this order."""

    link_id: int
    frames: tuple[DrafterFrame, ...]


@dataclass(frozen=True, slots=True)
class ContextTaken:
    """So many context frames of the link were taken in this step: their room may be used again."""

    link_id: int
    frame_count: int


@dataclass(frozen=True, slots=True)
class LinkWelcomed:
    """The verifier has taken this drafter: open FeedContext."""

    link_id: int
    welcome: Welcome


@dataclass(frozen=True, slots=True)
class LinkDraining:
    """The verifier will end; its sessions may go on for so long."""

    link_id: int
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class LinkBroken:
    """The verifier broke the rules of the stream itself: close it."""

    link_id: int
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class SessionGivenUp:
    """The verifier said what cannot be about one session; it is left. For the log."""

    link_id: int
    session_id: str
    message: str


@dataclass(frozen=True, slots=True)
class AllLeft:
    """The answer to LeaveAll, after the last leave of every link."""


Event = FramesToSend | ContextTaken | LinkWelcomed | LinkDraining | LinkBroken | SessionGivenUp | AllLeft
