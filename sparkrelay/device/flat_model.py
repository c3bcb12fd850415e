"""A Hugging Face causal language model, unmodified, on one flat ragged batch of many sequences.

The sequences' state is ours (`SlabState`); the model sees one long row of tokens without a cache, and its attention layers come
back to `AttentionStep`. In exact mode a row's logits are a function of its own prefix alone, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from sparkrelay.device.attention_step import AttentionStep
from sparkrelay.device.direct_decoder import DirectDecoder
from sparkrelay.device.flat_attention import (
    ATTENTION_NAME,
    AttentionPlan,
    UnsupportedAttention,
    register_attention,
)
from sparkrelay.device.flat_batch import FlatBatch, FlatEntry
from sparkrelay.device.kv_layout import LayoutRecorder, UnsupportedModel, layout_of
from sparkrelay.device.packed_linear import PackedLinear, pack_linears
from sparkrelay.device.padded_experts import register_experts
from sparkrelay.device.product_attention import VALUE_KEYS
from sparkrelay.device.slab import KVLayout, SlabPool, SlabState, round_up
from sparkrelay.device.step_profile import Stopwatch

__all__ = ["FlatBatch", "FlatCausalLM", "FlatEntry", "FlatOutput", "UnsupportedModel"]

DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NEIGHBOUR_DEPENDENT_ROPE: Final = frozenset({"dynamic", "longrope"})
"""RoPE variants of transformers that scale every row by the largest position in the batch."""
ROW_MULTIPLE: Final = 4
"""Rows of exact mode's products; smaller and odd counts go through other kernels. `numerics` may find that 8 or 16 are needed."""

COMPARED_ROWS: Final = 16
DIRECT_TOLERANCE: Final = {torch.bfloat16: 0.1, torch.float32: 1e-4}
"""How far the logits of layers that are written out may be from the model's own, as a share of their norm."""

