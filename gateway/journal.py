"""What is kept of turns that may be resumed: each turn's log, all logs within one bound, and where they are written down. Pure.

A log has the deltas of a turn as they were made. A resume begins between any two tokens: the deltas are cut there.
When there is no room, the logs of turns that are over go first, oldest first; then turns under way lose their own first
deltas. What is gone is said (RESUME_LOST), never skipped.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from gateway.turn_output import Delta, TurnSummary
from sparkrelay.outcomes import Reason, Refusal

# What values cost in memory, about, in bytes: for the bound, which need not be exact.
LOG_BYTES, DELTA_BYTES, TOKEN_BYTES, ROUND_BYTES, LOGPROB_BYTES = 2000, 400, 64, 600, 200


@dataclass(slots=True)
class TurnLog:
    """The events of one turn.

    accepted  the turn's first event, handed through; None until it was accepted
    end       how it ended: its last event, or the refusal it failed with; None while it runs
    """

    turn_id: str
    trace_id: str
    accepted: Any = None
    end: TurnSummary | Refusal | None = None
    size_bytes: int = LOG_BYTES
    dropped_count: int = 0  # deltas that are gone, the first ones
    token_count: int = 0  # of all deltas, those that are gone included
    _kept: deque[Delta] = field(default_factory=deque)
    # Of what is gone: the first token that a resume may begin with, where the text of its tokens ends, where its text ends.
    _gone_index: int = 0
    _gone_text_end: int = 0
    _gone_text_index: int = 0

    @property
    def delta_count(self) -> int:
        """Deltas so far, those that are gone included."""
        return self.dropped_count + len(self._kept)

    def add(self, delta: Delta) -> None:
        """The next delta."""
        self._kept.append(delta)
        self.size_bytes += _size_of(delta)
        self.token_count = delta.index + len(delta.token_ids)

    def drop_first(self) -> bool:
        """Gives up the oldest delta; False if there is none."""
        if not self._kept:
            return False
        delta = self._kept.popleft()
        self.dropped_count += 1
        self.size_bytes -= _size_of(delta)
        self._gone_index = delta.index + (len(delta.token_ids) or bool(delta.rounds))
        self._gone_text_end = delta.text_ends[-1] if delta.text_ends else self._gone_text_end
        self._gone_text_index = delta.text_index + len(delta.text)
        return True

    def delta(self, number: int) -> Delta:
        """A delta by its number in the turn, from 0. Raises Refusal if it is gone."""
        if number < self.dropped_count:
            raise self._lost(f"what came before token {self._gone_index}")
        return self._kept[number - self.dropped_count]

    def resume_point(self, next_index: int) -> ResumePoint:
        """Where a resume from this token begins. Raises Refusal if that is gone, or was never made."""
        if next_index > self.token_count:
            raise Refusal(
                Reason.RESUME_LOST,
                f"resume.next_index is {next_index}, but of this turn only {self.token_count} tokens are known here. "
                "Ask again as a new turn with the same seed.",
            )
        point = ResumePoint(0, next_index, self._text_end_before(next_index))
        if next_index < self._gone_index or point.text_index < self._gone_text_index:
            raise self._lost(f"what came from token {next_index} on")
        first = (number for number, delta in enumerate(self._kept) if point.cut(delta) is not None)
        return replace(point, number=self.dropped_count + next(first, len(self._kept)))

    def _text_end_before(self, next_index: int) -> int:
        """Where the text of the tokens before this one ends."""
        for delta in self._kept:
            if delta.index < next_index <= delta.index + len(delta.token_ids):
                return delta.text_ends[next_index - delta.index - 1]
        return self._gone_text_end if next_index > 0 else 0

    def _lost(self, what: str) -> Refusal:
        return Refusal(
            Reason.RESUME_LOST,
            f"{what} is no longer kept. Ask again as a new turn with the same seed.",
            turn_id=self.turn_id,
            trace_id=self.trace_id,
        )


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The delta to begin with, the first token wanted, the first character wanted."""

    number: int = 0
    next_index: int = 0
    text_index: int = 0

    def cut(self, delta: Delta) -> Delta | None:
        """The part of a delta that lies at or after this point; None if nothing does."""
        if delta.index >= self.next_index and delta.text_index >= self.text_index:
            return delta
        tokens = _clamp(self.next_index - delta.index, len(delta.token_ids))
        chars = _clamp(self.text_index - delta.text_index, len(delta.text))
        rest = replace(
            delta,
            index=delta.index + tokens,
            token_ids=delta.token_ids[tokens:],
            text=delta.text[chars:],
            logprobs=delta.logprobs[tokens:],
            text_index=delta.text_index + chars,
            text_ends=delta.text_ends[tokens:],
        )
        if not rest.token_ids and (delta.token_ids or delta.index < self.next_index):
            rest = replace(rest, rounds=())  # they committed tokens that the client has
        return rest if rest.token_ids or rest.text or rest.rounds else None


