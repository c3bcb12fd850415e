"""What a draft model that reads context rows keeps of its sessions: caches by key, the ids behind them, the turn's chooser."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from drafter_service.context_rows import ContextRows
from drafter_service.models import DraftRequest, TurnRules
from drafter_service.models.dspark.cached import ContextCache
from drafter_service.models.ngram import common_prefix
from sparkrelay.device.choice import Chooser


@dataclass(slots=True)
class RowSession:
    """A session at a model.

    cache    keys and values of the first positions
    ids      the ids that those keys and values were made of
    chooser  of the turn with these rules; stands behind the committed ids of the last call
    """

    cache: ContextCache
    ids: list[int] = field(default_factory=list)
    chooser: Chooser | None = None
    rules: TurnRules | None = None

    def begin(self, request: DraftRequest, lead: int = 0) -> Chooser:
        """Cuts off what the session no longer has; a chooser behind the committed ids.

        lead: how many ids behind a position its keys and values depend on.
        """
        common = common_prefix(self.ids, request.ids)
        self.cache.truncate(max(min(common, len(request.ids) - 1) - lead, 0))
        del self.ids[common:]
        rules = request.turn
        if self.chooser is None or self.rules is not rules:
            self.rules = rules
            self.chooser = Chooser(rules.sampling, rules.stop_ids, request.ids, rules.output_start)
        else:
            self.chooser.extend(request.ids[self.chooser.length :])
        return self.chooser

    def entered(self, ids: Sequence[int], lead: int = 0) -> None:
        """The cache is made of the ids up to its length, and `lead` more, now."""
        self.ids += ids[len(self.ids) : self.cache.length + lead]


class RowSessions:
    """All sessions of a model; the least recently drafted go first where memory ends."""

    def __init__(self, new_cache: Callable[[], ContextCache], limit_bytes: int) -> None:
        self._new_cache = new_cache
        self._limit_bytes = limit_bytes
        self._sessions: OrderedDict[int, RowSession] = OrderedDict()

    @property
    def state_bytes(self) -> int:
        """Memory of all sessions' keys and values."""
        return sum(session.cache.byte_count for session in self._sessions.values())

    def of(self, session_key: int) -> RowSession:
        """The session, new if it is not known."""
        session = self._sessions.get(session_key)
        if session is None:
            session = self._sessions[session_key] = RowSession(self._new_cache())
        self._sessions.move_to_end(session_key)
        return session

    def evict(self, needed: set[int]) -> None:
        """Forgets sessions, but none of the needed ones, until the others' memory and theirs fit."""
        excess = self.state_bytes - self._limit_bytes
        for key in [key for key in self._sessions if key not in needed]:
            if excess <= 0:
                return
            excess -= self._sessions.pop(key).cache.byte_count

    def forget(self, session_key: int) -> None:
        self._sessions.pop(session_key, None)


def has_rows(request: DraftRequest) -> bool:
    """Whether there is any context to draft from; a block without would be a guess from one id."""
    rows: ContextRows | None = request.rows
    return rows is not None and rows.length > 0
