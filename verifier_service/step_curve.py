"""How long a step of the engine takes, by its rows, its sessions and the keys they look back on: measured, then corrected.

Time over rows is a list of knots with straight lines between them, so a curve may be as jagged as a device makes it: flat
while weights are read, a jump where a kernel changes. An engine that pads its rows pays for `row_multiple` of them at once.
What steps really take corrects the curve a little at a time: one scale for all of it (somebody else uses the cores) and the
knots beside the step (the profile was wrong there).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

KEY_BLOCK = 512  # positions; attention is paid in blocks of them
_RATE = 0.1  # of an error, how much of it is corrected at once, by the scale and by the knots each
_ERROR_LIMIT = 0.5  # no step's error counts for more: natural logarithm, 1.65 times too long
_KNOT_LIMIT = math.log(2.0)  # a knot stays within half and twice of what was profiled
_LONGEST_US = 600e6  # a step that took longer was suspended, not computed
_DEPTH_OF_TABLE = 1 << 20  # rows; nobody has a larger budget


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's duration depends on. key_block_count: blocks of 512 keys, summed over the sessions."""

    row_count: int
    session_count: int = 1
    key_block_count: int = 1


@dataclass(frozen=True, slots=True)
class CurveProfile:
    """A measured curve; what is kept on disk.

    knots         (rows, microseconds), rows ascending, at least one; durations above 0
    session_us    what each session adds
    key_block_us  what each block of keys adds
    row_multiple  rows are paid in multiples of this
    """

    knots: tuple[tuple[int, float], ...]
    session_us: float = 0.0
    key_block_us: float = 0.0
    row_multiple: int = 4

    def __post_init__(self) -> None:
        rows = [row for row, _ in self.knots]
        if not rows or rows[0] < 1 or any(low >= high for low, high in pairwise(rows)):
            raise ValueError(f"knots: rows are {rows}; at least one is needed, from 1 on, ascending")
        if not all(0.0 < us < math.inf for _, us in self.knots):
            raise ValueError("knots: a duration is not a number above 0")
        if not (0.0 <= self.session_us < math.inf and 0.0 <= self.key_block_us < math.inf):
            raise ValueError("session_us, key_block_us: must be numbers from 0 on")
        if self.row_multiple < 1:
            raise ValueError(f"row_multiple: is {self.row_multiple}; must be at least 1")


# Before anything is measured: the shape of a small model on two cores. Its scale is soon corrected by what steps take.
GUESS = CurveProfile(((4, 16_000.0), (16, 28_500.0), (32, 37_000.0), (64, 59_000.0)), 300.0, 100.0)


class StepCurve:
    """A curve in use. Deterministic; what it knows comes from its profile and from `observe`."""

    def __init__(self, profile: CurveProfile) -> None:
        self.profile = profile
        self.observed_count = 0
        self._scale = 0.0  # natural logarithm
        self._corrections = [0.0] * len(profile.knots)  # natural logarithms, a knot each
        self._rows = [row for row, _ in profile.knots]
        self._us = [us for _, us in profile.knots]
        self._tiers: list[float] = [0.0]  # [t] microseconds of t * row_multiple rows, scale 1

    @property
    def row_multiple(self) -> int:
        return self.profile.row_multiple

    @property
    def scale(self) -> float:
        """How much longer steps take than the profile says."""
        return math.exp(self._scale)

    def step_us(self, shape: StepShape) -> float:
        """Expected duration in microseconds; above 0."""
        tier = -(-max(1, shape.row_count) // self.profile.row_multiple)
        return self.scale * (self._tier_us(tier) + self._beside_rows_us(shape))

    def tiers_us(self, first_rows: int, last_rows: int, shape: StepShape) -> list[float]:
        """[tiers] durations of the steps with first_rows .. last_rows rows, one for each multiple they are padded to.

        shape  its sessions and key blocks count, its rows do not
        """
        multiple = self.profile.row_multiple
        first, last = -(-max(1, first_rows) // multiple), -(-max(1, last_rows) // multiple)
        self._tier_us(last)
        beside, scale = self._beside_rows_us(shape), self.scale
        return [scale * (us + beside) for us in self._tiers[first : last + 1]]

    def observe(self, shape: StepShape, took_us: float) -> None:
        """A step of this shape took so long. One observation moves the curve by a tenth of its error at most, twice."""
        if not 0.0 < took_us < _LONGEST_US or shape.row_count < 1:
            return
        self.observed_count += 1
        error = math.log(took_us / self.step_us(shape))
        if self.observed_count == 1:
            self._scale += error  # the first one says on what kind of machine we are
            return
        error = max(-_ERROR_LIMIT, min(_ERROR_LIMIT, error))
        self._scale += _RATE * error
        rows = -(-shape.row_count // self.row_multiple) * self.row_multiple
        for knot, weight in self._beside(rows):
            moved = self._corrections[knot] + _RATE * weight * error
            self._corrections[knot] = max(-_KNOT_LIMIT, min(_KNOT_LIMIT, moved))
            self._us[knot] = self.profile.knots[knot][1] * math.exp(self._corrections[knot])
            self._refresh(knot)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _beside_rows_us(self, shape: StepShape) -> float:
        profile = self.profile
        return profile.session_us * shape.session_count + profile.key_block_us * shape.key_block_count

    def _tier_us(self, tier: int) -> float:
        assert tier * self.row_multiple <= _DEPTH_OF_TABLE, "a step with more rows than any budget allows"
        while len(self._tiers) <= tier:
            self._tiers.append(self._rows_us(len(self._tiers) * self.row_multiple))
        return self._tiers[tier]

    def _beside(self, rows: int) -> Sequence[tuple[int, float]]:
        """The knots that a row count lies between, with their shares; beyond the ends the last one alone."""
        right = bisect_right(self._rows, rows)
        if right == 0:
            return ((0, 1.0),)
        if right == len(self._rows):
            return ((right - 1, 1.0),)
        low, high = self._rows[right - 1], self._rows[right]
        share = (rows - low) / (high - low)
        return ((right - 1, 1.0 - share), (right, share))

    def _rows_us(self, rows: int) -> float:
        if rows > self._rows[-1]:
            return self._us[-1] + self._last_slope() * (rows - self._rows[-1])
        return sum(weight * self._us[knot] for knot, weight in self._beside(rows))

    def _last_slope(self) -> float:
        """Microseconds a row beyond the last knot; never below none."""
        if len(self._rows) == 1:
            return self._us[0] / self._rows[0]
        return max(0.0, (self._us[-1] - self._us[-2]) / (self._rows[-1] - self._rows[-2]))

    def _refresh(self, knot: int) -> None:
        """The table between the neighbours of a knot that moved; to its end if it is one of the last two."""
        multiple = self.row_multiple
        first = self._rows[knot - 1] // multiple if knot else 1
        last = len(self._tiers)
        if knot + 2 < len(self._rows):
            last = min(last, self._rows[knot + 1] // multiple + 1)
        for tier in range(max(1, first), last):
            self._tiers[tier] = self._rows_us(tier * multiple)
