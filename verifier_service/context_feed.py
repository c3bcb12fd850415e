"""What waits to be sent on one FeedContext stream: cut into frames, held back by credit, bounded. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from sparkrelay.frames import Context

FRAME_IDS = 12_000  # ids of one frame: at most 5 bytes each, so a frame stays under 64 KiB
FRAME_BYTES = 64 * 1024 - 64  # of the ids and rows of one frame; the rest is the message around them
ID_BYTES = 5  # the most that an id takes
BACKLOG_IDS = 4_000_000  # ids that may wait in one stream
BACKLOG_ROW_BYTES = 256 * 2**20  # and their rows


class ContextFeed:
    """`push` what members lack, `take` the next frame while there is credit.

    The drafter grants credit in bytes of FeedContextResponse messages; a frame may be sent when all of it is
    covered, so a drafter's first
    grant must be 64 KiB at least.
    """

    def __init__(
        self,
        frame_ids: int = FRAME_IDS,
        backlog_ids: int = BACKLOG_IDS,
        backlog_row_bytes: int = BACKLOG_ROW_BYTES,
    ) -> None:
        self._frame_ids = frame_ids
        self._backlog_ids = backlog_ids
        self._backlog_row_bytes = backlog_row_bytes
        self._waiting: deque[Context] = deque()
        self._waiting_ids = 0
        self._waiting_row_bytes = 0
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
        """Queues ids, and their rows. False if there is no room: the drafter is too slow, its membership must end."""
        count, row_bytes = len(context.token_ids), _row_bytes(context)
        if (
            self._waiting_ids + count > self._backlog_ids
            or self._waiting_row_bytes + row_bytes > self._backlog_row_bytes
        ):
            return False
        self._waiting_ids += count
        self._waiting_row_bytes += row_bytes
        self._waiting.extend(_frames(context, self._frame_ids))
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
        self._waiting_row_bytes -= _row_bytes(context)
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
            self._waiting_row_bytes = sum(map(_row_bytes, self._waiting))


def _frames(context: Context, frame_ids: int) -> Iterator[Context]:
    """The context in frames: at most so many ids, and with their rows at most 64 KiB."""
    if context.rows is not None and len(context.rows):
        frame_ids = max(1, min(frame_ids, FRAME_BYTES // (ID_BYTES + context.rows[0].nbytes)))
    for first in range(0, len(context.token_ids), frame_ids):
        ids = context.token_ids[first : first + frame_ids]
        start = context.start + first
        frame = replace(context, start=start, token_ids=ids)
        yield frame if context.rows is None else _with_rows_of(context, frame)


def _with_rows_of(context: Context, frame: Context) -> Context:
    """The frame with those of the context's rows that are of its positions."""
    rows_start = max(frame.start, context.rows_start)
    rows_end = min(frame.start + len(frame.token_ids), context.rows_start + len(context.rows))
    if rows_end <= rows_start:
        return replace(frame, rows_start=0, rows=None)
    rows = context.rows[rows_start - context.rows_start : rows_end - context.rows_start]
    return replace(frame, rows_start=rows_start, rows=rows)


def _row_bytes(context: Context) -> int:
    return 0 if context.rows is None else int(context.rows.nbytes)
