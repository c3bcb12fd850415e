"""What is trained: DSpark and DFlash on blocks at many anchors, MTP-1 on whole sequences; loss and greedy matches of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from drafter_service.models.dspark.layers import RMSNorm
from drafter_service.models.dspark.network import DSparkNetwork
from drafter_service.models.dspark.packed import PackedSequence, packed_hidden
from drafter_service.models.mtp.network import MtpNetwork, MtpSequence, sequences_hidden
from drafter_service.training.loss import BlockTargets, Head, Judged, block_loss
from drafter_service.training.settings import LossWeights
from drafter_service.training.states import TargetStates


class TrainItem(NamedTuple):
    """A sample as a trainee reads it: ids int64 [n], the anchors int64, and the target's states of positions 0 ... n - 2."""

    token_ids: Tensor
    anchors: Tensor
    states: TargetStates


class Trainee(Protocol):
    """A network in training."""

    @property
    def network(self) -> nn.Module: ...

    def answer(self, items: Sequence[TrainItem]) -> Judged:
        """Loss and matches of a batch, with gradients where they are enabled."""


class TargetHead:
    """The target's last norm and LM head, for a part of the vocabulary.

    kept_ids  int64 [kept], ascending
    """

    def __init__(self, norm: RMSNorm, lm_head: Tensor, kept_ids: Tensor) -> None:
        """norm: the target's last; lm_head [vocab, hidden]."""
        self.kept_ids = kept_ids
        self.weight = lm_head[kept_ids].contiguous()
        self._norm = norm
        self._index = torch.full((len(lm_head),), -1, dtype=torch.int64)
        self._index[kept_ids] = torch.arange(len(kept_ids))

    @torch.no_grad()
    def targets(self, items: Sequence[TrainItem], slot_count: int) -> BlockTargets:
        """What blocks of `slot_count` at the items' anchors are held against."""
        labels, known, probabilities, indices = [], [], [], []
        first = 0
        for item in items:
            positions = item.anchors[:, None] + torch.arange(slot_count)
            last = len(item.states.final) - 1
            known.append(positions <= last)
            positions = positions.clamp(max=last)
            labels.append(self._index[item.token_ids[positions + 1]])
            rows, places = torch.unique(positions, return_inverse=True)
            logits = linear(self._norm(item.states.final[rows]), self.weight)
            probabilities.append(logits.float().softmax(dim=-1))
            indices.append(first + places)
            first += len(rows)
        return BlockTargets(torch.cat(labels), torch.cat(known), torch.cat(indices), torch.cat(probabilities))


class BlockTrainee:
    """DSpark, or DFlash."""

    def __init__(self, network: DSparkNetwork, head: TargetHead, weights: LossWeights) -> None:
        self.network = network
        self._head = head
        self._weights = weights

    def answer(self, items: Sequence[TrainItem]) -> Judged:
        network, head = self.network, self._head
        targets = head.targets(items, network.config.block_size)
        hidden = packed_hidden(
            network, [PackedSequence(item.states.taps, item.token_ids, item.anchors) for item in items]
        )
        previous, features, bias_weight = None, None, None
        if network.markov_head is not None:
            previous = network.markov_head.previous(self._before(items))
            features = network.markov_head.block_features(previous, hidden)
            bias_weight = network.markov_head.markov_w2.weight[head.kept_ids]
        confidence = None if network.confidence_head is None else network.confidence_head(hidden, previous)
        return block_loss(
            hidden, features, Head(head.weight, bias_weight), confidence, targets, self._weights
        )

    def _before(self, items: Sequence[TrainItem]) -> Tensor:
        """The true token before each slot, [blocks, slots]."""
        slots = torch.arange(self.network.config.block_size)
        return torch.cat(
            [
                item.token_ids[(item.anchors[:, None] + slots).clamp(max=len(item.token_ids) - 1)]
                for item in items
            ]
        )


class MtpTrainee:
    """MTP-1. An anchor at p is drafted from the state at p - 1 and the anchor's own id."""

    def __init__(self, network: MtpNetwork, head: TargetHead, weights: LossWeights) -> None:
        self.network = network
        self._head = head
        self._weights = weights

    def answer(self, items: Sequence[TrainItem]) -> Judged:
        targets = self._head.targets(items, 1)
        sequences = [MtpSequence(item.states.final[:-1], item.token_ids[1:-1]) for item in items]
        hidden = sequences_hidden(self.network, sequences)
        parts = torch.split_with_sizes(hidden, [len(sequence.next_ids) for sequence in sequences])
        rows = torch.cat([part[item.anchors - 1] for part, item in zip(parts, items, strict=True)])
        return block_loss(rows.unsqueeze(1), None, Head(self._head.weight), None, targets, self._weights)
