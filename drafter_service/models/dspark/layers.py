"""The draft's decoder layer: the target family's, but its keys and values come from the context rows and from the block.

A layer does not know how the context is kept. It makes keys and values of what it is given, and asks `attend` for what its
queries see: the training form masks packed blocks, the drafting form reads a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from drafter_service.models.dspark.config import Json, LayerShape


class KeysValues(NamedTuple):
    """Each [rows, kv_heads, head_dim]; keys are rotated to their positions."""

    keys: Tensor
    values: Tensor


Attend = Callable[[Tensor, KeysValues], Tensor]
"""Queries [rows, heads, head_dim] and the keys and values of the same rows -> [rows, heads, head_dim]."""


class Rotation(NamedTuple):
    """RoPE's cosines and sines of some positions, each [rows, 1, head_dim]."""

    cos: Tensor
    sin: Tensor


class RMSNorm(nn.Module):
    """x / rms(x) * (weight + offset), computed in float32."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self._eps = eps
        self._offset = offset

    def forward(self, rows: Tensor) -> Tensor:
        """[..., size] -> [..., size], in the type of `rows`."""
        weight = self.weight + self._offset if self._offset else self.weight
        return functional.rms_norm(rows, list(weight.shape), weight.to(rows.dtype), self._eps)


class Rotary(nn.Module):
    """RoPE's frequencies."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self._frequencies = rope_frequencies(shape.rope, shape.head_dim)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """positions [rows] int64."""
        angles = positions[:, None].float() * self._frequencies.to(positions.device)
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rope_frequencies(rope: Json, head_dim: int) -> Tensor:
    """float32 [head_dim / 2], radians a position, of the types in `config.ROPE_TYPES`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequencies = 1.0 / (float(rope["rope_theta"]) ** exponents)
    if rope["rope_type"] == "linear":
        return frequencies / float(rope["factor"])
    if rope["rope_type"] == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: Json) -> Tensor:
    """Llama 3's stretching: long waves are slowed down by the factor, short ones stay, and between them it is blended."""
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / float(rope["factor"]))


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """[rows, heads, head_dim], turned to the rotation's positions."""
    first, second = heads.chunk(2, dim=-1)
    return heads * rotation.cos + torch.cat([-second, first], dim=-1) * rotation.sin


class Attention(nn.Module):
    """The projections of one layer, and the norms by head that some families have."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        size, head_dim = shape.hidden_size, shape.head_dim
        family = shape.family
        self._head_dim = head_dim
        self._eps = shape.rms_norm_eps
        self._value_norm = family.value_norm
        self.q_proj = nn.Linear(size, shape.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(size, shape.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(size, shape.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(shape.num_attention_heads * head_dim, size, bias=False)
        if family.head_norms:
            self.q_norm: nn.Module = RMSNorm(head_dim, shape.rms_norm_eps, family.norm_offset)
            self.k_norm: nn.Module = RMSNorm(head_dim, shape.rms_norm_eps, family.norm_offset)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def keys_values(self, rows: Tensor, rotation: Rotation) -> KeysValues:
        """Of rows [n, hidden]: context rows, or a block's normed hidden states."""
        keys = self.k_norm(self._heads(self.k_proj(rows)))
        values = self._heads(self.v_proj(rows))
        if self._value_norm:
            values = functional.rms_norm(values, (self._head_dim,), eps=self._eps)
        return KeysValues(rotate(keys, rotation), values)

    def forward(self, rows: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """rows [n, hidden], normed -> [n, hidden]"""
        queries = rotate(self.q_norm(self._heads(self.q_proj(rows))), rotation)
        seen = attend(queries, self.keys_values(rows, rotation))
        output: Tensor = self.o_proj(seen.flatten(1))
        return output

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:-1], -1, self._head_dim)


class Mlp(nn.Module):
    """The gated MLP."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self._gelu = shape.family.gelu
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        gate = self.gate_proj(rows)
        gate = functional.gelu(gate, approximate="tanh") if self._gelu else functional.silu(gate)
        output: Tensor = self.down_proj(gate * self.up_proj(rows))
        return output


class DraftLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        family = shape.family

        def norm() -> RMSNorm:
            return RMSNorm(shape.hidden_size, shape.rms_norm_eps, family.norm_offset)

        self.input_layernorm = norm()
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = norm()
        self.mlp = Mlp(shape)
        self._sandwich = family.sandwich_norms
        if family.sandwich_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()
        if family.layer_scalar:
            self.layer_scalar = nn.Buffer(torch.ones(1))

    def forward(self, hidden: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """hidden [rows, hidden] -> [rows, hidden]"""
        seen = self.self_attn(self.input_layernorm(hidden), rotation, attend)
        if not self._sandwich:
            hidden = hidden + seen
            thought: Tensor = self.mlp(self.post_attention_layernorm(hidden))
            return hidden + thought
        hidden = hidden + self.post_attention_layernorm(seen)
        thought = self.mlp(self.pre_feedforward_layernorm(hidden))
        hidden = hidden + self.post_feedforward_layernorm(thought)
        return hidden * self.layer_scalar if hasattr(self, "layer_scalar") else hidden
