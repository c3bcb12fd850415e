"""A Hugging Face causal language model as the engine's target: sequence ids outside, slabs and a flat forward inside."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sparkrelay.device.flat_batch import FlatBatch, FlatEntry
from sparkrelay.device.flat_model import DtypeName, FlatCausalLM
from sparkrelay.device.numerics import Numerics, probe
from sparkrelay.device.projector import Projector, load_projector
from sparkrelay.device.slab import BLOCK_TOKENS, SlabState
from sparkrelay.device.step_profile import Stopwatch
from verifier_service.context_rows import ContextRowStore
from verifier_service.models import ContextInfo, ContextWords, FloatRows, ModelInfo
from verifier_service.ragged_batch import RaggedBatch

TOKENIZER_FILE = "tokenizer.json"


class HuggingFaceModel:
    """See `TargetModel`. State is keys and values by position, so a rewind goes back exactly as far as it is asked to."""

    def __init__(
        self,
        model: FlatCausalLM,
        numerics: Numerics,
        *,
        model_id: str,
        tokenizer_hash: str,
        projector: Projector | None = None,
    ) -> None:
        self._model = model
        self._states: dict[int, SlabState] = {}
        self._projector = projector
        self._context = ContextRowStore(projector.width) if projector is not None else None
        row_bytes = self._context.bytes_per_token if self._context is not None else 0
        self._info = ModelInfo(
            model_id=model_id,
            vocab_size=model.vocab_size,
            context_limit=model.context_limit,
            block_tokens=BLOCK_TOKENS,
            block_bytes=BLOCK_TOKENS * (model.layout.bytes_per_token(model.dtype) + row_bytes),
            default_stop_ids=model.stop_ids,
            dtype=str(model.dtype).removeprefix("torch."),
            exact=numerics.exact,
            exact_reason=numerics.reason,
            numerics=numerics.fingerprint,
            tokenizer_hash=tokenizer_hash,
            context=ContextInfo(projector.tap_layers, projector.width, projector.hash) if projector else None,
        )

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        model_id: str,
        dtype: DtypeName = "bfloat16",
        exact: bool = True,
        device: str = "cpu",
        stopwatch: Stopwatch | None = None,
        context: Path | None = None,
    ) -> HuggingFaceModel:
        """Loads a checkpoint folder and probes it. UnsupportedModel says what cannot be served. The stopwatch is the engine's.

        context  a draft's folder: its projector makes context rows. UnusableProjector says why it cannot
        """
        model = FlatCausalLM.load(path, dtype=dtype, exact=exact, device=device, stopwatch=stopwatch)
        projector = None
        if context is not None:
            size, layer_count = model.hidden_size, model.layer_count
            projector = load_projector(context, hidden_size=size, layer_count=layer_count, device=device)
        return cls(
            model,
            probe(model),
            model_id=model_id,
            tokenizer_hash=_file_hash(path / TOKENIZER_FILE),
            projector=projector,
        )

    @property
    def info(self) -> ModelInfo:
        return self._info

    def open(self, sequence_id: int) -> None:
        assert sequence_id not in self._states, f"sequence {sequence_id} is open already"
        self._states[sequence_id] = self._model.new_state()
        if self._context is not None:
            self._context.open(sequence_id)

    def resize(self, sequence_id: int, block_ids: Sequence[int]) -> None:
        """A slab is contiguous: the blocks' number is its size, and where they point does not matter."""
        capacity = len(block_ids) * BLOCK_TOKENS
        self._states[sequence_id].resize(capacity)
        if self._context is not None:
            self._context.resize(sequence_id, capacity)

    def rewind(self, sequence_id: int, length: int) -> int:
        state = self._states[sequence_id]
        state.rewind(min(length, state.length))
        return state.length

    def fork(self, source_id: int, sequence_id: int, length: int) -> int:
        """Copies: a slab belongs to one sequence."""
        source, state = self._states[source_id], self._states[sequence_id]
        state.copy_from(source, min(length, source.length, state.capacity))
        if self._context is not None:
            self._context.copy(source_id, sequence_id, state.length)
        return state.length

    def close(self, sequence_id: int) -> None:
        self._states.pop(sequence_id).close()
        if self._context is not None:
            self._context.close(sequence_id)

    def context_rows(self, sequence_id: int, start: int, end: int) -> ContextWords:
        assert self._context is not None, "a target without a context has no rows"
        assert end <= self._states[sequence_id].length, "rows of positions that are not remembered"
        return self._context.get(sequence_id, start, end)

    def forward(self, batch: RaggedBatch) -> FloatRows:
        entries = tuple(
            FlatEntry(self._states[part.sequence_id], part.start, part.row_count) for part in batch.segments
        )
        for entry in entries:
            assert entry.end <= entry.state.capacity, "rows beyond the room that the engine has given"
        flat = FlatBatch(batch.token_ids, entries, batch.logit_rows)
        if self._projector is None or self._context is None:
            logits: FloatRows = self._model.forward(flat).numpy(force=True)
            return logits
        output = self._model.forward_with_taps(flat, self._projector.tap_layers)
        rows = self._projector.rows(output.taps, self._model.row_multiple)
        words = rows.view(torch.int16).numpy(force=True).view(np.uint16)
        starts = batch.row_starts.tolist()
        for part, first, last in zip(batch.segments, starts, starts[1:], strict=False):
            self._context.put(part.sequence_id, part.start, words[first:last])
        return output.logits.numpy(force=True)


def _file_hash(path: Path) -> str:
    """sha256 of the file in hex, "" where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
