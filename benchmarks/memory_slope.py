"""Does a process grow? Its resident memory over time, and the least-squares slope with an interval."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024
NORMAL_95 = 1.96
LEAST_SAMPLES = 8

Sample = tuple[float, float]  # seconds, MiB


@dataclass(frozen=True, slots=True)
class Slope:
    """MiB a minute, and the 95 % interval of a straight line through the samples.

    Samples that follow one another are alike, so the interval counts fewer of them than there are (by the correlation of
    neighbouring residuals); without that it would be far too narrow.
    """

    per_min: float
    low: float
    high: float


def slope_of(samples: Sequence[Sample]) -> Slope | None:
    """None for fewer samples than a line can honestly be drawn through."""
    count = len(samples)
    if count < LEAST_SAMPLES:
        return None
    minutes = [at / 60 for at, _ in samples]
    mean_x = sum(minutes) / count
    mean_y = sum(mib for _, mib in samples) / count
    spread_x = sum((x - mean_x) ** 2 for x in minutes)
    if spread_x == 0:
        return None
    products = [(x - mean_x) * (mib - mean_y) for x, (_, mib) in zip(minutes, samples, strict=True)]
    slope = sum(products) / spread_x
    residuals = [mib - mean_y - slope * (x - mean_x) for x, (_, mib) in zip(minutes, samples, strict=True)]
    variance = sum(each * each for each in residuals) / (count - 2)
    half = NORMAL_95 * math.sqrt(variance / spread_x * _inflation(residuals))
    return Slope(slope, slope - half, slope + half)


def _inflation(residuals: Sequence[float]) -> float:
    """How much more the slope varies than with independent residuals, from the correlation of neighbours; at least 1."""
    total = sum(each * each for each in residuals)
    if total == 0:
        return 1.0
    neighbours = sum(a * b for a, b in itertools.pairwise(residuals)) / total
    correlation = min(max(neighbours, 0.0), 0.99)
    return (1 + correlation) / (1 - correlation)


def resident_mib(pid: int) -> float | None:
    """What the process holds in memory now; None if there is no such process."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / MIB
    except FileNotFoundError:
        return _resident_mib_by_ps(pid)
    except ProcessLookupError:
        return None


def _resident_mib_by_ps(pid: int) -> float | None:
    """For systems without /proc."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return int(done.stdout) / 1024 if done.stdout.strip().isdigit() else None
