"""The training form: many blocks of some sequences in one pass.

Every block stands behind the context before its own anchor and sees that and itself, nothing else: what it computes is what the
drafting form (`cached`) computes when the session has just got to that anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from drafter_service.models.dspark.layers import KeysValues
from drafter_service.models.dspark.network import DSparkNetwork


class PackedSequence(NamedTuple):
    """Blocks of one sequence.

    taps       [context, taps * hidden]: the target's tapped states at positions 0 ... context - 1, side by side
    token_ids  int64, the sequence's ids, at least up to the last anchor
    anchors    int64 [blocks], positions, each at most `context`
    """

    taps: Tensor
    token_ids: Tensor
    anchors: Tensor


def packed_hidden(network: DSparkNetwork, sequences: Sequence[PackedSequence]) -> Tensor:
    """Final hidden states [all blocks, gamma, hidden], sequence by sequence."""
    contexts = [len(sequence.taps) for sequence in sequences]
    rows = network.context_rows(torch.cat([sequence.taps for sequence in sequences]))
    positions = torch.cat([torch.arange(count, device=rows.device) for count in contexts])
    spans = [_Span.of(network, sequence) for sequence in sequences]
    attends = [
        _PackedAttention(context, spans, network.config.attention_scale)
        for context in network.context_keys_values(rows, positions)
    ]
    anchor_ids = torch.cat([sequence.token_ids[sequence.anchors] for sequence in sequences])
    anchors = torch.cat([sequence.anchors for sequence in sequences])
    return network.hidden(network.slots(anchor_ids), network.slot_positions(anchors), attends)


@dataclass(frozen=True, slots=True)
class _Span:
    """One sequence's share of the flat rows. mask: what its rows see of its context and of its rows, [rows, context + rows]."""

    context_count: int
    row_count: int
    mask: Tensor

    @classmethod
    def of(cls, network: DSparkNetwork, sequence: PackedSequence) -> _Span:
        slots, context_count = network.config.slot_count, len(sequence.taps)
        blocks = torch.arange(len(sequence.anchors), device=sequence.anchors.device).repeat_interleave(slots)
        positions = torch.arange(context_count, device=blocks.device)
        sees_context = positions < sequence.anchors[blocks][:, None]
        sees_rows = blocks == blocks[:, None]
        return cls(context_count, len(blocks), torch.cat([sees_context, sees_rows], dim=1))


class _PackedAttention:
    """One layer's `Attend`."""

    def __init__(self, context: KeysValues, spans: Sequence[_Span], scale: float) -> None:
        self._spans = spans
        self._scale = scale
        counts = [span.context_count for span in spans]
        self._context_keys = torch.split_with_sizes(context.keys, counts)
        self._context_values = torch.split_with_sizes(context.values, counts)

    def __call__(self, queries: Tensor, own: KeysValues) -> Tensor:
        counts = [span.row_count for span in self._spans]
        parts = zip(
            self._spans,
            torch.split_with_sizes(queries, counts),
            torch.split_with_sizes(own.keys, counts),
            torch.split_with_sizes(own.values, counts),
            self._context_keys,
            self._context_values,
            strict=True,
        )
        seen = []
        for span, query, keys, values, context_keys, context_values in parts:
            output = scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                torch.cat([context_keys, keys]).transpose(0, 1)[None],
                torch.cat([context_values, values]).transpose(0, 1)[None],
                attn_mask=span.mask,
                scale=self._scale,
                enable_gqa=True,
            )
            seen.append(output[0].transpose(0, 1))
        return torch.cat(seen)
