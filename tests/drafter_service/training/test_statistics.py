"""Beginnings from statistics: the head says what the target says on average, and the linear model is the least-squares one."""

from __future__ import annotations

import torch

from drafter_service.models.dspark.heads import sequential_head
from drafter_service.models.dspark.layers import RMSNorm
from drafter_service.models.mtp.network import MtpNetwork, MtpSequence, mtp_of, sequences_hidden
from drafter_service.training.states import TargetStates
from drafter_service.training.statistics import (
    SHRINKAGE,
    begin_as_linear,
    begin_with_bigrams,
    mean_states,
)
from drafter_service.training.trainees import TrainItem
from tests.drafter_service.models.dspark_networks import HIDDEN, VOCAB, draft_config, target_config


def item(final: torch.Tensor, ids: torch.Tensor) -> TrainItem:
    return TrainItem(ids, torch.tensor([3]), TargetStates(torch.zeros(len(final), 1), final))


def random_norm() -> RMSNorm:
    norm = RMSNorm(HIDDEN, 1e-5).requires_grad_(False)
    norm.weight.copy_(torch.rand(HIDDEN) + 0.5)
    return norm


def test_the_means_are_the_target_s_by_token() -> None:
    torch.manual_seed(0)
    norm, ids = random_norm(), torch.tensor([5, 7, 5, 9])
    final = torch.randn(3, HIDDEN)
    means = mean_states([item(final, ids)], norm, VOCAB)
    normed = norm(final)
    overall = normed.mean(dim=0)
    assert means.counts[[5, 7, 9]].tolist() == [2, 1, 0]  # nothing follows the last id
    expected = (normed[0] + normed[2] + SHRINKAGE * overall) / (2 + SHRINKAGE)
    assert torch.allclose(means.states[5], expected, atol=1e-5)
    assert torch.allclose(means.states[9], overall, atol=1e-5)


def test_at_full_rank_the_head_s_logits_are_those_of_the_means_and_less_rank_is_less_exact() -> None:
    torch.manual_seed(0)
    lm_head, norm = torch.randn(VOCAB, HIDDEN), random_norm()
    ids = torch.randint(0, VOCAB, (401,))
    means = mean_states([item(torch.randn(400, HIDDEN) * 3, ids)], norm, VOCAB)
    wanted = means.states @ lm_head.T
    errors = []
    for rank in (HIDDEN, HIDDEN // 2, 4):
        head = sequential_head(draft_config(markov_rank=rank)).requires_grad_(False)
        begin_with_bigrams(head, means, lm_head)
        logits = head.bias(head.previous(torch.arange(VOCAB)))
        errors.append(float((logits - wanted).pow(2).mean()) / float(wanted.pow(2).mean()))
    assert errors[0] < 1e-6 < errors[1] < errors[2] < 1.0


def test_the_linear_model_finds_a_linear_world() -> None:
    """Where the next state is a linear function of the state and the next token, the beginning foretells it."""
    torch.manual_seed(0)
    network = MtpNetwork(mtp_of(target_config())).requires_grad_(False)
    network.embed_tokens.weight.copy_(torch.randn(VOCAB, HIDDEN))
    world = torch.randn(HIDDEN, 2 * HIDDEN) * 0.3
    ids = torch.randint(0, VOCAB, (801,))
    states = [torch.randn(HIDDEN)]
    for next_id in ids[1:800]:
        seen = torch.cat([network.enorm(network.embed_tokens.weight[next_id]), network.hnorm(states[-1])])
        states.append(world @ seen)
    final = torch.stack(states)
    norm = random_norm()
    begin_as_linear(network, [item(final, ids)], norm)
    hidden = sequences_hidden(network, [MtpSequence(final[:-1], ids[1:800])])
    alike = torch.nn.functional.cosine_similarity(hidden, norm(final[1:]))
    assert alike[1:].mean() > 0.97
