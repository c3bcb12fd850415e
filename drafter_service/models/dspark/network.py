"""The whole draft network. Its parameters have the names of the released checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drafter_service.models.dspark.config import DraftConfig
from drafter_service.models.dspark.heads import ConfidenceHead, SequentialHead, sequential_head
from drafter_service.models.dspark.layers import Attend, DraftLayer, KeysValues, RMSNorm, Rotary


class DSparkNetwork(nn.Module):
    """DSpark, or DFlash where the configuration has no sequential head.

    Two forms use it, `packed` and `cached`: both make context rows and their keys and values, and run blocks of slots whose
    attention they supply.
    """

    markov_head: SequentialHead | None
    confidence_head: ConfidenceHead | None

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        size, eps, offset = config.hidden_size, config.rms_norm_eps, config.family.norm_offset
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.fc = nn.Linear(len(config.target_layer_ids) * size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps, offset)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, eps, offset)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.markov_head = sequential_head(config) if config.markov_rank else None
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
        self._rotary = Rotary(config)

    def context_rows(self, taps: Tensor) -> Tensor:
        """H_ctx [n, hidden] of the target's tapped states, beside each other: [n, taps * hidden]."""
        rows: Tensor = self.hidden_norm(self.fc(taps))
        return rows

    def context_keys_values(self, rows: Tensor, positions: Tensor) -> list[KeysValues]:
        """Each layer's keys and values of context rows [n, hidden] at their positions [n]."""
        rotation = self._rotary(positions, rows.dtype)
        return [layer.self_attn.keys_values(rows, rotation) for layer in self._layers()]

    def slots(self, anchor_ids: Tensor) -> Tensor:
        """The input ids of blocks [blocks, slots]: each anchor, then masks."""
        slots = anchor_ids.new_full((len(anchor_ids), self.config.slot_count), self.config.mask_token_id)
        slots[:, 0] = anchor_ids
        return slots

    def slot_positions(self, anchor_positions: Tensor) -> Tensor:
        """[blocks, slots]: where a block's slots stand."""
        offsets = torch.arange(self.config.slot_count, device=anchor_positions.device)
        return anchor_positions[:, None] + offsets

    def hidden(self, slots: Tensor, positions: Tensor, attends: Sequence[Attend]) -> Tensor:
        """Final hidden states [blocks, gamma, hidden] of the slots that predict, of blocks [blocks, slots] at these positions.

        attends  what each layer's queries see, for the rows of all blocks one after the other
        """
        hidden = self.embed_tokens(slots.flatten())
        if self.config.embedding_scale != 1.0:
            hidden = hidden * torch.tensor(self.config.embedding_scale, dtype=hidden.dtype)
        rotation = self._rotary(positions.flatten(), hidden.dtype)
        for layer, attend in zip(self._layers(), attends, strict=True):
            hidden = layer(hidden, rotation, attend)
        predicting = hidden.view(*slots.shape, -1)[:, self.config.slot_count - self.config.block_size :]
        normed: Tensor = self.norm(predicting)
        return normed

    def base_logits(self, hidden: Tensor, kept_ids: Tensor | None = None) -> Tensor:
        """U [..., vocab] of final hidden states [..., hidden], or of the tokens `kept_ids` alone."""
        logits: Tensor
        if kept_ids is None:
            logits = self.lm_head(hidden)
        else:
            logits = nn.functional.linear(hidden, self.lm_head.weight[kept_ids])
        softcap = self.config.final_softcap
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    def _layers(self) -> list[DraftLayer]:
        return [layer for layer in self.layers if isinstance(layer, DraftLayer)]
