"""What waits to be sent on one FeedContext stream: cut into frames, held back by credit, bounded. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from sparkrelay.frames import Context

FRAME_IDS = 12_000  # ids of one frame: at most 5 bytes each, so a frame stays under 64 KiB
BACKLOG_IDS = 4_000_000  # ids that may wait in one stream


class ContextFeed:
    """`push` what members lack, `take` the next frame while there is credit.

    The drafter grants credit in bytes of FeedContextResponse messages; a frame may be sent when all of it is
    covered, so a drafter's first
    grant must be 64 KiB at least.
    """

    def __init__(self, frame_ids: int = FRAME_IDS, backlog_ids: int = BACKLOG_IDS) -> None:
        self._frame_ids = frame_ids
        self._backlog_ids = backlog_ids
        self._waiting: deque[Context] = deque()
        self._waiting_ids = 0
        self._credit = 0
        self._ping_sent = 0
        self._pong_seen = 0
        self._proof: dict[int, int] = {}  # handle -> the ping whose pong proves that its frames have arrived

    @property
    def ping_wanted(self) -> bool:
        """Frames went out since the last ping and none is left: a ping now tells soonest when they have arrived."""
        return not self._waiting and any(proof > self._ping_sent for proof in self._proof.values())

    def grant(self, add_bytes: int) -> None:
        self._credit += add_bytes

    def push(self, context: Context) -> bool:
        """Queues ids. False if there is no room: the drafter is too slow, its membership must end."""
        count = len(context.token_ids)
        if self._waiting_ids + count > self._backlog_ids:
            return False
        self._waiting_ids += count
        for start in range(0, count, self._frame_ids):
            ids = context.token_ids[start : start + self._frame_ids]
            self._waiting.append(replace(context, start=context.start + start, token_ids=ids))
        return True

    def head(self) -> Context | None:
        """The frame that goes next."""
        return self._waiting[0] if self._waiting else None

    def take(self, size_bytes: int) -> bool:
        """Spends credit on the head, whose message has this size, and removes it. False: not enough credit yet."""
        if size_bytes > self._credit:
            return False
        self._credit -= size_bytes
        context = self._waiting.popleft()
        self._waiting_ids -= len(context.token_ids)
        self._proof[context.handle] = self._ping_sent + 1
        return True

    def pinged(self, sequence: int) -> None:
        self._ping_sent = sequence

    def ponged(self, sequence: int) -> None:
        if self._pong_seen < sequence <= self._ping_sent:
            self._pong_seen = sequence
            self._proof = {handle: proof for handle, proof in self._proof.items() if proof > sequence}

    def on_its_way(self, handle: int) -> bool:
        """Some context of this membership may not have arrived yet."""
        return handle in self._proof or any(context.handle == handle for context in self._waiting)

    def forget(self, handle: int) -> None:
        """The membership is over."""
        self._proof.pop(handle, None)
        if any(context.handle == handle for context in self._waiting):
            self._waiting = deque(context for context in self._waiting if context.handle != handle)
            self._waiting_ids = sum(len(context.token_ids) for context in self._waiting)
