"""Sessions between two memberships: what the drafter remembers of them, bounded, least recently used first to go."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from drafter_service.session import DraftSession


@dataclass(frozen=True, slots=True)
class KeepLimits:
    """The most sessions, and the most ids of all of them together. 0 sessions keeps nothing."""

    session_count: int = 1024
    token_count: int = 256 * 2**10


class KeptSessions:
    """session_id |-> session that is a member of nothing now. Every method returns the keys of sessions that it let go."""

    def __init__(self, limits: KeepLimits) -> None:
        self._limits = limits
        self._sessions: OrderedDict[str, DraftSession] = OrderedDict()
        self._token_count = 0

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
        self._token_count += len(session.ids)
        while (
            len(self._sessions) > self._limits.session_count or self._token_count > self._limits.token_count
        ):
            _, oldest = self._sessions.popitem(last=False)
            self._token_count -= len(oldest.ids)
            let_go.append(oldest.key)
        return let_go

    def take(self, session_id: str) -> DraftSession | None:
        """Hands a session out, if it is still here."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._token_count -= len(session.ids)
        return session

    def drop(self, session_id: str) -> list[int]:
        """Forgets a session; an unknown one is no error."""
        session = self.take(session_id)
        return [] if session is None else [session.key]
