"""Attention over one flat ragged batch: the function that Hugging Face models call, and the plan of one step.

Models reach it through transformers' `AttentionInterface` under the name `sparkrelay` and pass the plan on as the keyword
`batch`. The name holds none of the words that transformers dispatches on (sdpa, flash, flex, paged), and no mask function is
registered for it, so transformers builds no mask.

Why a row's bits do not depend on its neighbours (exact mode; measured, and checked at start by `numerics`):
  rows   the query heads that share a key head are folded into rows and the rows padded to a multiple (the last one repeated),
         because matrix kernels compute small or odd row counts in another order
  keys   every key range starts and ends at an absolute multiple of 512, the block of torch's CPU kernel; what lies in it but is
         not visible is masked, and a masked key adds an exact zero
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sparkrelay.device.blockwise_attention import attend_in_blocks
from sparkrelay.device.flat_batch import FlatEntry
from sparkrelay.device.row_fold import Fold
from sparkrelay.device.slab import BLOCK_TOKENS, KVLayout, LayerPlace, round_up
from sparkrelay.device.step_profile import Stopwatch
from sparkrelay.device.workspace import Workspace

ATTENTION_NAME = "sparkrelay"
IGNORED_ARGUMENTS = frozenset({"position_ids", "use_cache", "cache_position"})
"""Keywords that models hand through and that say nothing about attention here: the plan knows the positions."""

GROUP_KEYS = 4096
"""Keys of all sequences that one kernel call takes: enough to fill it, few enough that their copies stay in the cache."""


class UnsupportedAttention(Exception):
    """A model asks its attention for something that this project does not compute."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's question.

    query      [1, query_heads, T, key_dim]
    key, value [1, kv_heads, T, key_dim or value_dim], of the batch's own rows
    sinks      [query_heads] or None: a logit per head that takes weight and gives no value
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


class AttentionPlan(Protocol):
    """What a model's layers are given as `batch`."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """The layer's output, [1, T, query_heads, value_dim]."""


