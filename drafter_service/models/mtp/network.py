"""The MTP-1 network, and its two forms: whole sequences in training, a few new rows a round in drafting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from drafter_service.models.dspark.cached import GROWTH, ROW_MULTIPLE, ContextCache
from drafter_service.models.dspark.config import (
    Json,
    LayerShape,
    UnusableCheckpoint,
    needed,
    shape_of,
    shape_to_json,
)
from drafter_service.models.dspark.layers import Attend, DraftLayer, KeysValues, RMSNorm, Rotary


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpConfig(LayerShape):
    """num_nextn_predict_layers: heads; only one is known here."""

    num_nextn_predict_layers: int = 1

    def __post_init__(self) -> None:
        LayerShape.__post_init__(self)
        if self.num_nextn_predict_layers != 1:
            raise UnusableCheckpoint(
                f"num_nextn_predict_layers: is {self.num_nextn_predict_layers}; only MTP-1 is known here"
            )


def mtp_of(target: Json) -> MtpConfig:
    """The configuration of a new MTP-1 for a target with this config.json."""
    return MtpConfig(**shape_of(target))


def mtp_from_json(config: Json) -> MtpConfig:
    """The configuration of an MTP checkpoint. UnusableCheckpoint says what is missing or unknown."""
    needed(config, "num_target_layers")
    return MtpConfig(
        **shape_of(config), num_nextn_predict_layers=int(needed(config, "num_nextn_predict_layers"))
    )


def mtp_to_json(config: MtpConfig) -> dict[str, Any]:
    """What `mtp_from_json` reads."""
    return {"architectures": [config.family.name + "MtpModel"], **shape_to_json(config)}


class MtpNetwork(nn.Module):
    """o_i = norm(layer(eh_proj [enorm(embedding of token i + 1) ; hnorm(h_i)])); the LM head is the target's."""

    def __init__(self, config: MtpConfig) -> None:
        super().__init__()
        self.config = config
        size, eps, offset = config.hidden_size, config.rms_norm_eps, config.family.norm_offset
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.enorm = RMSNorm(size, eps, offset)
        self.hnorm = RMSNorm(size, eps, offset)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.layer = DraftLayer(config)
        self.norm = RMSNorm(size, eps, offset)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self._rotary = Rotary(config)

    def hidden(self, states: Tensor, next_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """[rows, hidden], of the target's last layer's output [rows, hidden] and the tokens behind these positions [rows]."""
        embedded = self.embed_tokens(next_ids)
        if self.config.embedding_scale != 1.0:
            embedded = embedded * torch.tensor(self.config.embedding_scale, dtype=embedded.dtype)
        joined = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(states)], dim=-1))
        rotation = self._rotary(positions, joined.dtype)
        normed: Tensor = self.norm(self.layer(joined, rotation, attend))
        return normed

    def base_logits(self, hidden: Tensor, kept_ids: Tensor | None = None) -> Tensor:
        """[..., vocab] of [..., hidden], or of the tokens `kept_ids` alone."""
        logits: Tensor
        if kept_ids is None:
            logits = self.lm_head(hidden)
        else:
            logits = nn.functional.linear(hidden, self.lm_head.weight[kept_ids])
        softcap = self.config.final_softcap
        return torch.tanh(logits / softcap) * softcap if softcap else logits


# ---- training ----------------------------------------------------------------------------------------------------------------


class MtpSequence(NamedTuple):
    """states [n, hidden] of positions 0 ..., next_ids int64 [n]: the tokens at positions 1 ..."""

    states: Tensor
    next_ids: Tensor


def sequences_hidden(network: MtpNetwork, sequences: Sequence[MtpSequence]) -> Tensor:
    """[all rows, hidden], sequence by sequence; row i sees the rows before it."""
    counts = [len(sequence.next_ids) for sequence in sequences]
    positions = torch.cat([torch.arange(count) for count in counts])
    scale = network.config.attention_scale

    def attend(queries: Tensor, own: KeysValues) -> Tensor:
        parts = _by_sequence(queries, own, counts)
        return torch.cat([_causal(query, keys, values, scale) for query, keys, values in parts])

    states = torch.cat([sequence.states for sequence in sequences])
    next_ids = torch.cat([sequence.next_ids for sequence in sequences])
    return network.hidden(states, next_ids, positions, attend)


def _by_sequence(
    queries: Tensor, own: KeysValues, counts: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each sequence's rows."""
    split = [torch.split_with_sizes(part, counts) for part in (queries, own.keys, own.values)]
    return zip(*split, strict=True)


def _causal(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[rows, heads, head_dim] of one sequence."""
    output = scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        is_causal=True,
        scale=scale,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)


# ---- drafting ----------------------------------------------------------------------------------------------------------------


class NewRows(NamedTuple):
    """What a session has got since its last round: rows of positions cache.length ..., the last one's next token the anchor."""

    cache: ContextCache
    states: Tensor
    next_ids: Tensor


def advance(network: MtpNetwork, sessions: Sequence[NewRows]) -> Tensor:
    """Enters each session's new rows (at least one) into its cache; its last row's hidden state, [sessions, hidden]."""
    counts = [-(-len(session.next_ids) // ROW_MULTIPLE) * ROW_MULTIPLE for session in sessions]
    starts = [session.cache.length for session in sessions]
    padded = list(zip(sessions, counts, strict=True))
    states = torch.cat([pad(new.states, (0, 0, 0, count - len(new.states))) for new, count in padded])
    ids = torch.cat([pad(new.next_ids, (0, count - len(new.next_ids))) for new, count in padded])
    positions = torch.cat(
        [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
    )

    def attend(queries: Tensor, own: KeysValues) -> Tensor:
        seen = []
        parts = _by_sequence(queries, own, counts)
        for session, start, (query, keys, values) in zip(sessions, starts, parts, strict=True):
            count = len(session.next_ids)
            session.cache.append([KeysValues(keys[:count], values[:count])], start)
            seen.append(_from_cache(session.cache, query, start, network.config.attention_scale))
        return torch.cat(seen)

    hidden = network.hidden(states, ids, positions, attend)
    ends = torch.tensor(counts).cumsum(0) - torch.tensor([count - len(new.next_ids) for new, count in padded])
    return hidden[ends - 1]


def _from_cache(cache: ContextCache, queries: Tensor, start: int, scale: float) -> Tensor:
    """[rows, heads, head_dim] of rows at positions start ...: each sees what is known up to itself."""
    capacity = -(-(start + len(queries)) // GROWTH) * GROWTH
    context = cache.layer(0, capacity)
    positions = torch.arange(start, start + len(queries))[:, None]
    mask = cache.visible(cache.length, capacity) & (torch.arange(capacity) <= positions)
    output = scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        context.keys[None],
        context.values[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)
