"""Calibration of a run's draft on the samples that the run never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from drafter_service.calibration import Calibration
from drafter_service.models.dspark.checkpoint import load_draft, target_vocabulary
from drafter_service.training.calibrate import Quality, fit_temperatures, quality, survivals
from drafter_service.training.offline import Observed, confidence_data, observe
from drafter_service.training.phases import OnProgress
from drafter_service.training.pipeline import SETTINGS_FILE, CannotTrain, Workspace, train_data
from drafter_service.training.settings import TrainSettings
from drafter_service.training.states import StateFolder

FEWEST_ANCHORS = 200
"""Fewer observations say nothing about 20 bins."""


class Fitted(NamedTuple):
    """What was fitted, and how good survivals were before and after, on the same observations."""

    temperatures: tuple[float, ...]
    before: Quality
    after: Quality


def calibrate_run(
    workspace: Workspace, run: str, target: Path, threads: int, on_progress: OnProgress
) -> dict[str, Fitted]:
    """Fits and writes calibration.json into the run's draft; by kind of turn, as far as there are observations of it.

    CannotTrain: there is no such run, or too little is held out. ValueError: the draft has no confidence head.
    """
    if threads:
        torch.set_num_threads(threads)
    folder = workspace.run(run)
    if not (folder / SETTINGS_FILE).is_file():
        raise CannotTrain(f"{folder}: is no run; train one first with `sparkrelay train`")
    settings = TrainSettings.from_json(json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")))
    data = train_data(workspace, StateFolder(workspace.states(settings.taps), settings.taps))
    network = load_draft(folder / "draft", torch.bfloat16, target_vocabulary(target))
    observed: list[Observed] = []
    for done, number in enumerate(data.held_out_numbers, start=1):
        observed.append(observe(network, data.samples[number], data.item(number)))
        on_progress(done, "answers")
    kinds = {
        "greedy": [one for one in observed if one.temperature == 0.0],
        "sampled": [one for one in observed if one.temperature > 0.0],
    }
    found = {name: _fit(part) for name, part in kinds.items() if _anchor_count(part) >= FEWEST_ANCHORS}
    if not found:
        raise CannotTrain(
            f"{workspace.data}: fewer than {FEWEST_ANCHORS} tokens are held out; write more samples"
        )
    Calibration(**{name: fitted.temperatures for name, fitted in found.items()}).save(folder / "draft")
    return found


def _anchor_count(observed: list[Observed]) -> int:
    return sum(len(one.matched) for one in observed)


def _fit(observed: list[Observed]) -> Fitted:
    logits, matched = confidence_data(observed)
    temperatures = fit_temperatures(logits, matched)
    neutral = (1.0,) * len(temperatures)
    return Fitted(
        temperatures,
        quality(survivals(logits, neutral), matched),
        quality(survivals(logits, temperatures), matched),
    )
