"""Sequential temperature scaling: one temperature a position, so that survivals mean what they say.

Left to right: at position k the temperature is sought, with those before it fixed, that makes the running product of
confidences best calibrated against "the first k tokens match". Every anchor counts at every position: a block that missed before
is a zero there.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BINS: Final = 20
_LOWEST, _HIGHEST = 0.05, 20.0
_STEPS = 41
_ROUNDS = 3


class Quality(NamedTuple):
    """Of survivals, by position. ece: 0 is perfect. auc: 0.5 is blind, NaN where all matched or none did."""

    ece: list[float]
    auc: list[float]


def fit_temperatures(logits: Floats, matched: npt.NDArray[np.int64]) -> tuple[float, ...]:
    """logits [n, slots] of the confidence head, matched [n]: how many tokens of each block matched."""
    survival = np.ones(len(logits))
    temperatures: list[float] = []
    for k in range(logits.shape[1]):
        happened = (matched > k).astype(np.float64)
        best = _search(logits[:, k], survival, happened)
        temperatures.append(best)
        survival = survival * _sigmoid(logits[:, k] / best)
    return tuple(temperatures)


def survivals(logits: Floats, temperatures: tuple[float, ...]) -> Floats:
    """[n, slots]: P(the first k tokens match)."""
    return np.asarray(np.cumprod(_sigmoid(logits / np.array(temperatures)), axis=1), np.float64)


def quality(predicted: Floats, matched: npt.NDArray[np.int64]) -> Quality:
    """How good survivals [n, slots] are."""
    happened = [(matched > k).astype(np.float64) for k in range(predicted.shape[1])]
    return Quality(
        [expected_error(predicted[:, k], happened[k]) for k in range(len(happened))],
        [area_under_curve(predicted[:, k], happened[k]) for k in range(len(happened))],
    )


def expected_error(predicted: Floats, happened: Floats) -> float:
    """Expected calibration error: the mean distance, bin by bin of prediction, between what was said and what happened."""
    bins = np.minimum((predicted * BINS).astype(np.int64), BINS - 1)
    said = np.bincount(bins, predicted, BINS)
    was = np.bincount(bins, happened, BINS)
    return float(np.abs(said - was).sum() / len(predicted))


def area_under_curve(predicted: Floats, happened: Floats) -> float:
    """P(one that happened was given a higher value than one that did not); equals count half."""
    positive, negative = int(happened.sum()), int(len(happened) - happened.sum())
    if not positive or not negative:
        return float("nan")
    _, place, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    won = ranks[place][happened > 0].sum() - positive * (positive + 1) / 2
    return float(won / (positive * negative))


def _search(logits: Floats, before: Floats, happened: Floats) -> float:
    """The temperature of least error, by a grid on a logarithmic scale that is refined around its best."""
    low, high = np.log(_LOWEST), np.log(_HIGHEST)
    best = 0.0
    for _ in range(_ROUNDS):
        grid = np.linspace(low, high, _STEPS)
        errors = [expected_error(before * _sigmoid(logits / np.exp(point)), happened) for point in grid]
        best = float(grid[int(np.argmin(errors))])
        width = (high - low) / (_STEPS - 1)
        low, high = best - width, best + width
    return float(np.exp(best))


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1.0 + np.tanh(x / 2.0)), np.float64)
