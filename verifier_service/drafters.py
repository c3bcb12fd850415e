"""Which drafters there are, what they are invited to, and who drafts for whom. Pure: every call returns what must now be done.

    connected   a stream was welcomed          invited   a turn wants this drafter
    member      it joined the session          lost, refused   remembered with the reason, so that plain decoding is never silent

A session's turn names drafters in order of preference. The first that is connected is invited; when it leaves,
declines or is lost, the
next one is; when none is left, the engine hears that nobody will come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from sparkrelay.frames import ContextKind, Hello
from sparkrelay.outcomes import Reason
from verifier_service.events import DrafterUnavailable, RemoveMember

REMEMBERED_LIMIT = 256  # drafters that are not connected
INVITE_LIMIT = 8192  # invitations that a drafter may return to; the oldest are forgotten


class DrafterState(IntEnum):
    """See DrafterStatus.State."""

    CONNECTED = 1
    LOST = 2
    REFUSED = 3


@dataclass(slots=True)
class Drafter:
    """What is known of one drafter, by its configured name.

    link_id        its stream, 0 if it has none
    invites        session id -> token of the invitation; a drafter may return to them over a new stream
    block_size     the most tokens of its blocks
    reads_rows     its draft model reads context rows
    round_trip_us  of its stream; turnaround_us from verdicts to blocks; counts since this service started
    """

    drafter_id: str
    incarnation: str = ""
    state: DrafterState = DrafterState.CONNECTED
    reason: Reason = Reason.UNSPECIFIED
    message: str = ""
    proposal_kind: str = ""
    link_id: int = 0
    block_size: int = 0
    reads_rows: bool = False
    invites: dict[str, bytes] = field(default_factory=dict)
    members: set[int] = field(default_factory=set)
    round_trip_us: int = 0
    turnaround_us: int = 0
    drafted_count: int = 0
    verified_count: int = 0
    accepted_count: int = 0


@dataclass(frozen=True, slots=True)
class SendInvite:
    """Say Invite on this stream."""

    link_id: int
    session_id: str
    turn_id: str
    token: bytes


@dataclass(frozen=True, slots=True)
class CloseLink:
    """End this stream: the same drafter is here again."""

    link_id: int


Effect = SendInvite | CloseLink | RemoveMember | DrafterUnavailable


@dataclass(slots=True)
class _Wish:
    """A running turn's wish for a drafter. asked: the one that was invited last and has not gone; declined: not to
    be asked again; reinvited: those whose join was refused once."""

    session_id: str
    turn_id: str
    drafter_ids: tuple[str, ...]
    asked: str = ""
    declined: set[str] = field(default_factory=set)
    reinvited: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Member:
    """A membership, from the join on. member_id is also its handle in the stream."""

    member_id: int
    session_id: str
    link_id: int
    drafter_id: str


class Drafters:
    """new_token: makes the secret of an invitation."""

    def __init__(self, new_token: Callable[[], bytes]) -> None:
        self._new_token = new_token
        self._drafters: dict[str, Drafter] = {}  # the longest unseen first
        self._by_link: dict[int, Drafter] = {}
        self._wishes: dict[str, _Wish] = {}  # session id -> its running turn's wish
        self._members: dict[int, Member] = {}
        self._member_of: dict[str, int] = {}  # session id -> the member that drafts for it
        self._last_member_id = 0

    # ---- what is known --------------------------------------------------------------------------------------------------------

    def all(self) -> list[Drafter]:
        """Connected, lost and refused ones, the longest unseen first."""
        return list(self._drafters.values())

    def linked(self, link_id: int) -> Drafter | None:
        """Whose stream it is."""
        return self._by_link.get(link_id)

    def member(self, member_id: int) -> Member | None:
        return self._members.get(member_id)

    def member_of(self, session_id: str) -> Member | None:
        """The member that drafts for a session."""
        return self._members.get(self._member_of.get(session_id, 0))

    # ---- streams --------------------------------------------------------------------------------------------------------------

    def connect(self, link_id: int, hello: Hello, block_size: int) -> list[Effect]:
        """A drafter was welcomed. An older stream of the same name is closed: it is a leftover."""
        drafter = self._known(hello)
        effects: list[Effect] = []
        if drafter.link_id:
            old_link_id = drafter.link_id
            effects += self.lose(old_link_id, Reason.SUPERSEDED, "the drafter connected again")
            effects.append(CloseLink(old_link_id))
        drafter.state, drafter.reason, drafter.message = DrafterState.CONNECTED, Reason.UNSPECIFIED, ""
        drafter.link_id, drafter.block_size = link_id, block_size
        drafter.incarnation, drafter.proposal_kind = hello.incarnation, hello.fingerprint.proposal_kind
        drafter.reads_rows = hello.fingerprint.context_kind is ContextKind.ROWS
        self._by_link[link_id] = drafter
        for wish in self._wishes.values():
            if (
                not wish.asked
                and drafter.drafter_id in wish.drafter_ids
                and drafter.drafter_id not in wish.declined
            ):
                effects.append(self._invite(wish, drafter))
        return effects

    def refuse(self, hello: Hello, reason: Reason, message: str) -> None:
        """A hello was refused. A drafter of the same name that is connected stays what it is."""
        drafter = self._known(hello)
        if not drafter.link_id:
            drafter.state, drafter.reason, drafter.message = DrafterState.REFUSED, reason, message

    def lose(self, link_id: int, reason: Reason, message: str) -> list[Effect]:
        """A stream ended; an unknown one is no error. All its memberships are over; it may return to its invitations."""
        drafter = self._by_link.pop(link_id, None)
        if drafter is None:
            return []
        drafter.link_id = 0
        drafter.state, drafter.reason, drafter.message = DrafterState.LOST, reason, message
        effects: list[Effect] = []
        for member_id in sorted(drafter.members):
            self._forget_member(member_id)
            effects.append(RemoveMember(member_id))
        for wish in list(self._wishes.values()):
            if wish.asked == drafter.drafter_id:
                effects += self._ask_next(wish)
        return effects

    # ---- turns ----------------------------------------------------------------------------------------------------------------

    def want(self, session_id: str, turn_id: str, drafter_ids: Iterable[str]) -> tuple[bool, list[Effect]]:
        """A turn starts. Returns whether a drafter was invited that has yet to join, and what to do.

        A member that the turn names stays, if no drafter that is preferred to it is connected.
        """
        wish = self._wishes[session_id] = _Wish(session_id, turn_id, tuple(dict.fromkeys(drafter_ids)))
        member = self.member_of(session_id)
        chosen = self._first_connected(wish)
        if chosen is None:
            return False, []
        if member is not None and member.drafter_id == chosen.drafter_id:
            wish.asked = chosen.drafter_id
            return False, []
        return True, [self._invite(wish, chosen)]

    def turn_over(self, session_id: str, turn_id: str) -> None:
        """A turn ended. The member stays, and an invitation stays good: who joins late is there for the next turn."""
        wish = self._wishes.get(session_id)
        if wish is not None and wish.turn_id == turn_id:
            del self._wishes[session_id]

    def session_over(self, session_id: str) -> None:
        """Nobody is wanted any more, and invitations are void. The membership is ended by the engine."""
        self._wishes.pop(session_id, None)
        self._void_invites(session_id)

    # ---- memberships ----------------------------------------------------------------------------------------------------------

    def join(self, link_id: int, session_id: str) -> Member:
        """A drafter asks to join: the number that its membership will have."""
        drafter = self._by_link[link_id]
        self._last_member_id += 1
        member = Member(self._last_member_id, session_id, link_id, drafter.drafter_id)
        self._members[member.member_id] = member
        drafter.members.add(member.member_id)
        return member

    def join_refused(self, link_id: int, session_id: str, reason: Reason) -> list[Effect]:
        """A join was refused at the door. If it is the turn's drafter that asked: one that came with an invitation that
        is void is invited once more, else the next one is."""
        drafter, wish = self._by_link.get(link_id), self._wishes.get(session_id)
        if drafter is None or wish is None or wish.asked != drafter.drafter_id:
            return []
        member = self.member_of(session_id)
        if member is not None and member.drafter_id == drafter.drafter_id:
            return []  # it drafts already
        if reason is not Reason.JOIN_REFUSED or drafter.drafter_id in wish.reinvited:
            wish.declined.add(drafter.drafter_id)
        wish.reinvited.add(drafter.drafter_id)
        return self._ask_next(wish)

    def declined(self, link_id: int, session_id: str) -> list[Effect]:
        """An invited drafter does not want the session: not asked again in this turn, the next one is."""
        drafter, wish = self._by_link.get(link_id), self._wishes.get(session_id)
        if drafter is None or wish is None or wish.asked != drafter.drafter_id:
            return []
        wish.declined.add(drafter.drafter_id)
        return self._ask_next(wish)

    def joined(self, member_id: int) -> None:
        """The engine took it."""
        self._member_of[self._members[member_id].session_id] = member_id

    def end(self, member_id: int, reason: Reason, *, may_return: bool = False) -> list[Effect]:
        """A membership is over, or was refused; an unknown one is no error.

        If its turn still runs and nobody replaced it, the next drafter is asked: this one again only if it may return.
        """
        member = self._members.get(member_id)
        if member is None:
            return []
        self._forget_member(member_id)
        drafter = self._drafters.get(member.drafter_id)
        replaced = self._member_of.get(member.session_id, 0) > member_id
        if drafter is not None and not replaced:
            drafter.invites.pop(member.session_id, None)
        wish = self._wishes.get(member.session_id)
        if reason is Reason.SUPERSEDED or wish is None or replaced or wish.asked != member.drafter_id:
            return []
        if not may_return:
            wish.declined.add(member.drafter_id)
        return self._ask_next(wish)

    # ---- helpers --------------------------------------------------------------------------------------------------------------

    def _known(self, hello: Hello) -> Drafter:
        """The record of a name, moved to the end: seen last. Forgets the longest unseen ones beyond the limit."""
        drafter = self._drafters.pop(hello.drafter_id, None) or Drafter(hello.drafter_id)
        if not drafter.link_id:
            drafter.incarnation, drafter.proposal_kind = hello.incarnation, hello.fingerprint.proposal_kind
        absent = [each.drafter_id for each in self._drafters.values() if not each.link_id]
        for drafter_id in absent[: max(0, len(absent) - REMEMBERED_LIMIT + 1)]:
            del self._drafters[drafter_id]
        self._drafters[hello.drafter_id] = drafter
        return drafter

    def _first_connected(self, wish: _Wish) -> Drafter | None:
        for drafter_id in wish.drafter_ids:
            drafter = self._drafters.get(drafter_id)
            if drafter is not None and drafter.link_id and drafter_id not in wish.declined:
                return drafter
        return None

    def _invite(self, wish: _Wish, drafter: Drafter) -> SendInvite:
        wish.asked = drafter.drafter_id
        # An earlier turn's invitation of the same drafter stays good: its join may be on the way.
        token = drafter.invites.get(wish.session_id) or self._new_token()
        # One drafter at a time: an older invitation could push this one out.
        self._void_invites(wish.session_id)
        drafter.invites[wish.session_id] = token
        if len(drafter.invites) > INVITE_LIMIT:
            del drafter.invites[next(iter(drafter.invites))]
        return SendInvite(drafter.link_id, wish.session_id, wish.turn_id, token)

    def _void_invites(self, session_id: str) -> None:
        for drafter in self._drafters.values():
            drafter.invites.pop(session_id, None)

    def _ask_next(self, wish: _Wish) -> list[Effect]:
        wish.asked = ""
        following = self._first_connected(wish)
        if following is None:
            return [DrafterUnavailable(wish.session_id, wish.turn_id)]
        return [self._invite(wish, following)]

    def _forget_member(self, member_id: int) -> None:
        member = self._members.pop(member_id)
        drafter = self._drafters.get(member.drafter_id)
        if drafter is not None:
            drafter.members.discard(member_id)
        if self._member_of.get(member.session_id) == member_id:
            del self._member_of[member.session_id]
