"""The turns of late, with their rounds: what GetTurn and ListTurns read. Pure, bounded, forgets the oldest."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from gateway.paging import page_of
from gateway.turn_output import RoundCounts, TurnSummary
from sparkrelay.outcomes import Reason, field_refusal


@dataclass(slots=True)
class TurnRecord:
    """A turn under way (`summary` None) or over."""

    sequence: int
    turn_id: str
    trace_id: str
    session_id: str
    model: str
    create_time_s: float
    rounds: list[RoundCounts] = field(default_factory=list)
    summary: TurnSummary | None = None


class RecentTurns:
    """The last `limit` turns; turns under way are never forgotten.

    rounds_limit  rounds kept of one turn, its first ones; the totals count all
    """

    def __init__(self, limit: int, rounds_limit: int) -> None:
        self._limit = limit
        self._rounds_limit = rounds_limit
        self._by_id: OrderedDict[str, TurnRecord] = OrderedDict()  # oldest first
        self._next_sequence = 0

    def start(
        self, turn_id: str, trace_id: str, session_id: str, model: str, create_time_s: float
    ) -> TurnRecord:
        """A new turn is under way."""
        record = TurnRecord(self._next_sequence, turn_id, trace_id, session_id, model, create_time_s)
        self._next_sequence += 1
        self._by_id[turn_id] = record
        self._forget_oldest()
        return record

    def add_round(self, record: TurnRecord, report: RoundCounts) -> None:
        """A round of a turn under way."""
        if len(record.rounds) < self._rounds_limit:
            record.rounds.append(report)

    def finish(self, record: TurnRecord, summary: TurnSummary) -> None:
        """The turn is over, however it ended."""
        record.summary = summary
        self._forget_oldest()

    def knows(self, turn_id: str) -> bool:
        """True for a turn under way or remembered."""
        return turn_id in self._by_id

    def get(self, turn_id: str) -> TurnRecord:
        """Raises Refusal."""
        record = self._by_id.get(turn_id)
        if record is None:
            raise field_refusal(
                "turn_id",
                f"no turn {turn_id!r} is known here: the gateway remembers the last {self._limit}. See ListTurns.",
                Reason.TURN_NOT_FOUND,
            )
        return record

    def page(self, page_size: int, page_token: str, session_id: str) -> tuple[list[TurnRecord], str]:
        """Turns, newest first, of one session or (empty) of all, and the token of the next page."""
        chosen = (turn for turn in reversed(self._by_id.values()) if session_id in ("", turn.session_id))
        return page_of(chosen, page_size, page_token)

    def _forget_oldest(self) -> None:
        surplus = len(self._by_id) - self._limit
        if surplus > 0:
            over = [turn_id for turn_id, turn in self._by_id.items() if turn.summary is not None]
            for turn_id in over[:surplus]:
                del self._by_id[turn_id]
