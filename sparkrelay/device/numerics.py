"""Does exact mode hold on this machine? Asked once at start, by running what it promises on the loaded model.

That a row's bits do not depend on its neighbours is a property of the matrix kernels of one torch build on one instruction set;
it was measured, not proven. The probe takes the model's own linear shapes at several row counts, its attention at several
alignments of its keys, and whole forwards of one sequence in pieces and in company. If rows padded to a multiple of 4
are not enough it tries 8, then 16, each with shorter and shorter sums over values.

Two processes of equal fingerprints compute the same bits: the fingerprint is a hash of a fixed forward's logits.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from sparkrelay.device.attention_step import AttentionStep
from sparkrelay.device.flat_attention import AttentionCall
from sparkrelay.device.flat_batch import FlatBatch, FlatEntry
from sparkrelay.device.flat_model import FlatCausalLM
from sparkrelay.device.product_attention import VALUE_KEYS
from sparkrelay.device.slab import KVLayout, LayerPlace, SlabKind, SlabPool, SlabState
from sparkrelay.device.step_profile import Stopwatch

RECIPE_VERSION: Final = 2
ROW_MULTIPLES: Final = (4, 8, 16)
LINEAR_ROWS: Final = (4, 8, 12, 16, 64, 256)
LARGE_WEIGHT: Final = 1 << 26
"""Numbers in a weight from which 256 rows take too long for a start; 64 are probed."""
PROBE_TOKENS: Final = 24
ATTENTION_SPANS: Final = tuple(
    range(border - 6, border + 6) for border in (64, 128, 192, 256, 320, 384, 512, 960, 1024)
)
"""Positions on both sides of borders: of key ranges, and of what libraries were seen to add up in one go."""
ATTENTION_KEYS: Final = 1100


@dataclass(frozen=True, slots=True)
class Numerics:
    """What the probe found.

    exact         whether a row's logits depend on its own prefix alone, here and with this model
    row_multiple  the padding that exactness took; 1 where it is not exact
    reason        why not; "" where it is
    fingerprint   16 hex digits; equal ones mean equal bits
    description   what decides them, for people: torch, instruction set, dtype, recipe, rows
    """

    exact: bool
    row_multiple: int
    reason: str
    fingerprint: str
    description: str


def probe(model: FlatCausalLM) -> Numerics:
    """Sets the model's row multiple to the smallest one that is exact, or to 1, and says which and why. About two seconds."""
    if not model.exact:
        return _found(model, "exact mode is switched off")
    reason: str | None = None
    for row_multiple, value_keys in itertools.product(ROW_MULTIPLES, VALUE_KEYS[model.dtype]):
        model.row_multiple, model.value_keys = row_multiple, value_keys
        reason = _first_failure(model)
        if reason is None:
            return _found(model, "")
    model.row_multiple, model.value_keys = 1, VALUE_KEYS[model.dtype][0]
    return _found(model, f"{reason}, even with rows padded to a multiple of {ROW_MULTIPLES[-1]}")


def _found(model: FlatCausalLM, reason: str) -> Numerics:
    machine = (
        torch.backends.cpu.get_cpu_capability()
        if model.device.type == "cpu"
        else torch.cuda.get_device_name(model.device)
    )
    dtype = str(model.dtype).removeprefix("torch.")
    description = (
        f"torch {torch.__version__}, {machine}, {dtype}, recipe {RECIPE_VERSION}, rows x{model.row_multiple}, "
        f"values x{model.value_keys}"
    )
    logits = _logits_in_pieces(model, (PROBE_TOKENS,), company=False)
    digest = hashlib.sha256(description.encode() + logits.numpy(force=True).tobytes()).hexdigest()
    return Numerics(not reason, model.row_multiple, reason, digest[:16], description)


def _first_failure(model: FlatCausalLM) -> str | None:
    """What depends on the neighbours with the model's present row multiple, in words; None if nothing does."""
    checks: tuple[Callable[[FlatCausalLM], str | None], ...] = (
        _linear_failure,
        _attention_failure,
        _model_failure,
    )
    with torch.inference_mode():
        return next((failure for check in checks if (failure := check(model)) is not None), None)


