"""The three-term loss of a block, and how far its greedy guesses would have got.

    0.1 * CE(label) + 0.9 * L1(draft, target) + 1.0 * BCE(confidence, 1 - TV)        TV = L1 / 2

weighted by exp(-(k - 1) / decay) at slot k. A vocabulary's frequent part may stand for all of it: then both distributions are
those among the kept tokens, and a label outside of them has no CE term.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from drafter_service.training.settings import LossWeights


class BlockTargets(NamedTuple):
    """What blocks [n, slots] are held against.

    labels         int64 [n, slots]: index of the true token among the kept ones; -1 where it is none of them
    known          bool [n, slots]: there is a true token at all; once False, False to the block's end
    probabilities  float32 [n, slots, kept]: the target's distribution among the kept tokens; anything where nothing is known
    """

    labels: Tensor
    known: Tensor
    probabilities: Tensor


class LossTerms(NamedTuple):
    """Means over the known slots, each weighted by its position; `total` is what is minimised. Each a scalar."""

    total: Tensor
    cross_entropy: Tensor
    l1: Tensor
    confidence: Tensor


def block_loss(
    logits: Tensor, confidence: Tensor | None, targets: BlockTargets, weights: LossWeights
) -> LossTerms:
    """Of draft logits [n, slots, kept] and confidence logits [n, slots] (None: the draft has no such head)."""
    position = torch.exp(-torch.arange(logits.shape[1], device=logits.device) / weights.decay)
    share = targets.known * position
    share = share / share.sum().clamp(min=1e-9)
    log_draft = logits.float().log_softmax(dim=-1)
    label_terms = log_draft.gather(-1, targets.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    cross_entropy = -(share * (targets.labels >= 0) * label_terms).sum()
    distance = (log_draft.exp() - targets.probabilities).abs().sum(dim=-1)
    l1 = (share * distance).sum()
    total = weights.cross_entropy * cross_entropy + weights.l1 * l1
    if confidence is None:
        return LossTerms(total, cross_entropy, l1, torch.zeros_like(total))
    wanted = (1.0 - distance.detach() / 2).clamp(0.0, 1.0)
    errors = binary_cross_entropy_with_logits(confidence.float(), wanted, reduction="none")
    doubt = (share * errors).sum()
    return LossTerms(total + weights.confidence * doubt, cross_entropy, l1, doubt)


def matched_counts(best: Tensor, targets: BlockTargets) -> Tensor:
    """int64 [n]: how many first guesses [n, slots] (indices among the kept tokens) are the true tokens.

    The sequential head was given the true tokens before each slot. Up to the first miss they are its own guesses, so this is
    how far a drafted block would match.
    """
    return ((best == targets.labels) & targets.known).long().cumprod(dim=1).sum(dim=1)
