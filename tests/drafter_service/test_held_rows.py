"""What a drafter says it holds of a session, and how much it keeps, when its model reads context rows."""

from __future__ import annotations

import numpy as np

from drafter_service.context_rows import ContextRows
from drafter_service.kept_sessions import KeepLimits, KeptSessions
from drafter_service.session import DraftSession
from sparkrelay.frames import Context
from sparkrelay.protocol import Membership

WIDTH = 4


def rows(count: int) -> np.ndarray:
    return np.ones((count, WIDTH), np.uint16)


def session_of(key: int, id_count: int, row_count: int) -> DraftSession:
    session = DraftSession(key, 4, row_width=WIDTH)
    session.joined(Membership(1, "s", 0), 0)
    session.context(Context(1, 0, tuple(range(id_count)), 0, rows(row_count)))
    return session


def test_only_ids_whose_rows_are_here_count_as_held() -> None:
    session = session_of(1, 10, 9)
    assert session.held_len == 9, "the last id's row comes with a verdict that it may have missed"
    session.context(Context(1, 10, (10, 11, 12), 11, rows(2)))
    assert session.held_len == 9, "what lies behind a hole is brought again"
    session.rewound(7)
    assert session.held_len == 7
    session.rewound(0)
    assert session.held_len == 0
    without = DraftSession(2, 4)
    without.context(Context(1, 0, (1, 2, 3)))
    assert without.held_len == 3 and without.row_bytes == 0


def test_rows_that_come_out_of_order_leave_no_hole_behind() -> None:
    kept = ContextRows(WIDTH)
    kept.put(600, rows(3))
    assert kept.known_len == 0
    kept.put(0, rows(300))
    assert kept.known_len == 300
    kept.put(300, rows(300))
    assert kept.known_len == 603


def test_sessions_are_kept_within_the_bytes_of_their_rows() -> None:
    one = session_of(1, 10, 9).row_bytes
    assert one > 0
    kept = KeptSessions(KeepLimits(row_bytes=2 * one))
    assert kept.keep("a", session_of(1, 10, 9)) == [] and kept.keep("b", session_of(2, 10, 9)) == []
    assert kept.keep("c", session_of(3, 10, 9)) == [1], "the oldest goes"
    assert kept.take("b") is not None
    assert kept.keep("d", session_of(4, 10, 9)) == []
    assert [name for name in "abcd" if kept.take(name) is not None] == ["c", "d"]
