"""Softmax attention from two batched products: many sequences in one call, over no more keys than their lengths need.

torch's own CPU kernel gives a row the same bits in any company only over multiples of 512 keys, which is most of a short
session's step. Plain batched products keep the promise of `attention_step` at multiples of 64: a score is a sum over the head
size alone, and a masked key adds an exact zero to the sum over values. That sum is taken over so many keys at a time as the
libraries add up in one go, between absolute positions: longer ones they split in ways that depend on their length.
"""

from __future__ import annotations

import itertools
from typing import Final

import torch

KEY_MULTIPLE: Final = 64
"""Key ranges start and end at its multiples."""
VALUE_KEYS: Final = {torch.bfloat16: (512, 256, 128), torch.float32: (192, 64)}
"""How many keys a sum over values takes at a time: the first is right on most machines, the others are for `numerics` to try.
(oneDNN with bfloat16 instructions: up to 512, without: 256; MKL: 192.) Multiples of KEY_MULTIPLE."""
SINK_COLUMNS: Final = 16
"""The sink's column is padded with -inf to the width of a vector register, so that keys stay where they are without it."""


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    first_key: int,
    value_keys: int,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of n sequences; scores and sums over keys are added up in float32.

    query      [n * kv_heads, rows, key_dim]
    keys       [n * kv_heads, N, key_dim] at positions from `first_key` on; values [n * kv_heads, N, value_dim]
    mask       float32 [n, 1, rows, N], added: 0 or -inf
    value_keys keys that a sum over values takes at a time
    sinks      [n, kv_heads, rows] or None: a logit per row that takes weight and gives no value

    Returns [n * kv_heads, rows, value_dim].
    """
    products = _scores(query, keys).view(len(mask), -1, query.shape[1], keys.shape[1])
    if softcap is None:
        logits = torch.add(mask, products, alpha=scaling)
    else:
        logits = torch.tanh(products.float() * (scaling / softcap)) * softcap + mask
    if sinks is not None:
        logits = torch.cat([_sink_columns(sinks, logits), logits], dim=3)
    weights = torch.softmax(logits, dim=3)
    if sinks is not None:
        weights = weights[..., SINK_COLUMNS:]
    return _sums(
        weights.to(values.dtype).reshape(len(query), query.shape[1], -1), values, first_key, value_keys
    )


def _scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[n * kv_heads, rows, N]. In bfloat16 keys stand on the left: a right operand is packed anew on every call, and there are
    many keys and few rows. In float32 that order has other bits for few rows than for many."""
    if query.dtype is torch.bfloat16:
        return torch.bmm(keys, query.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(query, keys.transpose(1, 2))


def _sums(weights: torch.Tensor, values: torch.Tensor, first_key: int, value_keys: int) -> torch.Tensor:
    """weights [b, rows, N], values [b, N, dim] -> [b, rows, dim]"""
    key_count = values.shape[1]
    borders = [0, *range(value_keys - first_key % value_keys, key_count, value_keys), key_count]
    if len(borders) == 2:
        return torch.bmm(weights, values)
    total = torch.zeros(*weights.shape[:2], values.shape[2], dtype=torch.float32, device=values.device)
    for first, last in itertools.pairwise(borders):
        total += torch.bmm(weights[..., first:last].contiguous(), values[:, first:last])
    return total.to(values.dtype)


def _sink_columns(sinks: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """[n, kv_heads, rows, 16]: the row's sink, then -inf."""
    columns = logits.new_full((*logits.shape[:3], SINK_COLUMNS), float("-inf"))
    columns[..., 0] = sinks
    return columns
