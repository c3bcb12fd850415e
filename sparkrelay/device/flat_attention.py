"""How Hugging Face models reach the attention of a flat ragged batch.

They call it through transformers' `AttentionInterface` under the name `sparkrelay` and pass the step's plan on as the keyword
`batch`. The name holds none of the words that transformers dispatches on (sdpa, flash, flex, paged), and no mask function is
registered for it, so transformers builds no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

ATTENTION_NAME = "sparkrelay"
IGNORED_ARGUMENTS = frozenset({"position_ids", "use_cache", "cache_position"})
"""Keywords that models hand through and that say nothing about attention here: the plan knows the positions."""


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