def _linear_failure(model: FlatCausalLM) -> str | None:
    generator = torch.Generator().manual_seed(1)
    seen: set[tuple[int, int]] = set()
    for module in model.linears():
        shape = (int(module.in_features), int(module.out_features))  # type: ignore[arg-type]
        if shape in seen:
            continue
        seen.add(shape)
        most = LINEAR_ROWS[-1] if shape[0] * shape[1] < LARGE_WEIGHT else LINEAR_ROWS[-2]
        rows = torch.randn(most, shape[0], generator=generator).to(model.device, model.dtype)
        together = module(rows)
        for count in (count for count in LINEAR_ROWS if count < most and count % model.row_multiple == 0):
            if not torch.equal(module(rows[:count].clone()), together[:count]):
                return f"a linear layer {shape[0]} x {shape[1]} gives other bits for {count} rows than for {most}"
    return None


def _attention_failure(model: FlatCausalLM) -> str | None:
    for kind in model.layout.kinds:
        for span in ATTENTION_SPANS:
            together = _attend(model, kind, [span])
            alone = torch.cat([_attend(model, kind, [range(position, position + 1)]) for position in span])
            company = [span, range(span.start + 200, span.stop + 200), range(40, 43)]
            crowded = _attend(model, kind, [each for each in company if each.stop <= ATTENTION_KEYS])
            if not torch.equal(together, alone) or not torch.equal(together, crowded[: len(span)]):
                return f"attention with {kind.kv_heads} key heads of {kind.key_dim} gives other bits alone than in company"
    return None


def _attend(model: FlatCausalLM, kind: SlabKind, spans: list[range]) -> torch.Tensor:
    """[rows, query heads, dim] of fixed random queries at the spans' positions over fixed random keys and values."""
    query_heads = int(model.config.num_attention_heads)
    layout = KVLayout((kind,), (1,), (LayerPlace(0, 0, writes=True, window=None),))
    pool = SlabPool(layout, model.dtype, model.device)
    entries, parts = [], []
    for span in spans:
        queries, keys, values = _random_rows(model, kind, query_heads)
        state = SlabState(pool)
        state.reserve(span.stop)
        state.keys[0][0, :, : span.start] = keys[:, : span.start]
        state.values[0][0, :, : span.start] = values[:, : span.start]
        state.length = span.start
        entries.append(FlatEntry(state, span.start, len(span)))
        parts.append([rows[:, span.start : span.stop] for rows in (queries, keys, values)])
    query, key, value = (torch.cat(rows, dim=1)[None] for rows in zip(*parts, strict=True))
    step = AttentionStep(
        layout, entries, query.shape[2], model.row_multiple, model.value_keys, model.device, Stopwatch()
    )
    call = AttentionCall(0, query, key, value, kind.key_dim**-0.5, window=None, softcap=None, sinks=None)
    return step.attend(call)[0]


def _random_rows(
    model: FlatCausalLM, kind: SlabKind, query_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of ATTENTION_KEYS positions, [heads, positions, dim]; the same at every call."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((query_heads, kind.key_dim), (kind.kv_heads, kind.key_dim), (kind.kv_heads, kind.value_dim))
    queries, keys, values = (
        torch.randn(heads, ATTENTION_KEYS, dim, generator=generator).to(model.device, model.dtype)
        for heads, dim in shapes
    )
    return queries, keys, values


def _model_failure(model: FlatCausalLM) -> str | None:
    together = _logits_in_pieces(model, (PROBE_TOKENS,), company=False)
    for pieces in ((16, 1, 1, 1, 5), (3, 8, 13)):
        for company in (False, True):
            if not torch.equal(together, _logits_in_pieces(model, pieces, company=company)):
                return "the whole model gives other logits for the same tokens in pieces or in company"
    return None


def _logits_in_pieces(model: FlatCausalLM, pieces: tuple[int, ...], *, company: bool) -> torch.Tensor:
    """[PROBE_TOKENS, vocab] of a fixed text, run in steps of the given sizes; with company, another text shares each step."""
    ids = (np.arange(PROBE_TOKENS, dtype=np.int64) * 7919 + 11) % model.vocab_size
    state, other = model.new_state(), model.new_state()
    logits = []
    for count in pieces:
        start = state.length
        entries = [FlatEntry(state, start, count)]
        rows = [ids[start : start + count]]
        if company:
            entries.insert(0, FlatEntry(other, other.length, 3))
            rows.insert(0, np.full(3, 5 % model.vocab_size))
        kept = np.arange(count, dtype=np.int64) + (3 if company else 0)
        logits.append(model.forward(FlatBatch(np.concatenate(rows), tuple(entries), kept)))
    return torch.cat(logits)