class JournalStore(Protocol):
    """Where logs are written down so that they outlive this process. Calls return at once; `load` may wait for the disk."""

    def accepted(self, log: TurnLog) -> None:
        """A turn was accepted."""
        ...

    def added(self, log: TurnLog, delta: Delta) -> None:
        """It has one more delta."""
        ...

    def ended(self, log: TurnLog) -> None:
        """It is over."""
        ...

    def load(self, turn_id: str) -> TurnLog | None:
        """A turn of an earlier process, as far as it was written; None if there is none."""
        ...

    @property
    def broken(self) -> str:
        """Why nothing is written any more; empty if all is well."""
        ...


class Journal:
    """All logs, by turn id, within one bound.

    limit_bytes  of all logs together, about
    keep_us      how long the log of a turn that is over is kept
    """

    def __init__(self, limit_bytes: int, keep_us: int, store: JournalStore | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._keep_us = keep_us
        self.store = store
        self._running: OrderedDict[str, TurnLog] = OrderedDict()
        self._over: OrderedDict[str, tuple[TurnLog, int]] = (
            OrderedDict()
        )  # with the time of its end, oldest first
        self.size_bytes = 0

    def open(self, turn_id: str, trace_id: str) -> TurnLog:
        """A new turn's log."""
        log = self._running[turn_id] = TurnLog(turn_id, trace_id)
        self.size_bytes += log.size_bytes
        return log

    def find(self, turn_id: str) -> TurnLog | None:
        """A turn's log; None if there is none, or no longer."""
        if turn_id in self._running:
            return self._running[turn_id]
        return self._over[turn_id][0] if turn_id in self._over else None

    def accept(self, log: TurnLog, accepted: Any) -> None:
        """The turn's first event."""
        log.accepted = accepted
        if self.store is not None:
            self.store.accepted(log)

    def add(self, log: TurnLog, delta: Delta) -> None:
        """The turn's next delta. Makes room if there is none."""
        before = log.size_bytes
        log.add(delta)
        self.size_bytes += log.size_bytes - before
        if self.store is not None:
            self.store.added(log, delta)
        while self.size_bytes > self._limit_bytes and self._give_up_one(log):
            pass

    def end(self, log: TurnLog, end: TurnSummary | Refusal, now_us: int) -> None:
        """The turn is over."""
        log.end = end
        if self._running.pop(log.turn_id, None) is not None:
            self._over[log.turn_id] = (log, now_us)
        if self.store is not None:
            self.store.ended(log)

    def expire(self, now_us: int) -> None:
        """Forgets the turns that were over for long enough."""
        for log, ended_us in list(self._over.values()):
            if now_us - ended_us <= self._keep_us:
                break
            self._forget(log)

    def __len__(self) -> int:
        return len(self._running) + len(self._over)

    def logs(self) -> Iterator[TurnLog]:
        """All logs: those under way, then those that are over, oldest first."""
        yield from self._running.values()
        yield from (log for log, _ in self._over.values())

    def _give_up_one(self, growing: TurnLog) -> bool:
        if self._over:
            self._forget(next(iter(self._over.values()))[0])
            return True
        before = growing.size_bytes
        dropped = growing.drop_first()
        self.size_bytes += growing.size_bytes - before
        return dropped

    def _forget(self, log: TurnLog) -> None:
        del self._over[log.turn_id]
        self.size_bytes -= log.size_bytes


def _size_of(delta: Delta) -> int:
    tops = sum(len(getattr(each, "top", ())) for each in delta.logprobs)
    return (
        DELTA_BYTES
        + TOKEN_BYTES * len(delta.token_ids)
        + 4 * len(delta.text)
        + ROUND_BYTES * len(delta.rounds)
        + LOGPROB_BYTES * (len(delta.logprobs) + tops)
    )


def _clamp(value: int, high: int) -> int:
    return max(0, min(value, high))
