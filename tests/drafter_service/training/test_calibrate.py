"""Calibration: temperatures that were put in are found again, and the figures are what they are called."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from drafter_service.calibration import (
    CALIBRATION_FILE,
    Calibration,
    UnusableCalibration,
    load_calibration,
)
from drafter_service.training.calibrate import (
    area_under_curve,
    expected_error,
    fit_temperatures,
    quality,
    survivals,
)


def rounds(temperatures: tuple[float, ...], count: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """A head's logits, and matches that happen as often as the logits over the temperatures say."""
    generator = np.random.default_rng(1)
    logits = generator.normal(0.7, 1.5, (count, len(temperatures)))
    chances = 1 / (1 + np.exp(-logits / np.array(temperatures)))
    matched = (generator.random(chances.shape) < chances).cumprod(axis=1).sum(axis=1)
    return logits, matched


def test_the_temperatures_of_an_overconfident_head_are_found() -> None:
    true = (2.0, 1.5, 3.0)
    logits, matched = rounds(true)
    found = fit_temperatures(logits, matched)
    assert found == pytest.approx(true, rel=0.15)
    before = quality(survivals(logits, (1.0, 1.0, 1.0)), matched)
    after = quality(survivals(logits, found), matched)
    assert max(after.ece) < 0.01 < min(before.ece)
    assert after.auc[0] == pytest.approx(before.auc[0])  # one temperature changes no order
    assert after.auc[0] > 0.6


def test_the_error_is_the_distance_between_what_was_said_and_what_was() -> None:
    said = np.array([0.12, 0.13, 0.81, 0.82])
    assert expected_error(said, np.array([0.0, 0.0, 1.0, 1.0])) == pytest.approx((0.25 + 0.37) / 4)
    assert expected_error(np.full(100, 0.4), np.repeat([1.0, 0.0], [40, 60])) == pytest.approx(0.0)


def test_the_area_counts_pairs_in_order() -> None:
    said = np.array([0.1, 0.4, 0.4, 0.8])
    happened = np.array([0.0, 0.0, 1.0, 1.0])
    assert area_under_curve(said, happened) == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    assert math.isnan(area_under_curve(said, np.ones(4)))


def test_a_calibration_comes_back_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert load_calibration(tmp_path) == Calibration()
    assert Calibration().confidences([0.0, 100.0, -800.0], greedy=True) == pytest.approx([0.5, 1.0, 0.0])
    calibration = Calibration((2.0, 1.0), (0.5,))
    calibration.save(tmp_path)
    assert load_calibration(tmp_path) == calibration
    for broken in (
        "{",
        '{"greedy": [1, 0], "sampled": []}',
        '{"greedy": [1]}',
        '{"greedy": "x", "sampled": []}',
    ):
        (tmp_path / CALIBRATION_FILE).write_text(broken)
        with pytest.raises(UnusableCalibration, match="sparkrelay calibrate"):
            load_calibration(tmp_path)
