"""A line through samples of memory, and how sure it is."""

from __future__ import annotations

import os
import random

import pytest

from benchmarks.memory_slope import resident_mib, slope_of


def test_a_straight_line_is_found_exactly() -> None:
    slope = slope_of([(float(at), 100 + 0.5 * at) for at in range(100)])
    assert slope is not None
    assert [slope.per_min, slope.low, slope.high] == pytest.approx([30, 30, 30])


def test_noise_around_a_constant_has_an_interval_around_zero() -> None:
    draw = random.Random(3)
    slope = slope_of([(float(at), 500 + draw.gauss(0, 2)) for at in range(300)])
    assert slope is not None and slope.low < 0 < slope.high
    assert slope.high - slope.low < 1.0, "300 samples say more than this"


def test_the_interval_holds_the_truth_also_where_neighbours_are_alike() -> None:
    """Memory wanders: independent residuals would give an interval that misses the truth most of the time."""
    held, narrow_held = 0, 0
    for seed in range(60):
        draw = random.Random(seed)
        level, samples = 0.0, []
        for at in range(300):
            level = 0.9 * level + draw.gauss(0, 1)
            samples.append((float(at), 500 + level))
        slope = slope_of(samples)
        assert slope is not None
        held += slope.low <= 0 <= slope.high
        half = (slope.high - slope.low) / 2 / (19**0.5)  # without the correction for a correlation of 0.9
        narrow_held += abs(slope.per_min) <= half
    assert held >= 48 > narrow_held


def test_too_few_samples_make_no_line() -> None:
    assert slope_of([(0.0, 1.0)] * 7) is None
    assert slope_of([(1.0, 1.0)] * 20) is None, "all at one moment"


def test_a_process_has_memory_and_one_that_is_gone_has_none() -> None:
    own = resident_mib(os.getpid())
    assert own is not None and own > 5
    assert resident_mib(2**22 + 1) is None
