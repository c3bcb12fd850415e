"""The chi-square test, for tests that draw samples: how likely are counts as far off as these, if the law is right?"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def chi_square_p(observed: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """The p-value of Pearson's test; both arguments hold counts of the same cells and the same total.

    Raises AssertionError where a cell expects fewer than 5: the chi-square law would not hold.
    """
    seen = np.asarray(observed, dtype=np.float64).ravel()
    due = np.asarray(expected, dtype=np.float64).ravel()
    assert due.min() >= 5.0, f"a cell expects only {due.min():.2f} samples"
    assert math.isclose(seen.sum(), due.sum(), rel_tol=1e-9), "observed and expected totals differ"
    statistic = float(((seen - due) ** 2 / due).sum())
    return upper_gamma((seen.size - 1) / 2, statistic / 2)


def upper_gamma(a: float, x: float) -> float:
    """The regularised upper incomplete gamma function Q(a, x), with full relative accuracy far in the tail."""
    if x <= 0.0:
        return 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1.0:
        return 1.0 - scale * _lower_series(a, x)
    return scale * _upper_fraction(a, x)


def _lower_series(a: float, x: float) -> float:
    """sum over n of x^n / (a (a+1) … (a+n)); every term is positive and, for x < a + 1, soon negligible."""
    term = total = 1.0 / a
    n = 0
    while term > total * 1e-17:
        n += 1
        term *= x / (a + n)
        total += term
    return total


def _upper_fraction(a: float, x: float, depth: int = 400) -> float:
    """The continued fraction 1/(x+1-a- 1(1-a)/(x+3-a- 2(2-a)/(x+5-a- …))), evaluated from the inside."""
    tail = 0.0
    for n in range(depth, 0, -1):
        tail = n * (n - a) / (x + 2 * n + 1 - a - tail)
    return 1.0 / (x + 1 - a - tail)
