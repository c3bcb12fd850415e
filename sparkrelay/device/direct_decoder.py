"""The decoder layers of the Llama family written out for the few rows of a step.

transformers' own modules compute the same in twice as many operators, and on a small model half of a step was spent between
them. What is written out here takes its weights from the loaded model, which stays as it is: it is what every other family runs
on, and what this one is compared with at each load.

Differences in rounding, all of them fewer roundings than the original's in bfloat16: a norm rounds once, behind its weight; a
rotation rounds its sum once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.functional import silu

from sparkrelay.device.attention_step import AttentionStep
from sparkrelay.device.packed_linear import PackedLinear, SharedProduct

FAMILIES: Final = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
"""Classes of transformers whose layers are these, with or without biases, windows and norms of query and key."""


EMBEDDING: Final = -1
"""The layer number that stands for the embedding's output."""


class _NotWrittenOut(Exception):
    """A part of the model is not what this file knows."""


class RmsNorm:
    """x / rms(x) * weight, as one layer norm: [x, -x] has no mean, and its variance is the mean square of x."""

    __slots__ = ("_eps", "_shape", "_weight", "_width")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """weight: [width]"""
        self._width = len(weight)
        self._shape = (2 * self._width,)
        self._weight = torch.cat([weight, weight])
        self._eps = eps

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width]"""
        both = torch.cat((rows, -rows), dim=-1)
        return torch.layer_norm(both, self._shape, self._weight, None, self._eps, False)[..., : self._width]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer. queries, keys: heads; their norms only where the family has them."""

    query_heads: int
    kv_heads: int
    scaling: float
    input_norm: RmsNorm
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    qkv: SharedProduct
    output: SharedProduct
    inner_norm: RmsNorm
    gate_up: SharedProduct
    down: SharedProduct


class DirectDecoder:
    """The forward of a model of FAMILIES with packed weights."""

    def __init__(self, model: Any) -> None:
        """Raises what `of` catches."""
        base = model.model
        self._embedding: torch.Tensor = base.embed_tokens.weight
        self._rotations = base.rotary_emb
        self._layers = tuple(_layer(layer) for layer in base.layers)
        self._norm = _norm(base.norm)
        self._head = _alone(model.lm_head)
        config = model.config
        self._head_dim = int(base.layers[0].self_attn.head_dim)
        if config.hidden_act != "silu" or len(self._layers) != config.num_hidden_layers:
            raise _NotWrittenOut

    @classmethod
    def of(cls, model: Any) -> DirectDecoder | None:
        """None where the model is of another family, or its weights are not packed."""
        if type(model).__name__ not in FAMILIES:
            return None
        try:
            return cls(model)
        except (_NotWrittenOut, AttributeError):
            return None

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        kept: torch.Tensor,
        attention: AttentionStep,
        taps: dict[int, torch.Tensor | None],
    ) -> torch.Tensor:
        """ids, positions int64 [T]; kept int64 [K]: rows whose logits come back, [K, vocab].

        taps: each layer that is a key gets the hidden states that leave it, [T, hidden].
        """
        hidden = self._embedding.index_select(0, ids)
        if EMBEDDING in taps:
            taps[EMBEDDING] = hidden
        rotation = self._rotation(hidden, positions)
        for number, layer in enumerate(self._layers):
            query, key, value = self._rotated(layer, layer.qkv.rows(layer.input_norm(hidden)), rotation)
            attended = attention.attend_rows(number, query, key, value, scaling=layer.scaling)
            hidden = layer.output.rows(attended.flatten(1)).add_(hidden)
            gate, up = layer.gate_up.rows(layer.inner_norm(hidden)).chunk(2, dim=-1)
            hidden = layer.down.rows(silu(gate).mul_(up)).add_(hidden)
            if number in taps:
                taps[number] = hidden
        return self._head.rows(self._norm(hidden.index_select(0, kept)))

    def _rotation(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, 1, head_dim]; the sines of the first half carry the sign of the second half's contribution."""
        cosines, sines = (rows[0].unsqueeze(1) for rows in self._rotations(hidden[None], positions[None]))
        half = self._head_dim // 2
        return cosines, torch.cat((-sines[..., :half], sines[..., half:]), dim=-1)

    def _rotated(
        self, layer: _Layer, rows: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of the rows, [T, heads, head_dim], from their product [T, all heads * head_dim]."""
        heads = rows.view(len(rows), -1, self._head_dim)
        turned, value = heads.split_with_sizes((layer.query_heads + layer.kv_heads, layer.kv_heads), dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = turned.split_with_sizes((layer.query_heads, layer.kv_heads), dim=1)
            turned = torch.cat((layer.query_norm(query), layer.key_norm(key)), dim=1)
        cosines, sines = rotation
        turned = torch.addcmul(turned * cosines, turned.roll(self._head_dim // 2, dims=2), sines)
        query, key = turned.split_with_sizes((layer.query_heads, layer.kv_heads), dim=1)
        return query, key, value


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = _together(attention.q_proj, attention.k_proj, attention.v_proj)
    head_dim = int(attention.head_dim)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return _Layer(
        query_heads=qkv.sizes[0] // head_dim,
        kv_heads=qkv.sizes[1] // head_dim,
        scaling=float(attention.scaling),
        input_norm=_norm(layer.input_layernorm),
        query_norm=_norm(norms[0]) if norms[0] is not None else None,
        key_norm=_norm(norms[1]) if norms[1] is not None else None,
        qkv=qkv,
        output=_alone(attention.o_proj),
        inner_norm=_norm(layer.post_attention_layernorm),
        gate_up=_together(mlp.gate_proj, mlp.up_proj),
        down=_alone(mlp.down_proj),
    )


def _norm(module: Any) -> RmsNorm:
    return RmsNorm(module.weight, float(module.variance_epsilon))


def _together(*layers: Any) -> SharedProduct:
    """The one product of some packed layers, in this order and with nothing else in it."""
    products = {id(layer.product): layer.product for layer in layers if isinstance(layer, PackedLinear)}
    if len(products) != 1 or any(layer.number != place for place, layer in enumerate(layers)):
        raise _NotWrittenOut
    [product] = products.values()
    if len(product.sizes) != len(layers):
        raise _NotWrittenOut
    return product


def _alone(layer: Any) -> SharedProduct:
    return _together(layer)