DtypeName = Literal["bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class FlatOutput:
    """logits float32 [K, vocab] of the kept rows; taps by layer, [T, hidden] of all rows in the model's dtype."""

    logits: torch.Tensor
    taps: Mapping[int, torch.Tensor]


class FlatCausalLM:
    """A loaded model. One thread uses it."""

    def __init__(
        self, model: Any, *, exact: bool, device: torch.device, name: str, stopwatch: Stopwatch
    ) -> None:
        """`model` is a transformers causal LM in evaluation mode with attention `sparkrelay`. See `load`."""
        self._model = model
        self._device = device
        self._stopwatch = stopwatch
        self.name = name
        self.exact = exact
        self._row_multiple = 1
        self.row_multiple = ROW_MULTIPLE if exact else 1
        self.config = model.config.get_text_config()
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        self.value_keys = VALUE_KEYS[self.dtype][0]
        self.hidden_size = int(self.config.hidden_size)
        self.layout: KVLayout
        self.vocab_size: int
        self.layout, self.vocab_size = self._explore()
        self._pool = SlabPool(self.layout, self.dtype, device)
        self._direct: DirectDecoder | None = None

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        dtype: DtypeName = "bfloat16",
        exact: bool = True,
        device: str = "cpu",
        stopwatch: Stopwatch | None = None,
    ) -> FlatCausalLM:
        """Loads a local checkpoint folder. UnsupportedModel: it cannot be computed here, or not exactly. OSError: no model.

        stopwatch  is told what products and attention take
        """
        stopwatch = stopwatch or Stopwatch()
        register_attention()
        with _quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=DTYPES[dtype], attn_implementation=ATTENTION_NAME, local_files_only=True
            )
        name = Path(path).name
        _check_config(model, name, exact)
        model.eval().requires_grad_(False).to(device)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.clone()  # out of the file's memory map: aligned, and the file may go
        flat = cls(model, exact=exact, device=torch.device(device), name=name, stopwatch=stopwatch)
        if device == "cpu":
            pack_linears(model, stopwatch)
            flat._write_out()
        return flat

    @property
    def context_limit(self) -> int:
        """Positions that the model was made for."""
        return int(self.config.max_position_embeddings)

    @property
    def layer_count(self) -> int:
        return len(self.layout.places)

    @property
    def row_multiple(self) -> int:
        """Every product has a multiple of so many rows; 1 is no padding (not exact)."""
        return self._row_multiple

    @row_multiple.setter
    def row_multiple(self, multiple: int) -> None:
        self._row_multiple = multiple
        if self.exact and self._model._can_set_experts_implementation():
            self._model.set_experts_implementation(register_experts(multiple))

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """End-of-turn ids of the checkpoint's generation config, else of its config; ascending."""
        generation = getattr(self._model, "generation_config", None)
        ids = getattr(generation, "eos_token_id", None)
        if ids is None:
            ids = self.config.eos_token_id
        if ids is None:
            return ()
        return tuple(sorted({int(i) for i in ids})) if isinstance(ids, (list, tuple)) else (int(ids),)

    def linears(self) -> Iterator[torch.nn.Module]:
        """The linear layers, for the probe of `numerics`."""
        return (
            module for module in self._model.modules() if isinstance(module, (torch.nn.Linear, PackedLinear))
        )

    def new_state(self) -> SlabState:
        """An empty sequence."""
        return SlabState(self._pool)

    def forward(self, batch: FlatBatch) -> torch.Tensor:
        """Logits of the kept rows, float32 [K, vocab]; the entries' states then hold the rows of the batch."""
        return self.forward_with_taps(batch, ()).logits

    @torch.inference_mode()
    def forward_with_taps(self, batch: FlatBatch, taps: Sequence[int]) -> FlatOutput:
        """As `forward`, with the hidden states that leave the layers numbered in `taps`, of all rows; -1 is the embedding."""
        row_count, kept_count = len(batch.token_ids), len(batch.kept_rows)
        padded_count = round_up(row_count, self._row_multiple)
        step = AttentionStep(
            self.layout,
            batch.entries,
            padded_count,
            self._row_multiple,
            self.value_keys,
            self._device,
            self._stopwatch,
        )
        ids = _padded(batch.token_ids, padded_count)
        positions = _padded(batch.positions(), padded_count)
        kept = _padded(batch.kept_rows, round_up(kept_count, self._row_multiple))
        if self._direct is not None:
            logits, hidden = self._call_direct(self._direct, ids, positions, kept, step, taps)
        else:
            with self._tapped(taps) as hidden:
                logits = self._call(ids, positions, kept, step)
        for entry in batch.entries:
            entry.state.length = entry.end
        return FlatOutput(
            logits[:kept_count].float(), {layer: rows[:row_count] for layer, rows in hidden.items()}
        )

    def _call(
        self, ids: np.ndarray, positions: np.ndarray, kept: np.ndarray, plan: AttentionPlan
    ) -> torch.Tensor:
        """One call of the model with [T] ids; the logits [K, vocab] of the rows `kept`, in the model's dtype."""
        output = self._model(
            input_ids=torch.from_numpy(ids).to(self._device)[None],
            position_ids=torch.from_numpy(positions).to(self._device)[None],
            past_key_values=None,
            use_cache=False,
            logits_to_keep=torch.from_numpy(kept).to(self._device),
            batch=plan,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _call_direct(
        self,
        direct: DirectDecoder,
        ids: np.ndarray,
        positions: np.ndarray,
        kept: np.ndarray,
        plan: AttentionStep,
        taps: Sequence[int],
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """As `_call`, without the model's own modules; and the hidden states of the tapped layers."""
        hidden: dict[int, torch.Tensor | None] = dict.fromkeys(taps)
        rows, places, wanted = (
            torch.from_numpy(numbers).to(self._device) for numbers in (ids, positions, kept)
        )
        logits = direct.forward(rows, places, wanted, plan, hidden)
        return logits, {layer: rows for layer, rows in hidden.items() if rows is not None}

    def _write_out(self) -> None:
        """Lets the layers be computed directly from now on, where that is possible and gives what the model's own modules do."""
        direct = DirectDecoder.of(self._model)
        if direct is None:
            return
        ids = np.arange(COMPARED_ROWS, dtype=np.int64) * 7919 % self.vocab_size
        batches = [
            FlatBatch(ids, (FlatEntry(self.new_state(), 0, len(ids)),), np.arange(len(ids))) for _ in "12"
        ]
        own = self.forward(batches[0])
        self._direct = direct
        difference = (self.forward(batches[1]) - own).norm() / own.norm()
        if not difference <= DIRECT_TOLERANCE[self.dtype]:
            self._direct = None

    @torch.inference_mode()
    def _explore(self) -> tuple[KVLayout, int]:
        """Layout and vocabulary size, from one forward of a few rows."""
        recorder = LayoutRecorder()
        rows = np.zeros(round_up(1, self._row_multiple), dtype=np.int64)
        try:
            logits = self._call(rows, rows, rows, recorder)
        except UnsupportedAttention as refusal:
            raise UnsupportedModel(self.name, str(refusal)) from refusal
        except TypeError as error:
            raise UnsupportedModel(self.name, f"its forward does not take a flat batch: {error}") from error
        return layout_of(recorder.calls, self.name, self.config), logits.shape[-1]

    @contextmanager
    def _tapped(self, taps: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Collects what leaves the layers; hooks, because transformers' own last hidden state is taken behind the final norm."""
        hidden: dict[int, torch.Tensor] = {}
        layers = self._model.get_decoder().layers if taps else ()

        def keep(layer: int, output: Any) -> None:
            hidden[layer] = (output[0] if isinstance(output, tuple) else output)[0]

        hooks = [
            (self._model.get_input_embeddings() if layer < 0 else layers[layer]).register_forward_hook(
                lambda module, given, output, layer=layer: keep(layer, output)
            )
            for layer in taps
        ]
        try:
            yield hidden
        finally:
            for hook in hooks:
                hook.remove()


def _padded(numbers: np.ndarray, count: int) -> np.ndarray:
    """int64 [count]: the numbers, then zeros (token 0 at position 0, or row 0)."""
    padded = np.zeros(count, dtype=np.int64)
    padded[: len(numbers)] = numbers
    return padded


def _check_config(model: Any, name: str, exact: bool) -> None:
    """Refuses, by the configuration, what a forward would not show."""
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(name, "it is an encoder-decoder; only causal language models are known here")
    if not model._supports_attention_backend:
        raise UnsupportedModel(
            name, "its attention cannot be reached through transformers' AttentionInterface"
        )
    refused = NEIGHBOUR_DEPENDENT_ROPE & set(_rope_types(getattr(config, "rope_parameters", None)))
    if exact and refused:
        raise UnsupportedModel(
            name,
            f"its RoPE is {', '.join(sorted(refused))}, which scales each row by the longest sequence of the batch, so that "
            "answers would depend on other users; serve it with exact mode off",
        )


def _rope_types(parameters: Any) -> Iterator[str]:
    """The rope types of a configuration, which may nest them by layer type."""
    if isinstance(parameters, Mapping):
        if isinstance(rope_type := parameters.get("rope_type"), str):
            yield rope_type
        for nested in parameters.values():
            yield from _rope_types(nested)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar: a service's log is not a terminal."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
