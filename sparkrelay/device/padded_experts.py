"""Mixture-of-experts layers whose bits do not depend on which other rows an expert was given.

transformers' own implementations multiply as many rows as an expert happens to get, so a row's bits follow its neighbours
(or copy the expert's weights for every row). Here each expert's rows are padded to a multiple with zeros, and a row's results
are summed in the order of its own top-k list.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sparkrelay.device.slab import round_up


def experts_name(row_multiple: int) -> str:
    """The registered name of the implementation that pads to `row_multiple`."""
    return f"sparkrelay_padded_{row_multiple}"


def register_experts(row_multiple: int) -> str:
    """Makes the implementation known to transformers and returns its name."""
    name = experts_name(row_multiple)
    ALL_EXPERTS_FUNCTIONS.register(name, partial(padded_experts, row_multiple=row_multiple))
    return name


def padded_experts(
    experts: Any, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, *, row_multiple: int
) -> torch.Tensor:
    """What transformers calls instead of the experts' own forward.

    rows    [T, hidden]
    chosen  int64 [T, top_k]: expert ids; weights [T, top_k]: what their results are multiplied by

    Returns [T, hidden].
    """
    row_count, top_k = chosen.shape
    results = rows.new_zeros(row_count * top_k, rows.shape[1])
    flat = chosen.reshape(-1)
    for expert in torch.bincount(flat).nonzero().squeeze(1).tolist():
        picks = (flat == expert).nonzero().squeeze(1)
        padded = rows.new_zeros(round_up(len(picks), row_multiple), rows.shape[1])
        padded[: len(picks)] = rows[picks // top_k]
        results[picks] = _one_expert(experts, int(expert), padded)[: len(picks)]
    weighted = results * weights.reshape(-1, 1).to(results.dtype)
    return weighted.view(row_count, top_k, -1).sum(dim=1)


def _one_expert(experts: Any, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """[rows, hidden] through one expert's two projections."""
    if experts.has_gate:
        inner = experts._apply_gate(_project(experts, "gate_up_proj", expert, rows))
    else:
        inner = experts.act_fn(_project(experts, "up_proj", expert, rows))
    output = _project(experts, "down_proj", expert, inner)
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


def _project(experts: Any, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return linear(rows, weight.T.contiguous() if experts.is_transposed else weight, bias)
