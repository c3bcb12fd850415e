"""Pings of one stream: the only deadline an endless stream can have, and the round-trip time. Time is an argument."""

from __future__ import annotations

from sparkrelay.frames import Ping

PING_EVERY_S = 1.0
SILENCE_LIMIT_S = 3.0
UNANSWERED_LIMIT = 64  # pings remembered for their round-trip time


class Keepalive:
    """One side of one stream. Call `heard` for every frame, `tick` about every ping interval.

    round_trip_s  smoothed time from a ping to its pong, None before the first
    """

    def __init__(
        self, now_s: float, *, ping_every_s: float = PING_EVERY_S, silence_limit_s: float = SILENCE_LIMIT_S
    ) -> None:
        self.round_trip_s: float | None = None
        self._ping_every_s = ping_every_s
        self._silence_limit_s = silence_limit_s
        self._heard_s = now_s
        self._pinged_s = now_s
        self._sequence = 0
        self._sent_s: dict[int, float] = {}

    def heard(self, now_s: float) -> None:
        """The peer said something."""
        self._heard_s = now_s

    def silent(self, now_s: float) -> bool:
        """Nothing was heard for longer than the limit: the peer counts as lost."""
        return now_s - self._heard_s > self._silence_limit_s

    def ping(self, now_s: float) -> Ping:
        """The next ping, to be sent now."""
        self._sequence += 1
        self._pinged_s = now_s
        self._sent_s[self._sequence] = now_s
        if len(self._sent_s) > UNANSWERED_LIMIT:
            del self._sent_s[next(iter(self._sent_s))]
        return Ping(self._sequence)

    def tick(self, now_s: float) -> Ping | None:
        """A ping, if one is due."""
        return self.ping(now_s) if now_s - self._pinged_s >= self._ping_every_s else None

    def pong(self, sequence: int, now_s: float) -> None:
        """A pong has come: one that answers no ping of ours is no measurement."""
        sent_s = self._sent_s.pop(sequence, None)
        if sent_s is None:
            return
        measured = now_s - sent_s
        self.round_trip_s = (
            measured if self.round_trip_s is None else 0.75 * self.round_trip_s + 0.25 * measured
        )
