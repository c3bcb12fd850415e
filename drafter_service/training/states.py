"""What the target thought while it read a sample: the tapped layers' outputs and the last layer's, by position.

They are computed once and kept in shards on disk, or computed anew whenever they are asked for, where the disk is too small.
A run that was killed goes on with the first sample that has no states.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from drafter_service.training.samples import Sample
from sparkrelay.device.flat_batch import FlatBatch, FlatEntry
from sparkrelay.device.flat_model import FlatOutput
from sparkrelay.device.slab import SlabState

SHARD_SAMPLES: Final = 32
FORWARD_ROWS: Final = 512
"""Rows of one forward of the target: enough to fill the CPU."""


class TargetStates(NamedTuple):
    """Of positions 0 ... n - 1: the taps side by side [n, taps * hidden], and the last layer's output [n, hidden]."""

    taps: Tensor
    final: Tensor


class FlatModel(Protocol):
    """What this file uses of FlatCausalLM."""

    @property
    def layer_count(self) -> int: ...

    def new_state(self) -> SlabState: ...

    def forward_with_taps(self, batch: FlatBatch, taps: Sequence[int]) -> FlatOutput: ...


class StateSource(Protocol):
    """Where a trainer has states from."""

    def read(self, number: int, sample: Sample) -> TargetStates:
        """The states of all positions of a sample but the last, which nothing follows."""


class ComputedStates:
    """States that are computed whenever they are asked for."""

    def __init__(self, model: FlatModel, taps: Sequence[int]) -> None:
        self._model = model
        self._taps = tuple(taps)

    def read(self, number: int, sample: Sample) -> TargetStates:
        return self.of([sample])[0]

    def of(self, samples: Sequence[Sample]) -> list[TargetStates]:
        """Some samples in one forward."""
        counts = [len(sample.token_ids) - 1 for sample in samples]
        ids = np.concatenate([np.array(sample.token_ids[:-1], np.int64) for sample in samples])
        entries = tuple(FlatEntry(self._model.new_state(), 0, count) for count in counts)
        last = self._model.layer_count - 1
        output = self._model.forward_with_taps(
            FlatBatch(ids, entries, np.zeros(0, np.int64)), (*self._taps, last)
        )
        taps = torch.cat([output.taps[layer] for layer in self._taps], dim=1)
        parts = zip(
            torch.split_with_sizes(taps, counts),
            torch.split_with_sizes(output.taps[last], counts),
            strict=True,
        )
        return [TargetStates(tap, final) for tap, final in parts]


@dataclass(frozen=True, slots=True)
class _Place:
    """Rows first ... last - 1 of a shard."""

    shard: Path
    first: int
    last: int


class StateFolder:
    """States on disk. `taps` says which layers they are of; a folder with others is refused."""

    def __init__(self, folder: Path, taps: Sequence[int]) -> None:
        """ValueError if the folder's states are of other layers."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._taps = list(taps)
        self._places: dict[int, _Place] = {}
        self._open: dict[Path, Any] = {}
        for shard in sorted(folder.glob("states-*.safetensors")):
            self._take(shard)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, number: int, sample: Sample) -> TargetStates:
        place = self._places[number]
        shard = self._open.get(place.shard)
        if shard is None:
            shard = self._open[place.shard] = safe_open(place.shard, framework="pt")
        rows = slice(place.first, place.last)
        return TargetStates(shard.get_slice("taps")[rows], shard.get_slice("final")[rows])

    def add(self, numbers: Sequence[int], states: Sequence[TargetStates]) -> None:
        """Writes one shard, whole or not at all."""
        ends = np.cumsum([len(state.final) for state in states]).tolist()
        tensors = {
            "taps": torch.cat([state.taps for state in states]),
            "final": torch.cat([state.final for state in states]),
        }
        about = {"taps": self._taps, "numbers": list(numbers), "ends": ends}
        shard = self._folder / f"states-{numbers[0]:08d}.safetensors"
        unfinished = shard.with_suffix(".unfinished")
        save_file(tensors, unfinished, metadata={"about": json.dumps(about)})
        unfinished.rename(shard)
        self._take(shard)

    def _take(self, shard: Path) -> None:
        with safe_open(shard, framework="pt") as tensors:
            about = json.loads(tensors.metadata()["about"])
        if about["taps"] != self._taps:
            raise ValueError(
                f"{shard}: has the layers {about['taps']}, not {self._taps}; choose another folder"
            )
        first = 0
        for number, last in zip(about["numbers"], about["ends"], strict=True):
            self._places[number] = _Place(shard, first, last)
            first = last


def write_states(
    source: ComputedStates,
    samples: Iterable[tuple[int, Sample]],
    folder: StateFolder,
    on_progress: Callable[[int], None],
) -> None:
    """Computes and writes the states of all samples that the folder lacks; tells the samples done after each shard."""
    missing = ((number, sample) for number, sample in samples if number not in folder)
    while shard := list(islice(missing, SHARD_SAMPLES)):
        states = [state for group in _groups([sample for _, sample in shard]) for state in source.of(group)]
        folder.add([number for number, _ in shard], states)
        on_progress(len(folder))


def _groups(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Samples for one forward each: about FORWARD_ROWS rows, at least one sample."""
    group: list[Sample] = []
    rows = 0
    for sample in samples:
        if group and rows + len(sample.token_ids) > FORWARD_ROWS:
            yield group
            group, rows = [], 0
        group.append(sample)
        rows += len(sample.token_ids)
    if group:
        yield group
