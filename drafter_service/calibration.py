"""From a confidence head's logits to the probability that a token matches: one temperature a position, fitted on matches.

Greedy and sampled turns match at different rates, so each has its own temperatures. Without a file the head is taken at its word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

CALIBRATION_FILE: Final = "calibration.json"


class UnusableCalibration(ValueError):
    """A calibration file that cannot be used. The message names it and what is wrong."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Temperatures by position; positions beyond them take the last one. Empty: all 1."""

    greedy: tuple[float, ...] = ()
    sampled: tuple[float, ...] = ()

    def confidences(self, logits: Sequence[float], greedy: bool) -> list[float]:
        """P(token k matches given that all before it match), from the head's logits of positions 1, 2, ..."""
        temperatures = (self.greedy if greedy else self.sampled) or (1.0,)
        last = len(temperatures) - 1
        return [_sigmoid(logit / temperatures[min(k, last)]) for k, logit in enumerate(logits)]

    def save(self, folder: Path) -> None:
        record = {"greedy": list(self.greedy), "sampled": list(self.sampled)}
        (folder / CALIBRATION_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_calibration(folder: Path) -> Calibration:
    """The calibration beside a draft; the neutral one if there is none. UnusableCalibration if it makes no sense."""
    file = folder / CALIBRATION_FILE
    if not file.is_file():
        return Calibration()
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        found = Calibration(_temperatures(record, "greedy"), _temperatures(record, "sampled"))
    except (ValueError, TypeError, KeyError) as error:
        raise UnusableCalibration(f"{file}: {error}; write it anew with `sparkrelay calibrate`") from error
    return found


def _temperatures(record: dict[str, Any], name: str) -> tuple[float, ...]:
    values = tuple(float(value) for value in record[name])
    for value in values:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: {value} is no temperature; it must be above 0")
    return values


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
