"""The drafting form: a session's context keys and values are kept, and each verdict appends a few rows to them.

The keys and values of a block's own slots are used once and dropped: what was accepted comes back as context rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from drafter_service.models.dspark.config import DraftConfig, LayerShape
from drafter_service.models.dspark.layers import KeysValues
from drafter_service.models.dspark.network import DSparkNetwork

GROWTH: Final = 512
"""Positions by which a cache grows, and the multiple to which a block's keys are padded: with this, and rows in multiples of
ROW_MULTIPLE, the numbers do not depend on the pieces in which the context came (the CPU kernels' block sizes)."""
ROW_MULTIPLE: Final = 4


class ContextCache:
    """One session's context: keys and values by layer, and which positions have any.

    A position without rows (the verifier had none to send) is masked, never zero: a zero key would still take weight.
    """

    def __init__(self, shape: LayerShape, layer_count: int, dtype: torch.dtype) -> None:
        self._shape = (layer_count, 2, shape.num_key_value_heads)
        self._head_dim = shape.head_dim
        self._dtype = dtype
        self.length = 0
        self._rows = torch.zeros(*self._shape, 0, shape.head_dim, dtype=dtype)
        self._known = torch.zeros(0, dtype=torch.bool)

    @property
    def byte_count(self) -> int:
        """Memory of the keys and values."""
        return self._rows.numel() * self._rows.element_size()

    def append(self, layers: Sequence[KeysValues], start: int) -> None:
        """Keys and values of positions start ... by layer; positions between `length` and `start` stay unknown."""
        count = len(layers[0].keys)
        assert start >= self.length, f"position {start} is known already: {self.length} are"
        self._reserve(start + count)
        self._known[self.length : start] = False
        self._known[start : start + count] = True
        for kept, (keys, values) in zip(self._rows, layers, strict=True):
            kept[0, :, start : start + count] = keys.transpose(0, 1)
            kept[1, :, start : start + count] = values.transpose(0, 1)
        self.length = start + count

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        self.length = min(self.length, length)

    def leave_out(self, length: int) -> None:
        """Positions between the present `length` and this one have no rows and never will."""
        if length > self.length:
            self._reserve(length)
            self._known[self.length : length] = False
            self.length = length

    def visible(self, end: int, capacity: int) -> Tensor:
        """bool [capacity]: which positions below `end` are known."""
        known = min(end, self.length)
        return pad(self._known[:known], (0, capacity - known))

    def layer(self, number: int, capacity: int) -> KeysValues:
        """Keys and values [kv_heads, capacity, head_dim] of a layer; behind `length` they mean nothing."""
        self._reserve(capacity)
        rows = self._rows[number, :, :, :capacity]
        return KeysValues(rows[0], rows[1])

    def _reserve(self, count: int) -> None:
        capacity = self._rows.shape[3]
        if count <= capacity:
            return
        wanted = -(-count // GROWTH) * GROWTH
        rows = torch.zeros(*self._shape, wanted, self._head_dim, dtype=self._dtype)
        rows[:, :, :, :capacity] = self._rows
        self._known = pad(self._known, (0, wanted - capacity))
        self._rows = rows


def new_cache(network: DSparkNetwork) -> ContextCache:
    """An empty cache in the network's own type."""
    return ContextCache(network.config, network.config.num_hidden_layers, network.hidden_norm.weight.dtype)


class NewContext(NamedTuple):
    """Context rows [n, hidden] of positions start ..., for a session's cache."""

    cache: ContextCache
    rows: Tensor
    start: int


def append_rows(network: DSparkNetwork, sessions: Sequence[NewContext]) -> None:
    """Context rows enter their sessions' caches, all in one pass."""
    if not sessions:
        return
    counts = [-(-len(new.rows) // ROW_MULTIPLE) * ROW_MULTIPLE for new in sessions]
    padded = [
        pad(new.rows, (0, 0, 0, count - len(new.rows))) for new, count in zip(sessions, counts, strict=True)
    ]
    positions = [
        torch.arange(new.start, new.start + count) for new, count in zip(sessions, counts, strict=True)
    ]
    layers = network.context_keys_values(torch.cat(padded), torch.cat(positions))
    first = 0
    for new, count in zip(sessions, counts, strict=True):
        own = slice(first, first + len(new.rows))
        new.cache.append([KeysValues(keys[own], values[own]) for keys, values in layers], new.start)
        first += count


def draft_hidden(
    network: DSparkNetwork, caches: Sequence[ContextCache], anchor_ids: Tensor, anchors: Tensor
) -> Tensor:
    """Final hidden states [sessions, gamma, hidden] of a block for each session.

    anchor_ids  int64 [sessions]
    anchors     int64 [sessions]: their positions; the context is what is known before them
    """
    padding = -len(anchor_ids) % ROW_MULTIPLE
    slots = network.slots(pad(anchor_ids, (0, padding)))
    positions = network.slot_positions(pad(anchors, (0, padding)))
    masks = [
        _mask(cache, int(anchor), network.config.slot_count)
        for cache, anchor in zip(caches, anchors, strict=True)
    ]
    attends = [
        _CachedAttention(number, caches, masks, network.config)
        for number in range(network.config.num_hidden_layers)
    ]
    return network.hidden(slots, positions, attends)[: len(anchor_ids)]


def _mask(cache: ContextCache, anchor: int, slot_count: int) -> Tensor:
    """bool [1, keys]: the context's keys, padded, then the block's own; every slot of a block sees the same."""
    capacity = -(-max(anchor, 1) // GROWTH) * GROWTH
    visible = cache.visible(anchor, capacity)
    return torch.cat([visible, visible.new_ones(slot_count)])[None]


class _CachedAttention:
    """One layer's `Attend`. Rows behind the sessions' are padding and get zeros."""

    def __init__(
        self, layer: int, caches: Sequence[ContextCache], masks: Sequence[Tensor], config: DraftConfig
    ) -> None:
        self._layer = layer
        self._caches = caches
        self._masks = masks
        self._slot_count = config.slot_count
        self._scale = config.attention_scale

    def __call__(self, queries: Tensor, own: KeysValues) -> Tensor:
        seen = torch.zeros_like(queries)
        for number, (cache, mask) in enumerate(zip(self._caches, self._masks, strict=True)):
            rows = slice(number * self._slot_count, (number + 1) * self._slot_count)
            context = cache.layer(self._layer, mask.shape[1] - self._slot_count)
            output = scaled_dot_product_attention(
                queries[rows].transpose(0, 1)[None],
                torch.cat([context.keys, own.keys[rows].transpose(0, 1)], dim=1)[None],
                torch.cat([context.values, own.values[rows].transpose(0, 1)], dim=1)[None],
                attn_mask=mask,
                scale=self._scale,
                enable_gqa=True,
            )
            seen[rows] = output[0].transpose(0, 1)
        return seen
