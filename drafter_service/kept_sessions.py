"""Sessions between two memberships: what the drafter remembers of them, bounded, least recently used first to go."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from drafter_service.session import DraftSession


@dataclass(frozen=True, slots=True)
class KeepLimits:
    """The most sessions, and of all of them together the most ids and bytes of context rows. 0 sessions keeps nothing."""

    session_count: int = 1024
    token_count: int = 256 * 2**10
    row_bytes: int = 256 * 2**20


class KeptSessions:
    """session_id |-> session that is a member of nothing now. Every method returns the keys of sessions that it let go."""

    def __init__(self, limits: KeepLimits) -> None:
        self._limits = limits
        self._sessions: OrderedDict[str, DraftSession] = OrderedDict()
        self._token_count = 0
        self._row_bytes = 0

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def token_count(self) -> int:
        """Ids of all of them together."""
        return self._token_count

    def keep(self, session_id: str, session: DraftSession) -> list[int]:
        """Takes a session in, in the place of an older one of the same name; lets the oldest go beyond the limits."""
        let_go = self.drop(session_id)
        self._sessions[session_id] = session
        self._count(session, 1)
        while self._is_full:
            _, oldest = self._sessions.popitem(last=False)
            self._count(oldest, -1)
            let_go.append(oldest.key)
        return let_go

    def take(self, session_id: str) -> DraftSession | None:
        """Hands a session out, if it is still here."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._count(session, -1)
        return session

    @property
    def _is_full(self) -> bool:
        limits = self._limits
        return (
            len(self._sessions) > limits.session_count
            or self._token_count > limits.token_count
            or self._row_bytes > limits.row_bytes
        )

    def _count(self, session: DraftSession, sign: int) -> None:
        """A session comes (1) or goes (-1); what it holds does not change meanwhile."""
        self._token_count += sign * len(session.ids)
        self._row_bytes += sign * session.row_bytes

    def drop(self, session_id: str) -> list[int]:
        """Forgets a session; an unknown one is no error."""
        session = self.take(session_id)
        return [] if session is None else [session.key]
