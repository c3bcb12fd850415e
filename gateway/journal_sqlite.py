"""Turn logs in a SQLite file, so that what was said outlives the gateway: written by one thread, many rows in one commit.

A call hands its row to the thread and returns. The thread waits for the first row, takes what else comes within 5 ms, and
commits all of it. A crash loses at most what was not committed yet; what is lost is refused when it is asked for, never
skipped. If the file cannot be written, answers go on and `broken` says why.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import structlog

from gateway.journal import TurnLog
from gateway.turn_output import Delta, TurnSummary
from sparkrelay.outcomes import Reason, Refusal

log = structlog.get_logger(__name__)

GROUP_S = 0.005
ROWS_LIMIT = 100_000  # rows that may wait for a slow disk; beyond it the file counts as broken
PURGE_EVERY_S = 10.0
STALE_S = 3600.0  # a turn without an end is kept for so much longer: it may be a long one
SCHEMA = """
CREATE TABLE IF NOT EXISTS turns (turn_id TEXT PRIMARY KEY, trace_id TEXT NOT NULL, accepted BLOB NOT NULL,
  time_s REAL NOT NULL, summary BLOB, refusal TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS deltas (turn_id TEXT NOT NULL, number INTEGER NOT NULL, delta BLOB NOT NULL,
  text_ends TEXT NOT NULL, PRIMARY KEY (turn_id, number)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS turns_by_time ON turns (time_s);
"""
INSERT_TURN = "INSERT OR REPLACE INTO turns (turn_id, trace_id, accepted, time_s) VALUES (?, ?, ?, ?)"
INSERT_DELTA = "INSERT OR REPLACE INTO deltas VALUES (?, ?, ?, ?)"
END_TURN = "UPDATE turns SET summary = ?, refusal = ?, time_s = ? WHERE turn_id = ?"

Row = tuple[str, tuple[Any, ...]]


class Codec(Protocol):
    """Events to bytes and back: the stubs are not known here."""

    def accepted(self, event: Any) -> bytes: ...
    def delta(self, delta: Delta) -> bytes: ...
    def summary(self, summary: TurnSummary) -> bytes: ...
    def read_accepted(self, data: bytes) -> Any: ...
    def read_delta(self, data: bytes, text_ends: tuple[int, ...]) -> Delta: ...
    def read_summary(self, data: bytes) -> TurnSummary: ...


class SqliteJournal:
    """The file at `path`, made if it is not there. `close` writes what still waits.

    keep_s  how long turns stay after their last row
    wall_s  seconds since 1970: they mean the same to the next process
    """

    def __init__(self, path: Path, codec: Codec, keep_s: float, wall_s: Callable[[], float]) -> None:
        self.broken = ""
        self._path = path
        self._codec = codec
        self._keep_s = keep_s
        self._wall_s = wall_s
        self._rows: queue.Queue[Row | None] = queue.Queue(ROWS_LIMIT)
        with self._connection() as connection:  # raises where the file is of no use at all
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(SCHEMA)
            connection.commit()
        path.chmod(0o600)
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def accepted(self, turn: TurnLog) -> None:
        """A turn was accepted."""
        row = (turn.turn_id, turn.trace_id, self._codec.accepted(turn.accepted), self._wall_s())
        self._put((INSERT_TURN, row))

    def added(self, turn: TurnLog, delta: Delta) -> None:
        """It has one more delta."""
        text_ends = json.dumps(delta.text_ends)
        row = (turn.turn_id, turn.delta_count - 1, self._codec.delta(delta), text_ends)
        self._put((INSERT_DELTA, row))

    def ended(self, turn: TurnLog) -> None:
        """It is over."""
        summary = refusal = None
        if isinstance(turn.end, Refusal):
            refusal = json.dumps([turn.end.reason.name, turn.end.message])
        elif turn.end is not None:
            summary = self._codec.summary(turn.end)
        self._put((END_TURN, (summary, refusal, self._wall_s(), turn.turn_id)))

    def load(self, turn_id: str) -> TurnLog | None:
        """A turn of an earlier process, as far as it was written; None if there is none. Waits for the disk."""
        try:
            with self._connection() as connection:
                turn = connection.execute(
                    "SELECT trace_id, accepted, summary, refusal FROM turns WHERE turn_id = ?", (turn_id,)
                ).fetchone()
                rows = connection.execute(
                    "SELECT number, delta, text_ends FROM deltas WHERE turn_id = ? ORDER BY number",
                    (turn_id,),
                ).fetchall()
        except sqlite3.Error as error:
            self._break(error)
            return None
        return None if turn is None else self._log_of(turn_id, turn, rows)

    def flush(self) -> None:
        """Returns once all that was handed over is written, or given up."""
        self._rows.join()

    def close(self) -> None:
        """Writes what waits and ends the thread."""
        self._rows.put(None)
        self._thread.join()

    def _log_of(self, turn_id: str, turn: Any, rows: list[Any]) -> TurnLog:
        trace_id, accepted, summary, refusal = turn
        found = TurnLog(turn_id, trace_id, accepted=self._codec.read_accepted(accepted))
        whole = [row[0] for row in rows] == list(range(len(rows)))
        for _, delta, text_ends in rows if whole else ():
            found.add(self._codec.read_delta(delta, tuple(json.loads(text_ends))))
        if summary is not None and whole:
            found.end = self._codec.read_summary(summary)
        elif refusal is not None:
            reason, message = json.loads(refusal)
            found.end = Refusal(Reason[reason], message)
        else:
            message = "The gateway was started again during this turn, and the rest of it is lost. Ask again with the same seed."
            found.end = Refusal(Reason.RESUME_LOST, message)
        if isinstance(found.end, Refusal):
            found.end.turn_id, found.end.trace_id = turn_id, trace_id
        return found

    def _put(self, row: Row) -> None:
        if self.broken:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._break(OSError(f"{ROWS_LIMIT} rows wait: the disk is too slow"))

    def _write(self) -> None:
        """The thread."""
        purged_s = 0.0
        try:
            with self._connection() as connection:
                for group in self._groups():
                    try:
                        self._commit(connection, group)
                        if time.monotonic() - purged_s > PURGE_EVERY_S:
                            self._purge(connection)
                            purged_s = time.monotonic()
                    except sqlite3.Error as error:
                        self._break(error)
                    finally:
                        for _ in group:
                            self._rows.task_done()
        except sqlite3.Error as error:
            self._break(error)
            for group in (
                self._groups()
            ):  # nothing more comes in; those who wait for what is here must not wait for ever
                for _ in group:
                    self._rows.task_done()

    def _groups(self) -> Iterator[list[Row]]:
        """Rows that are committed together: the first one and what comes within GROUP_S after it."""
        while True:
            first = self._rows.get()
            if first is None:
                return
            group, deadline = [first], time.monotonic() + GROUP_S
            with contextlib.suppress(queue.Empty):
                while (left_s := deadline - time.monotonic()) > 0:
                    row = self._rows.get(timeout=left_s)
                    if row is None:
                        yield group
                        return
                    group.append(row)
            yield group

    def _commit(self, connection: sqlite3.Connection, group: list[Row]) -> None:
        for statement, values in group:
            connection.execute(statement, values)
        connection.commit()

    def _purge(self, connection: sqlite3.Connection) -> None:
        old = self._wall_s() - self._keep_s
        over = "SELECT turn_id FROM turns WHERE time_s < ? AND (summary IS NOT NULL OR refusal IS NOT NULL)"
        stale = "SELECT turn_id FROM turns WHERE time_s < ?"  # of an earlier process: never ended
        for chosen, before_s in ((over, old), (stale, old - STALE_S)):
            connection.execute(f"DELETE FROM deltas WHERE turn_id IN ({chosen})", (before_s,))
            connection.execute(f"DELETE FROM turns WHERE turn_id IN ({chosen})", (before_s,))
        connection.commit()

    def _break(self, error: Exception) -> None:
        if not self.broken:
            self.broken = str(error) or type(error).__name__
            log.error(
                "the journal cannot be written: turns cannot be resumed after a restart", reason=self.broken
            )

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, timeout=5.0)
        try:
            connection.execute("PRAGMA synchronous=NORMAL")
            yield connection
        finally:
            connection.close()
