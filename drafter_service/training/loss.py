"""The three-term loss of a block, and how far its greedy guesses would have got.

    0.1 * CE(label) + 0.9 * L1(draft, target) + 1.0 * BCE(confidence, 1 - TV)        TV = L1 / 2

weighted by exp(-(k - 1) / decay) at slot k. A vocabulary's frequent part may stand for all of it: then both distributions are
those among the kept tokens, and a label outside of them has no CE term.

Logits of all slots over the vocabulary would be by far the largest thing in a step, and reading them again and again would take
more time than computing them. So they are made a few rows at a time, their gradient right behind them, and never kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from drafter_service.training.settings import LossWeights

CHUNK_NUMBERS = 2**19
"""Logits that are made at once: 2 MB, which a core's cache can hold."""
_TINY = 1e-30


class BlockTargets(NamedTuple):
    """What blocks [n, slots] are held against.

    labels         int64 [n, slots]: index of the true token among the kept ones; -1 where it is none of them
    known          bool [n, slots]: there is a true token at all; once False, False to the block's end
    rows           int64 [n, slots]: which of `probabilities` a slot is held against; any where nothing is known
    probabilities  float32 [positions, kept]: the target's distributions among the kept tokens
    """

    labels: Tensor
    known: Tensor
    rows: Tensor
    probabilities: Tensor


@dataclass(frozen=True, slots=True)
class Head:
    """Logits are weight @ hidden, and bias_weight @ features on top if there is a sequential head; both for the kept tokens."""

    weight: Tensor
    bias_weight: Tensor | None = None


class LossTerms(NamedTuple):
    """Means over the known slots, each weighted by its position; `total` is what is minimised. Each a scalar."""

    total: Tensor
    cross_entropy: Tensor
    l1: Tensor
    confidence: Tensor


class Judged(NamedTuple):
    """matched int64 [n]: how many first guesses of each block are the true tokens."""

    terms: LossTerms
    matched: Tensor


def block_loss(
    hidden: Tensor,
    features: Tensor | None,
    head: Head,
    confidence: Tensor | None,
    targets: BlockTargets,
    weights: LossWeights,
) -> Judged:
    """Of final hidden states [n, slots, hidden], the sequential head's features [n, slots, rank] and the confidence logits
    [n, slots]; None where the draft has no such head.

    The sequential head was given the true tokens before each slot. Up to the first miss they are its own guesses, so the matches
    are those of a drafted block.
    """
    position = torch.exp(-torch.arange(hidden.shape[1], device=hidden.device) / weights.decay)
    share = targets.known * position
    share = share / share.sum().clamp(min=1e-9)
    total, cross_entropy, l1, distance, best = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, 1),
        None if features is None else features.flatten(0, 1),
        head.weight,
        head.bias_weight,
        targets,
        share.flatten(),
        weights,
    )
    matched = matched_counts(best.view(share.shape), targets)
    if confidence is None:
        return Judged(LossTerms(total, cross_entropy, l1, torch.zeros_like(total)), matched)
    wanted = (1.0 - distance.view(share.shape) / 2).clamp(0.0, 1.0)
    errors = binary_cross_entropy_with_logits(confidence.float(), wanted, reduction="none")
    doubt = (share * errors).sum()
    return Judged(LossTerms(total + weights.confidence * doubt, cross_entropy, l1, doubt), matched)


def matched_counts(best: Tensor, targets: BlockTargets) -> Tensor:
    """int64 [n]: how many first guesses [n, slots] (indices among the kept tokens) are the true tokens."""
    return ((best == targets.labels) & targets.known).long().cumprod(dim=1).sum(dim=1)


class _HeadLoss(torch.autograd.Function):
    """The CE and L1 terms of rows [n, hidden], chunk by chunk, with their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        features: Tensor | None,
        weight: Tensor,
        bias_weight: Tensor | None,
        targets: BlockTargets,
        share: Tensor,
        weights: LossWeights,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The weighted sum of both terms, each of them, the distances L1 [n], and the best tokens [n]."""
        inputs, joined = hidden, weight
        if features is not None and bias_weight is not None:
            inputs = torch.cat([hidden, features.to(hidden.dtype)], dim=-1)
            joined = torch.cat([weight.to(hidden.dtype), bias_weight.to(hidden.dtype)], dim=-1)
        joined = joined.to(inputs.dtype)
        wants_gradient = any(ctx.needs_input_grad[:4])
        labels, rows = targets.labels.flatten(), targets.rows.flatten()
        label_logs, distances, best, gradients, softs = [], [], [], [], []
        bias_gradient = None if bias_weight is None else torch.zeros_like(bias_weight)
        chunk_rows = max(CHUNK_NUMBERS // len(weight), 1)
        for part in torch.arange(len(inputs)).split(chunk_rows):  # type: ignore[no-untyped-call]
            draft = (inputs[part] @ joined.T).float()
            best.append(draft.argmax(dim=-1))
            torch.softmax(draft, dim=-1, out=draft)
            gap = draft - targets.probabilities[rows[part]]
            distances.append(torch.linalg.vector_norm(gap, 1, dim=-1))
            label = labels[part].clamp(min=0)[:, None]
            label_logs.append(draft.gather(-1, label).squeeze(-1).clamp(min=_TINY).log())
            if weights.soft:
                softs.append(
                    -torch.linalg.vecdot(targets.probabilities[rows[part]], draft.clamp(min=_TINY).log())
                )
            if not wants_gradient:
                continue
            hit = (share[part] * (labels[part] >= 0) * weights.cross_entropy)[:, None]
            l1_share, soft_share = share[part] * weights.l1, share[part] * weights.soft
            gradient = _slope(draft, gap, l1_share[:, None], hit, label, soft_share[:, None])
            gradient = gradient.to(inputs.dtype)
            gradients.append(gradient @ joined)
            if bias_gradient is not None:
                bias_gradient += gradient.T @ inputs[part, hidden.shape[1] :]
        distance, known = torch.cat(distances), labels >= 0
        cross_entropy = -(share * known * torch.cat(label_logs)).sum()
        l1 = (share * distance).sum()
        if wants_gradient:
            ctx.split = hidden.shape[1]
            ctx.save_for_backward(torch.cat(gradients), bias_gradient)
        total = weights.cross_entropy * cross_entropy + weights.l1 * l1
        if softs:
            total = total + weights.soft * (share * torch.cat(softs)).sum()
        chosen = torch.cat(best)
        ctx.mark_non_differentiable(cross_entropy, l1, distance, chosen)
        return total, cross_entropy, l1, distance, chosen

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, bias_gradient = ctx.saved_tensors
        gradient = gradient * upstream[0].to(gradient.dtype)
        features = gradient[:, ctx.split :] if bias_gradient is not None else None
        bias = None if bias_gradient is None else bias_gradient * upstream[0]
        return gradient[:, : ctx.split], features, None, bias, None, None, None


def _slope(draft: Tensor, gap: Tensor, l1: Tensor, hit: Tensor, label: Tensor, soft: Tensor) -> Tensor:
    """The gradient by the logits [n, kept] of l1 * |gap|_1 - hit * log draft[label] - soft * <target, log draft>.

    d|gap|_1 / d logits = draft * (s - <draft, s>) with s = sign(gap = draft - target); -log draft[label] gives draft - 1 at the
    label, and the soft term the gap itself.
    """
    sign = gap.sign()
    mean = torch.linalg.vecdot(draft, sign).unsqueeze(-1)
    slope = sign.sub_(mean).mul_(l1).add_(hit).mul_(draft).addcmul_(gap, soft)
    return slope.scatter_add_(-1, label, -hit)
