"""The arithmetic behind every comparison, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.figures import (
    Answer,
    Run,
    as_json,
    common_start,
    decode_rate,
    ratios,
    rounded,
    share_cut,
    spread,
    tokens_a_round,
    turns_of,
    wall_rate,
)

FRESH = tuple(range(1000, 1040))  # 40 tokens without a loop
LOOPING = (*range(20), *(7,) * 60)  # the loop's first repeated token is number 21


def steady(token_ids: tuple[int, ...], first_s: float, step_s: float, at_once: int = 1) -> Answer:
    """The first token at first_s, then `at_once` tokens every step_s."""
    marks = [(first_s, 1)]
    while marks[-1][1] < len(token_ids):
        marks.append((marks[-1][0] + step_s, min(marks[-1][1] + at_once, len(token_ids))))
    return Answer(token_ids, tuple(marks))


def test_the_time_to_the_first_token_is_not_in_the_decode_rate() -> None:
    slow_start = Run((steady(FRESH, 5.0, 0.01),), 5.39)
    assert decode_rate(slow_start).per_s == pytest.approx(100)
    assert wall_rate(slow_start) == pytest.approx(40 / 5.39)


def test_users_at_once_add_up() -> None:
    run = Run((steady(FRESH, 0.1, 0.02), steady(FRESH, 0.3, 0.02)), 1.1)
    assert decode_rate(run).per_s == pytest.approx(2 * 50)


def test_a_loop_counts_neither_as_tokens_nor_as_time() -> None:
    fast_in_the_loop = Answer(LOOPING, ((0.0, 1), (1.0, 20), (1.001, 80)))
    run = Run((fast_in_the_loop,), 1.001)
    assert decode_rate(run).per_s == pytest.approx(19)
    assert decode_rate(run, cut_loops=False).per_s == pytest.approx(79 / 1.001)
    assert share_cut([run]) == pytest.approx(59 / 80)


def test_a_user_who_loops_at_once_does_not_pull_the_others_down() -> None:
    at_once = Answer((1,) * 40, ((0.0, 1), (9.0, 40)))
    run = Run((steady(FRESH, 0.0, 0.1), at_once), 9.0)
    assert decode_rate(run).per_s == pytest.approx(20)


def test_the_accepted_length_is_counted_in_rounds_or_where_nobody_counted_them_in_marks() -> None:
    assert tokens_a_round([Run((steady(FRESH, 0.0, 0.1),), 4.0)]) == 1
    assert tokens_a_round([Run((steady(FRESH, 0.0, 0.1, at_once=3),), 2.0)]) == 3
    two_rounds_a_mark = Answer(FRESH, ((0.0, 1), (0.1, 20), (0.2, 40)), round_count=39)
    assert tokens_a_round([Run((two_rounds_a_mark,), 0.2)]) == 1
    assert tokens_a_round([]) == 0


def test_nothing_measured_is_none_and_not_zero() -> None:
    assert spread([]) is None and ratios([], [1.0]) is None
    assert rounded(None) is None and as_json(None) is None
    assert decode_rate(Run((), 0.0)).per_s == 0 == wall_rate(Run((), 0.0))


def test_a_ratio_is_formed_within_each_repeat() -> None:
    """The machine was half as fast in the second repeat, for both."""
    seen = ratios([30.0, 15.0, 33.0], [20.0, 10.0, 20.0])
    assert seen is not None
    assert (seen.median, seen.low, seen.high, seen.count) == (1.5, 1.5, 1.65, 3)
    assert as_json(seen) == {"median": 1.5, "low": 1.5, "high": 1.65, "count": 3}


@given(st.lists(st.text(), min_size=1, max_size=6, unique=True), st.integers(0, 30))
def test_every_repeat_runs_every_lane_once_and_begins_with_the_next(names: list[str], repeat: int) -> None:
    order = turns_of(names, repeat)
    assert sorted(order) == sorted(names)
    assert order[0] == names[repeat % len(names)]


def test_the_common_start_ends_at_the_first_other_token() -> None:
    assert common_start((1, 2, 3, 4), (1, 2, 9, 4)) == 2
    assert common_start((1, 2), (1, 2, 3)) == 2
    assert common_start((), (1,)) == 0
