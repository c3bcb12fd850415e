"""Sessions: token lists, and which verifier has their state. Pure: time is an argument, what must be freed is a result."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.paging import page_of
from sparkrelay.outcomes import Reason, Refusal, field_refusal


@dataclass(frozen=True, slots=True)
class Binding:
    """The incarnation of a verifier that holds a session's state."""

    address: str
    verifier_id: str
    epoch: str


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """What a verifier is told of a conversation: keep so many of its tokens, then append these.

    At least one of keep_len and append_ids is not empty; if nothing is appended, the last kept token is run again.
    """

    keep_len: int
    append_ids: tuple[int, ...]


def common_prefix_len(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading ids are equal. Both must be of one type: slices are compared whole."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(slots=True)
class Session:
    """A conversation.

    tokens     what the verifier of `binding` is known to have committed, or a prefix of it: never more
    turn_id    of the turn under way, empty if none
    temporary  opened for one turn and ended with it
    """

    sequence: int
    session_id: str
    model: str
    idle_limit_us: int
    create_time_s: float
    last_used_us: int
    temporary: bool = False
    tokens: list[int] = field(default_factory=list)
    binding: Binding | None = None
    drafter_id: str = ""
    turn_count: int = 0
    turn_id: str = ""

    @property
    def busy(self) -> bool:
        return bool(self.turn_id)

    def plan_turn(self, wanted: Sequence[int], place: Binding) -> TurnPlan:
        """What to send to `place` so that the session's tokens become `wanted`.

        Until `turn_accepted`, nobody knows whether the verifier did it: only what is common to both is still counted on.
        """
        if self.binding != place:
            self.binding = place
            self.tokens.clear()
        keep_len = common_prefix_len(self.tokens, list(wanted))
        del self.tokens[keep_len:]
        return TurnPlan(keep_len, tuple(wanted[keep_len:]))

    def turn_accepted(self, wanted: Sequence[int]) -> None:
        """The verifier has these tokens now."""
        self.tokens[:] = wanted

    def committed(self, token_ids: Sequence[int]) -> None:
        """The verifier added these."""
        self.tokens.extend(token_ids)

    def forget_state(self) -> None:
        """No verifier has anything of it any more; the next turn sends everything."""
        self.tokens.clear()
        self.binding = None


class SessionTable:
    """All sessions of this gateway, at most `limit`; the one used longest ago goes first."""

    def __init__(self, limit: int, idle_limit_us: int, retry_after_ms: int = 0) -> None:
        """retry_after_ms: what a caller is told for whom there is no room."""
        self._limit = limit
        self._retry_after_ms = retry_after_ms
        self._idle_limit_us = idle_limit_us
        self._by_id: OrderedDict[str, Session] = OrderedDict()  # least recently used first
        self._next_sequence = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def open(
        self,
        session_id: str,
        model: str,
        *,
        now_us: int,
        create_time_s: float,
        idle_limit_us: int = 0,
        temporary: bool = False,
    ) -> tuple[Session, list[Session]]:
        """A new session, and those that were ended for it. Raises Refusal if all have turns under way."""
        assert session_id not in self._by_id, "ids are drawn at random and never given twice"
        ended = self.expire(now_us)
        if len(self._by_id) >= self._limit:
            ended.append(self._remove_idle())
        session = Session(
            sequence=self._next_sequence,
            session_id=session_id,
            model=model,
            idle_limit_us=idle_limit_us or self._idle_limit_us,
            create_time_s=create_time_s,
            last_used_us=now_us,
            temporary=temporary,
        )
        self._next_sequence += 1
        self._by_id[session_id] = session
        return session, ended

    def get(self, session_id: str) -> Session:
        """Raises Refusal."""
        session = self._by_id.get(session_id)
        if session is None:
            raise field_refusal(
                "session_id",
                f"no session {session_id!r} is open here: it never was, was ended, or was idle for too long. "
                "Open one with CreateSession and send the whole conversation.",
                Reason.SESSION_NOT_FOUND,
            )
        return session

    def begin_turn(self, session_id: str, turn_id: str, now_us: int) -> Session:
        """Marks the session busy. Raises Refusal if it is, or is unknown."""
        session = self.get(session_id)
        if session.busy:
            raise field_refusal(
                "session_id",
                f"session {session_id!r} has turn {session.turn_id} under way; one at a time. "
                "Wait for it, cancel it, or use another session.",
                Reason.SESSION_BUSY,
            )
        session.turn_id = turn_id
        session.turn_count += 1
        self._touch(session, now_us)
        return session

    def end_turn(self, session: Session, now_us: int) -> None:
        """The turn is over, however it ended; the session may have been ended meanwhile."""
        session.turn_id = ""
        self._touch(session, now_us)

    def holds(self, session: Session) -> bool:
        """False once the session was ended."""
        return self._by_id.get(session.session_id) is session

    def remove(self, session_id: str) -> Session | None:
        """Takes a session out; None if there is none."""
        return self._by_id.pop(session_id, None)

    def expire(self, now_us: int) -> list[Session]:
        """Takes out the sessions that were idle for longer than their limit."""
        ended = [
            session
            for session in self._by_id.values()
            if not session.busy and now_us - session.last_used_us > session.idle_limit_us
        ]
        for session in ended:
            del self._by_id[session.session_id]
        return ended

    def verifier_lost(self, address: str, epoch: str) -> None:
        """What this incarnation of a verifier held is gone."""
        for session in self._by_id.values():
            if session.binding and session.binding.address == address and session.binding.epoch == epoch:
                session.forget_state()

    def page(self, page_size: int, page_token: str) -> tuple[list[Session], str]:
        """Sessions of clients, newest first, and the token of the next page."""
        kept = (session for session in self._by_id.values() if not session.temporary)
        return page_of(sorted(kept, key=lambda session: -session.sequence), page_size, page_token)

    def _touch(self, session: Session, now_us: int) -> None:
        session.last_used_us = now_us
        if self.holds(session):
            self._by_id.move_to_end(session.session_id)

    def _remove_idle(self) -> Session:
        for session in self._by_id.values():
            if not session.busy:
                return self._by_id.pop(session.session_id)
        raise Refusal(
            Reason.OVERLOADED,
            f"All {self._limit} sessions of this gateway have turns under way. Try again when one has ended.",
            retry_after_ms=self._retry_after_ms,
        )
