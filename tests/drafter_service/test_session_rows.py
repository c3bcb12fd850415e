"""Context rows as a session takes them from both streams, and hands them to a model that reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drafter_service.context_rows import ContextRows
from drafter_service.session import DraftSession, SessionViolation
from sparkrelay.frames import Context, TurnStarted, Verdict
from sparkrelay.sampling import Sampling

WIDTH = 3


def rows(*values: int) -> np.ndarray:
    """One row a value, filled with it."""
    return np.repeat(np.array(values, np.uint16)[:, None], WIDTH, axis=1)


def started(base_len: int, width: int = WIDTH) -> DraftSession:
    session = DraftSession(1, 4, 0, width)
    session.turn_started(TurnStarted(1, "turn", base_len, Sampling(), 1, 50, 0, (), 4))
    return session


def known(session: DraftSession) -> dict[int, int]:
    """Value by position, of the rows that a request brings along."""
    kept = session.request().rows
    assert kept is not None
    return {span.start + i: int(row[0]) for span in kept.spans(0, 99) for i, row in enumerate(span.rows)}


def verdict(base_len: int, accepted: int, given: Any) -> Verdict:
    return Verdict(1, 0, base_len, base_len, 4, accepted, 9, 4, given)


def test_rows_come_with_prompts_and_with_verdicts() -> None:
    session = started(5)
    session.context(Context(1, 0, (1, 2, 3), 0, rows(10, 11, 12)))
    session.context(Context(1, 3, (4, 5), 3, rows(13)))  # the last id's row does not exist yet
    assert known(session) == {0: 10, 1: 11, 2: 12, 3: 13}
    session.committed(verdict(5, 1, rows(14, 15)), (6, 9))
    assert session.request().ids == [1, 2, 3, 4, 5, 6, 9]
    assert known(session) == {0: 10, 1: 11, 2: 12, 3: 13, 4: 14, 5: 15}


def test_verdicts_may_overtake_the_prompt() -> None:
    session = started(4)
    session.committed(verdict(4, 0, rows(13)), (9,))
    session.context(Context(1, 0, (1, 2, 3, 4), 1, rows(11, 12)))
    assert session.request().ids == [1, 2, 3, 4, 9]
    assert known(session) == {1: 11, 2: 12, 3: 13}


def test_what_is_cut_takes_its_rows_along() -> None:
    session = started(4)
    session.context(Context(1, 0, (1, 2, 3, 4), 0, rows(10, 11, 12)))
    session.rewound(2)
    session.context(Context(1, 2, (7, 8, 9), 3, rows(23)))
    assert known(session) == {0: 10, 1: 11, 3: 23}


def test_a_model_that_reads_ids_alone_gets_no_rows() -> None:
    session = started(3, width=0)
    session.context(Context(1, 0, (1, 2, 3), 0, rows(10, 11)))
    assert session.request().rows is None


@pytest.mark.parametrize(
    ("start", "given", "message"),
    [
        (0, np.zeros((2, WIDTH + 1), np.uint16), r"is uint16\[2, 4\]; \[count, 3\] bfloat16 is needed"),
        (0, np.zeros((2, WIDTH), np.float32), "is float32"),
        (2, rows(1, 2, 3), "3 from 2 on reach beyond position 3"),
        (-1, rows(1), "1 from -1 on"),
    ],
)
def test_rows_that_cannot_be_end_the_membership(start: int, given: np.ndarray, message: str) -> None:
    with pytest.raises(SessionViolation, match=message):
        started(4).context(Context(1, 0, (1, 2, 3, 4), start, given))


def test_a_verdict_s_rows_end_where_its_accepted_tokens_end() -> None:
    session = started(2)
    session.context(Context(1, 0, (1, 2), 0, rows(10)))
    with pytest.raises(SessionViolation, match=r"verdict\.rows: 3 from 1 on reach beyond position 2"):
        session.committed(verdict(2, 1, rows(1, 2, 3)), (3, 9))


def test_rows_are_replaced_where_they_come_again() -> None:
    kept = ContextRows(WIDTH)
    kept.put(0, rows(1, 2, 3))
    kept.put(2, rows(5, 6))
    assert [int(row[0]) for span in kept.spans(0, 9) for row in span.rows] == [1, 2, 5, 6]
    assert kept.length == 4