def flat_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    batch: AttentionPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' signature of an attention function. UnsupportedAttention for arguments that would change the result."""
    unknown = {
        name for name, given in others.items() if given is not None and given is not False
    } - IGNORED_ARGUMENTS
    if unknown:
        raise UnsupportedAttention(
            f"its attention takes {', '.join(sorted(unknown))}, which is not known here"
        )
    if attention_mask is not None:
        raise UnsupportedAttention("it makes an attention mask of its own")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedAttention("its rows see later rows (bidirectional attention)")
    if dropout:
        raise UnsupportedAttention("it has attention dropout switched on")
    call = AttentionCall(
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return batch.attend(call), None


def register_attention() -> None:
    """Makes the name known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, flat_attention)


@dataclass(frozen=True, slots=True)
class _Group:
    """Some entries whose folded rows and key ranges are equally many: one call of the kernel.

    entries  indices into the batch's entries, n of them
    mask     what is added to the logits, 0 or -inf, [n, 1, rows, keys]
    members  int64 [rows]: which head of its group a folded row belongs to
    keys     by entry, by layer of the kind: [1, kv_heads, keys, key_dim], a view of the slab; values alike
    """

    entries: tuple[int, ...]
    mask: torch.Tensor
    members: torch.Tensor
    keys: tuple[Sequence[torch.Tensor], ...]
    values: tuple[Sequence[torch.Tensor], ...]


@dataclass(frozen=True, slots=True)
class _LayerPlan:
    """What layers of one kind, window and number of query heads have in common in this step.

    gather   int64: which of the flat [T * query_heads] rows come, group by group, as [entries, kv_heads, rows]
    scatter  int64 [T * query_heads]: where each row's result is in what the groups give, [entries, rows, kv_heads]
    """

    gather: torch.Tensor
    scatter: torch.Tensor
    groups: tuple[_Group, ...]


class AttentionStep:
    """The plan of one forward: row order, masks and views of the slabs, made once and used by every layer that is alike."""

    def __init__(
        self,
        layout: KVLayout,
        entries: Sequence[FlatEntry],
        padded_row_count: int,
        row_multiple: int,
        workspace: Workspace,
        stopwatch: Stopwatch,
    ) -> None:
        """padded_row_count: the forward's rows, those behind the entries' being padding whose output nobody reads."""
        self._workspace = workspace
        self._stopwatch = stopwatch
        self._layout = layout
        self._entries = entries
        self._row_multiple = row_multiple
        self._device = workspace.device
        self._padded_row_count = padded_row_count
        row_counts = [entry.row_count for entry in entries]
        self._first_rows = np.cumsum([0, *row_counts])
        self._splits = [*row_counts, padded_row_count - sum(row_counts)]
        for entry in entries:
            entry.state.reserve(entry.end)
        self._write_keys = [self._written(kind, "keys") for kind in range(len(layout.kinds))]
        self._write_values = [self._written(kind, "values") for kind in range(len(layout.kinds))]
        self._plans: dict[tuple[int, int, int | None], _LayerPlan] = {}

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """See `AttentionPlan`. Writes the rows' keys and values first, so that rows see each other."""
        begun = self._stopwatch.clock_ns()
        output = self._write_and_attend(call)
        self._stopwatch.attention_ns += self._stopwatch.clock_ns() - begun
        return output

    def _write_and_attend(self, call: AttentionCall) -> torch.Tensor:
        place = self._layout.places[call.layer]
        if place.writes:
            _write(self._write_keys[place.kind][place.index], call.key, self._splits)
            _write(self._write_values[place.kind][place.index], call.value, self._splits)
        _, query_heads, row_count, key_dim = call.query.shape
        plan = self._plan(query_heads, place, call.query.dtype)
        folded = (
            call.query.transpose(1, 2).reshape(row_count * query_heads, key_dim).index_select(0, plan.gather)
        )
        outputs, first = [], 0
        for group in plan.groups:
            shape = (len(group.entries), self._layout.kinds[place.kind].kv_heads, len(group.members))
            last = first + math.prod(shape)
            output = self._attend(folded[first:last].view(*shape, key_dim), group, place.index, call)
            outputs.append(output.transpose(1, 2).reshape(last - first, -1))
            first = last
        flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return flat.index_select(0, plan.scatter).view(1, row_count, query_heads, -1)

    def _attend(self, query: torch.Tensor, group: _Group, index: int, call: AttentionCall) -> torch.Tensor:
        """query [n, kv_heads, rows, key_dim] -> [n, kv_heads, rows, value_dim]. The kernel has no softcap and no sinks."""
        keys = self._workspace.together("keys", [views[index] for views in group.keys])
        values = self._workspace.together("values", [views[index] for views in group.values])
        if call.softcap is None and call.sinks is None:
            return scaled_dot_product_attention(query, keys, values, attn_mask=group.mask, scale=call.scaling)
        sinks = None if call.sinks is None else call.sinks.view(query.shape[1], -1)[:, group.members]
        return attend_in_blocks(
            query, keys, values, group.mask, scaling=call.scaling, softcap=call.softcap, sinks=sinks
        )

    def _written(self, kind: int, name: str) -> list[tuple[torch.Tensor, ...]]:
        """By layer of the kind, by entry: the view [kv_heads, row_count, dim] of the slab that the entry's rows fill."""
        by_entry = [
            getattr(entry.state, name)[kind].narrow(2, entry.start, entry.row_count).unbind(0)
            for entry in self._entries
        ]
        return list(zip(*by_entry, strict=True))

    def _plan(self, query_heads: int, place: LayerPlace, dtype: torch.dtype) -> _LayerPlan:
        plan = self._plans.get((query_heads, place.kind, place.window))
        if plan is None:
            plan = self._plans[query_heads, place.kind, place.window] = self._make_plan(
                query_heads, place, dtype
            )
        return plan

    def _make_plan(self, query_heads: int, place: LayerPlace, dtype: torch.dtype) -> _LayerPlan:
        kv_heads = self._layout.kinds[place.kind].kv_heads
        groups = alike(self._entries, place.window)
        scatter = np.zeros((self._padded_row_count, query_heads), dtype=np.int64)
        gathers: list[NDArray[np.int64]] = []
        folded_count = 0
        for numbers in groups:
            row_count = self._entries[numbers[0]].row_count
            fold = Fold(query_heads, kv_heads, row_count, self._row_multiple)
            for number in numbers:
                first_row = self._first_rows[number]
                gathers.append(first_row * query_heads + fold.gather())
                scatter[first_row : first_row + row_count] = folded_count + fold.scatter()
                folded_count += fold.rows * kv_heads
        return _LayerPlan(
            gather=torch.from_numpy(np.concatenate(gathers)).to(self._device),
            scatter=torch.from_numpy(scatter.reshape(-1)).to(self._device),
            groups=tuple(
                self._make_group(numbers, query_heads // kv_heads, place, dtype) for numbers in groups
            ),
        )

    def _make_group(self, numbers: list[int], group: int, place: LayerPlace, dtype: torch.dtype) -> _Group:
        entries = [self._entries[number] for number in numbers]
        spans = [key_range(entry, place.window) for entry in entries]
        fold = Fold(group, 1, entries[0].row_count, self._row_multiple)
        visible = np.stack(
            [
                visible_keys(entry.start + fold.offsets(), span, place.window)
                for entry, span in zip(entries, spans, strict=True)
            ]
        )
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(torch.from_numpy(~visible), float("-inf"))
        return _Group(
            entries=tuple(numbers),
            mask=mask.unsqueeze(1).to(self._device),
            members=torch.from_numpy(fold.members()).to(self._device),
            keys=tuple(
                _read(entry.state.keys[place.kind], span) for entry, span in zip(entries, spans, strict=True)
            ),
            values=tuple(
                _read(entry.state.values[place.kind], span)
                for entry, span in zip(entries, spans, strict=True)
            ),
        )


def alike(entries: Sequence[FlatEntry], window: int | None) -> list[list[int]]:
    """Indices of entries that one call can serve, as they have equally many rows and keys; at most GROUP_KEYS keys together."""
    groups: list[list[int]] = []
    open_groups: dict[tuple[int, int], list[int]] = {}
    for number, entry in enumerate(entries):
        first, last = key_range(entry, window)
        keys = last - first
        group = open_groups.get((entry.row_count, keys))
        if group is None or (len(group) + 1) * keys > GROUP_KEYS:
            group = open_groups[entry.row_count, keys] = []
            groups.append(group)
        group.append(number)
    return groups


def key_range(entry: FlatEntry, window: int | None) -> tuple[int, int]:
    """First key and the one behind the last that the entry's rows are given, both absolute multiples of 512."""
    first_visible = 0 if window is None else max(0, entry.start - window + 1)
    return first_visible // BLOCK_TOKENS * BLOCK_TOKENS, round_up(entry.end, BLOCK_TOKENS)


def visible_keys(
    positions: NDArray[np.int64], key_span: tuple[int, int], window: int | None
) -> NDArray[np.bool_]:
    """[rows, keys]: whether a row at `positions` sees a key: not later than itself, and one of the last `window`."""
    rows, keys = positions[:, None], np.arange(*key_span)[None, :]
    visible: NDArray[np.bool_] = keys <= rows
    return visible if window is None else visible & (keys > rows - window)


def _read(slab: torch.Tensor, span: tuple[int, int]) -> Sequence[torch.Tensor]:
    """By layer: the view [1, kv_heads, keys of the span, dim]."""
    return slab.narrow(2, span[0], span[1] - span[0]).unsqueeze(1).unbind(0)


def _write(destinations: Sequence[torch.Tensor], source: torch.Tensor, splits: list[int]) -> None:
    """source [1, kv_heads, T, dim] -> each entry's view of its slab; what is behind the entries' rows is padding."""
    for destination, rows in zip(
        destinations, torch.split_with_sizes(source[0], splits, dim=1), strict=False
    ):
        destination.copy_(rows)
