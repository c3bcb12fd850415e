"""What state a model's sequences need, found by watching one forward instead of reading each family's configuration.

The forward runs with a plan that records what every layer asks for. What a layer has no slab for (a state of its own, a window
that it does not mention, attention in chunks) is refused here by name, because it would otherwise be wrong and silent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sparkrelay.device.flat_attention import AttentionCall
from sparkrelay.device.slab import KVLayout, LayerPlace, SlabKind

KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


class UnsupportedModel(Exception):
    """A model that cannot be served: which one, what it does, and why that is not possible."""

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(f"{model} cannot be served: {reason}")
        self.model = model
        self.reason = reason


@dataclass(slots=True)
class LayoutRecorder:
    """An `AttentionPlan` that answers zeros and remembers the questions."""

    calls: list[AttentionCall] = field(default_factory=list)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        _, query_heads, row_count, _ = call.query.shape
        return call.value.new_zeros(1, row_count, query_heads, call.value.shape[3])


def layout_of(calls: list[AttentionCall], model: str, config: Any) -> KVLayout:
    """The layout of a forward's calls; `config` is the model's text configuration. UnsupportedModel where one is not enough."""
    _check_layers(calls, model, config)
    kinds: dict[SlabKind, int] = {}
    layer_counts: list[int] = []
    writer_of: dict[int, LayerPlace] = {}
    places: list[LayerPlace] = []
    for call in sorted(calls, key=lambda call: call.layer):
        shared = writer_of.get(id(call.key))
        if shared is not None:
            places.append(LayerPlace(shared.kind, shared.index, writes=False, window=call.window))
            continue
        kind = SlabKind(call.key.shape[1], call.key.shape[3], call.value.shape[3])
        number = kinds.setdefault(kind, len(kinds))
        if number == len(layer_counts):
            layer_counts.append(0)
        place = LayerPlace(number, layer_counts[number], writes=True, window=call.window)
        layer_counts[number] += 1
        writer_of[id(call.key)] = place
        places.append(place)
    return KVLayout(tuple(kinds), tuple(layer_counts), tuple(places))


def _check_layers(calls: list[AttentionCall], model: str, config: Any) -> None:
    layer_count = int(config.num_hidden_layers)
    layer_types = list(getattr(config, "layer_types", None) or [])
    for layer_type in layer_types:
        if layer_type not in KNOWN_LAYER_TYPES:
            raise UnsupportedModel(
                model, f"it has layers of type {layer_type}; known are full and sliding attention"
            )
    if sorted(call.layer for call in calls) != list(range(layer_count)):
        reason = f"{len(calls)} of its {layer_count} layers reach attention through transformers' AttentionInterface"
        raise UnsupportedModel(
            model, f"{reason}; the others keep a state that is not keys and values by position"
        )
    for call in calls:
        if layer_types and (layer_types[call.layer] == "sliding_attention") != (call.window is not None):
            raise UnsupportedModel(
                model,
                f"layer {call.layer} is of type {layer_types[call.layer]} but asks for a window of {call.window}",
            )
    if (
        not layer_types
        and getattr(config, "sliding_window", None)
        and all(call.window is None for call in calls)
    ):
        raise UnsupportedModel(model, "its configuration names a sliding window that no layer asks for")
