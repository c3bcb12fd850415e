"""How long a step is expected to take."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier_service.step_curve import GUESS, CurveProfile, StepCurve, StepShape

JAGGED = CurveProfile(((4, 100.0), (16, 160.0), (20, 300.0), (32, 240.0), (64, 400.0)), 2.0, 3.0)


def test_between_knots_the_curve_is_straight_and_beyond_them_it_goes_on() -> None:
    curve = StepCurve(CurveProfile(((4, 100.0), (12, 200.0)), row_multiple=4))
    expected = {1: 100.0, 4: 100.0, 5: 150.0, 8: 150.0, 12: 200.0, 16: 250.0, 400: 200.0 + 388 * 12.5}
    assert {rows: curve.step_us(StepShape(rows, 0, 0)) for rows in expected} == pytest.approx(expected)


def test_sessions_and_key_blocks_are_paid_beside_the_rows() -> None:
    assert StepCurve(JAGGED).step_us(StepShape(4, 5, 7)) == pytest.approx(100.0 + 5 * 2.0 + 7 * 3.0)


def test_rows_up_to_the_next_multiple_are_free_and_jumps_stay_jumps() -> None:
    curve = StepCurve(JAGGED)
    assert curve.step_us(StepShape(13)) == curve.step_us(StepShape(16))
    assert curve.step_us(StepShape(17)) > 1.8 * curve.step_us(StepShape(16)), "the jump"
    assert curve.step_us(StepShape(32)) < curve.step_us(StepShape(20)), "a larger step may be the faster one"


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 9), st.integers(0, 99))
def test_a_range_of_tiers_is_what_each_of_its_steps_takes(
    first: int, more: int, sessions: int, keys: int
) -> None:
    curve = StepCurve(JAGGED)
    curve.observe(StepShape(20), 77.0)
    curve.observe(StepShape(20), 99.0)
    ends = range(-(-first // 4) * 4, -(-(first + more) // 4) * 4 + 1, 4)
    expected = [curve.step_us(StepShape(rows, sessions, keys)) for rows in ends]
    assert curve.tiers_us(first, first + more, StepShape(0, sessions, keys)) == pytest.approx(expected)


@pytest.mark.parametrize("profile", [JAGGED, GUESS])
def test_what_steps_take_corrects_the_curve_whatever_the_machine(profile: CurveProfile) -> None:
    curve = StepCurve(profile)
    truth = StepCurve(CurveProfile(((4, 40_000.0), (32, 50_000.0), (64, 90_000.0)), 10.0, 5.0))
    rng = random.Random(1)
    shapes = [StepShape(rng.randrange(1, 65), rng.randrange(1, 9), rng.randrange(1, 9)) for _ in range(4000)]
    for shape in shapes:
        curve.observe(shape, truth.step_us(shape) * rng.uniform(0.9, 1.1))
    errors = [abs(math.log(curve.step_us(shape) / truth.step_us(shape))) for shape in shapes]
    assert sum(errors) / len(errors) < 0.15
    uncorrected = StepCurve(profile)
    assert sum(abs(math.log(uncorrected.step_us(s) / truth.step_us(s))) for s in shapes) > sum(errors) * 3


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(allow_nan=True)), max_size=40))
def test_no_measurement_breaks_the_curve_and_the_table_is_what_the_knots_say(
    steps: list[tuple[int, float]],
) -> None:
    curve = StepCurve(JAGGED)
    curve.step_us(StepShape(200))
    for rows, took_us in steps:
        curve.observe(StepShape(rows), took_us)
        for tier in range(1, 51):
            assert curve._tiers[tier] == pytest.approx(curve._rows_us(tier * 4))
        assert 0.0 < curve.step_us(StepShape(rows)) < math.inf


def test_one_stalled_step_moves_the_curve_by_little() -> None:
    curve = StepCurve(JAGGED)
    usual = curve.step_us(StepShape(16))
    curve.observe(StepShape(16), usual)
    curve.observe(StepShape(16), usual * 1000)
    assert usual < curve.step_us(StepShape(16)) < usual * 1.12


@pytest.mark.parametrize(
    ("knots", "message"),
    [
        ((), "at least one"),
        (((4, 1.0), (4, 2.0)), "ascending"),
        (((0, 1.0),), "from 1 on"),
        (((4, 0.0),), "above 0"),
        (((4, math.nan),), "above 0"),
    ],
)
def test_a_curve_that_is_none_is_refused(knots: tuple[tuple[int, float], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurveProfile(knots)
