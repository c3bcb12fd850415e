"""Those who watch rounds as they happen: each with a bounded queue; what does not fit is skipped and counted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gateway.turn_output import RoundCounts


@dataclass(frozen=True, slots=True)
class SeenRound:
    """A round of a turn; skipped_count: rounds this watcher has missed so far."""

    turn_id: str
    session_id: str
    report: RoundCounts
    skipped_count: int


class Watcher:
    """One watcher's queue. Used from one event loop."""

    def __init__(self, session_id: str, limit: int) -> None:
        self.session_id = session_id
        self._limit = limit
        self._queue: deque[SeenRound] = deque()
        self._skipped_count = 0
        self._changed = asyncio.Event()
        self._closed = False

    def offer(self, turn_id: str, session_id: str, report: RoundCounts) -> None:
        """Queues a round if it is wanted and there is room."""
        if self.session_id not in ("", session_id):
            return
        if len(self._queue) >= self._limit:
            self._skipped_count += 1
            return
        self._queue.append(SeenRound(turn_id, session_id, report, self._skipped_count))
        self._changed.set()

    def close(self) -> None:
        """Ends `rounds` after what is queued."""
        self._closed = True
        self._changed.set()

    async def rounds(self) -> AsyncGenerator[SeenRound, None]:
        """Rounds as they come."""
        while True:
            while self._queue:
                yield self._queue.popleft()
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()


class RoundBoard:
    """All watchers."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._watchers: set[Watcher] = set()

    @contextmanager
    def watch(self, session_id: str) -> Iterator[Watcher]:
        """A watcher of one session, or (empty) of all, for as long as the block lasts."""
        watcher = Watcher(session_id, self._limit)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def publish(self, turn_id: str, session_id: str, report: RoundCounts) -> None:
        """Shows a round to whom it concerns."""
        for watcher in self._watchers:
            watcher.offer(turn_id, session_id, report)

    def close(self) -> None:
        """Ends all watchers' streams."""
        for watcher in self._watchers:
            watcher.close()
