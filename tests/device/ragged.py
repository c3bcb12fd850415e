"""Drives a flat model by sequences: what a scheduler would do, in few lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from sparkrelay.device.flat_batch import FlatBatch, FlatEntry
from sparkrelay.device.flat_model import FlatCausalLM
from sparkrelay.device.slab import SlabState

Ids = NDArray[np.int64]


@dataclass(slots=True)
class Line:
    """A sequence whose ids are known beforehand, and the logits that the model gave for its rows."""

    ids: Ids
    state: SlabState
    rows: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return len(self.ids) - self.state.length


def step(model: FlatCausalLM, parts: Sequence[tuple[Line, int]], kept_from: int = 0) -> None:
    """One forward: each sequence's next rows. The rows at positions >= kept_from are kept."""
    entries, ids, kept, owners, first = [], [], [], [], 0
    for sequence, count in parts:
        start = sequence.state.length
        entries.append(FlatEntry(sequence.state, start, count))
        ids.append(sequence.ids[start : start + count])
        for row in range(count):
            if start + row >= kept_from:
                kept.append(first + row)
                owners.append((sequence, start + row))
        first += count
    logits = model.forward(FlatBatch(np.concatenate(ids), tuple(entries), np.array(kept, dtype=np.int64)))
    for (sequence, position), row in zip(owners, logits, strict=True):
        sequence.rows[position] = row


def run(model: FlatCausalLM, ids: Ids, chunks: Iterable[int], kept_from: int = 0) -> Line:
    """A sequence alone, in chunks of the given sizes (the last one cut to fit)."""
    sequence = Line(ids, model.new_state())
    for chunk in chunks:
        if sequence.left:
            step(model, [(sequence, min(chunk, sequence.left))], kept_from)
    assert not sequence.left, "the chunks did not cover the sequence"
    return sequence
