"""The chi-square test that other tests lean on, against values of printed tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.chi_square import chi_square_p, upper_gamma


@pytest.mark.parametrize(
    ("degrees", "statistic", "p"),
    [
        (1, 3.841459, 0.05),
        (3, 16.26624, 0.001),
        (10, 18.30704, 0.05),
        (63, 82.52873, 0.05),
        (100, 67.32756, 0.995),
    ],
)
def test_p_values_are_those_of_the_tables(degrees: int, statistic: float, p: float) -> None:
    assert upper_gamma(degrees / 2, statistic / 2) == pytest.approx(p, rel=1e-5)


def test_the_far_tail_keeps_its_relative_accuracy() -> None:
    assert upper_gamma(1.0, 300.0) == pytest.approx(math.exp(-300.0), rel=1e-9)


def test_p_values_of_a_right_law_are_uniform() -> None:
    rng = np.random.default_rng(0)
    law = np.array([0.1, 0.2, 0.3, 0.4])
    p_values = [chi_square_p(rng.multinomial(10_000, law), 10_000 * law) for _ in range(2000)]
    assert chi_square_p(np.histogram(p_values, bins=10, range=(0.0, 1.0))[0], np.full(10, 200)) > 1e-4


def test_thin_cells_are_refused() -> None:
    with pytest.raises(AssertionError, match="expects only"):
        chi_square_p([1, 99], [4, 96])
