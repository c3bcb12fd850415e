"""The loss: its formula, its gradient, and what has no part in it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from drafter_service.training import loss
from drafter_service.training.loss import BlockTargets, Head, block_loss, matched_counts
from drafter_service.training.settings import LossWeights

KEPT = 7


def plain_loss(logits: np.ndarray, wanted: np.ndarray, labels: list[list[int]], doubt: np.ndarray) -> float:
    """The formula of the module, number by number; every label known."""
    total, weight = 0.0, 0.0
    for block in range(len(labels)):
        for k, label in enumerate(labels[block]):
            share = math.exp(-k / 4.0)
            draft = np.exp(logits[block, k]) / np.exp(logits[block, k]).sum()
            l1 = float(np.abs(draft - wanted[block, k]).sum())
            c = 1 / (1 + math.exp(-doubt[block, k]))
            bce = -((1 - l1 / 2) * math.log(c) + l1 / 2 * math.log(1 - c))
            total += share * (0.1 * -math.log(draft[label]) + 0.9 * l1 + bce)
            weight += share
    return total / weight


def targets(wanted: Tensor, labels: Tensor, known: Tensor | None = None) -> BlockTargets:
    """Every slot is held against a row of its own."""
    rows = torch.arange(labels.numel()).view(labels.shape)
    known = torch.ones_like(labels, dtype=torch.bool) if known is None else known
    return BlockTargets(labels, known, rows, wanted.reshape(-1, wanted.shape[-1]))


def of_logits(
    logits: Tensor, doubt: Tensor | None, against: BlockTargets, weights: LossWeights
) -> loss.Judged:
    """The loss of given logits: hidden states that are the logits, and a head that hands them on."""
    return block_loss(logits, None, Head(torch.eye(logits.shape[-1])), doubt, against, weights)


@pytest.mark.parametrize("chunk", [1, 30, 2**19])
def test_the_loss_is_the_three_terms(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", chunk)
    torch.manual_seed(0)
    logits, doubt = torch.randn(3, 4, KEPT), torch.randn(3, 4)
    wanted = torch.randn(3, 4, KEPT).softmax(-1)
    labels = torch.randint(0, KEPT, (3, 4))
    found = of_logits(logits, doubt, targets(wanted, labels), LossWeights()).terms
    expected = plain_loss(logits.numpy(), wanted.numpy(), labels.tolist(), doubt.numpy())
    assert float(found.total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 30, 2**19])
@pytest.mark.parametrize("with_features", [True, False])
def test_the_gradient_is_that_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, chunk: int, with_features: bool
) -> None:
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", chunk)
    torch.manual_seed(0)
    weight = torch.randn(KEPT, 5)
    given = [torch.randn(shape, requires_grad=True) for shape in ((3, 4, 5), (3, 4, 2), (KEPT, 2), (3, 4))]
    hidden, features, bias_weight, doubt = given
    wanted = torch.randn(3, 4, KEPT).softmax(-1)
    labels, known = (
        torch.randint(-1, KEPT, (3, 4)),
        torch.tensor([[True] * 4, [True, True, False, False], [True] * 4]),
    )
    against = targets(wanted, labels, known)
    if with_features:
        found = block_loss(hidden, features, Head(weight, bias_weight), doubt, against, LossWeights())
    else:
        found = block_loss(hidden, None, Head(weight), doubt, against, LossWeights())
    (3.0 * found.terms.total).backward()
    gradients = [tensor.grad for tensor in given]

    for tensor in given:
        tensor.grad = None
    logits = hidden @ weight.T + (features @ bias_weight.T if with_features else 0.0)
    share = known * torch.exp(-torch.arange(4) / 4.0)
    share = share / share.sum()
    logs = logits.log_softmax(-1)
    ce = -(share * (labels >= 0) * logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]).sum()
    distance = (logs.exp() - wanted).abs().sum(-1)
    wish = 1 - distance.detach() / 2
    bce = -(wish * torch.sigmoid(doubt).log() + (1 - wish) * torch.sigmoid(-doubt).log())
    total = 0.1 * ce + 0.9 * (share * distance).sum() + (share * bce).sum()
    (3.0 * total).backward()
    assert float(found.terms.total.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    for mine, tensor in zip(gradients, given, strict=True):
        if tensor.grad is None:
            assert mine is None
        else:
            assert mine is not None and torch.allclose(mine, tensor.grad, atol=1e-6)
            assert mine.abs().max() > 1e-3
    assert (gradients[1] is not None) == with_features


def test_what_is_not_known_has_no_part_in_the_loss() -> None:
    torch.manual_seed(0)
    logits, wanted = torch.randn(1, 4, KEPT), torch.randn(1, 4, KEPT).softmax(-1)
    against = targets(wanted, torch.tensor([[1, -1, 2, 3]]), torch.tensor([[True, True, False, False]]))
    found = of_logits(logits, None, against, LossWeights()).terms
    changed = logits.clone()
    changed[:, 2:] += torch.arange(float(KEPT))
    assert of_logits(changed, None, against, LossWeights()).terms == found
    changed[:, 1] += torch.arange(float(KEPT))
    other = of_logits(changed, None, against, LossWeights()).terms
    assert other.l1 != found.l1 and other.cross_entropy == found.cross_entropy


def test_guesses_match_up_to_the_first_miss() -> None:
    labels = torch.tensor([[4, 5, 6], [4, 5, 6], [4, -1, 6], [4, 5, 6]])
    best = torch.tensor([[4, 5, 6], [4, 0, 6], [4, 5, 6], [4, 5, 6]])
    known = torch.tensor([[True] * 3, [True] * 3, [True] * 3, [True, False, False]])
    assert matched_counts(best, targets(torch.zeros(4, 3, KEPT), labels, known)).tolist() == [3, 1, 1, 1]
    logits = torch.nn.functional.one_hot(best, KEPT).float()
    found = of_logits(logits, None, targets(torch.zeros(4, 3, KEPT), labels, known), LossWeights())
    assert found.matched.tolist() == [3, 1, 1, 1]
