"""The rule that cuts loops: 32 tokens that repeat with a period of 64 or less."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.cli.loops import loop_share, loop_start


def first_loop(ids: Sequence[int], length: int, longest_period: int) -> int:
    """The rule in one line, slowly."""
    return next(
        (
            start
            for start in range(len(ids) - length + 1)
            for period in range(1, min(longest_period, start) + 1)
            if list(ids[start : start + length]) == list(ids[start - period : start - period + length])
        ),
        len(ids),
    )


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 6), st.integers(1, 6))
def test_the_fast_rule_is_the_slow_rule(ids: list[int], length: int, longest_period: int) -> None:
    assert loop_start(ids, length, longest_period) == first_loop(ids, length, longest_period)


def test_text_without_a_loop_is_kept_whole() -> None:
    assert loop_start(list(range(500))) == 500
    assert loop_share(list(range(500))) == 0.0
    assert loop_share([]) == 0.0


def test_a_loop_is_cut_after_its_first_period() -> None:
    ids = [*range(100, 110), *(list(range(8)) * 10)]
    assert loop_start(ids) == 18
    assert loop_share(ids) == 1 - 18 / 90


def test_a_period_of_65_is_no_loop_and_one_of_64_is() -> None:
    assert loop_start(list(range(65)) * 3) == 195
    assert loop_start(list(range(64)) * 3) == 64


def test_31_repeated_tokens_are_no_loop() -> None:
    assert loop_start([*range(40), *range(31)]) == 71
    assert loop_start([*range(40), *range(32)]) == 40
