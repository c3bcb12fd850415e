"""Attention with soft-capped logits or sinks, which torch's own kernel lacks: plain operators, block by block of 512 keys.

It keeps the promise of `flat_attention`: all products have fixed sizes (512 keys, padded rows), the sink stands before the first
key so that keys keep their place in the sum, and blocks are added in their order; a masked block adds exact zeros.
"""

from __future__ import annotations

import torch

from sparkrelay.device.slab import BLOCK_TOKENS

SINK_COLUMNS = 16
"""The sink's column is padded with -inf to the width of a vector register, so that keys stay where they are without it."""


def attend_in_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention in float32 sums.

    query  [n, kv_heads, rows, key_dim], n sequences
    keys   [n, kv_heads, b * 512, key_dim], values [n, kv_heads, b * 512, value_dim]
    mask   [n, 1, rows, b * 512], added
    sinks  [kv_heads, rows] or None: a logit per row that takes weight and gives no value

    Returns [n, kv_heads, rows, value_dim] in the query's dtype.
    """
    blocks = range(0, keys.shape[2], BLOCK_TOKENS)
    products = [query @ keys[:, :, first : first + BLOCK_TOKENS].transpose(2, 3) for first in blocks]
    logits = torch.cat(products, dim=3).float() * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits + mask
    if sinks is not None:
        logits = torch.cat([_sink_columns(sinks, logits), logits], dim=3)
    weights = torch.softmax(logits, dim=3)[..., -keys.shape[2] :].to(values.dtype)
    output = torch.zeros(*query.shape[:3], values.shape[3], dtype=torch.float32, device=query.device)
    for first in blocks:
        last = first + BLOCK_TOKENS
        output += weights[..., first:last].contiguous() @ values[:, :, first:last]
    return output.to(query.dtype)


def _sink_columns(sinks: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """[n, kv_heads, rows, 16]: the row's sink, then -inf."""
    columns = logits.new_full((*logits.shape[:3], SINK_COLUMNS), float("-inf"))
    columns[..., 0] = sinks
    return columns
