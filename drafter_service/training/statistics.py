"""Beginnings that need no training, from means and products of the target's states: a bigram or a linear model instead of noise.

Bigrams (DSpark's sequential head). The target's logits are linear in its last normed hidden state, so the mean logits behind
token v are the LM head's product with the mean state at v. The head's two matrices are the best approximation of that product at
their rank, where errors count by how often the token before and the token behind occur.

A linear model (MTP-1). The projection of the token's embedding and the state before it is the least-squares guess of the state
that the target will have there, and the layer behind it begins by adding nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from drafter_service.models.dspark.heads import SequentialHead
from drafter_service.models.dspark.layers import RMSNorm
from drafter_service.models.mtp.network import MtpNetwork
from drafter_service.training.trainees import TrainItem

SHRINKAGE = 3.0
"""A mean of n states counts as n against so many of the mean of all."""
_RIDGE = 1e-3
_DOUBT = 0.5
"""A guessed state is normed to full length; its logits are toned down by so much at first."""


class Means(NamedTuple):
    """Of the target's last normed states: by token [vocab, hidden], and how often each token was seen [vocab]."""

    states: Tensor
    counts: Tensor


@torch.no_grad()
def mean_states(items: Iterable[TrainItem], norm: RMSNorm, vocab_size: int) -> Means:
    """Over all positions of some samples; tokens that are rare are drawn to the mean of all. norm: the target's last."""
    hidden = len(norm.weight)
    sums, counts = torch.zeros(vocab_size, hidden), torch.zeros(vocab_size)
    for item in items:
        ids = item.token_ids[: len(item.states.final)]
        sums.index_add_(0, ids, norm(item.states.final.float()))
        counts.index_add_(0, ids, torch.ones(len(ids)))
    overall = sums.sum(dim=0) / counts.sum().clamp(min=1.0)
    states = (sums + SHRINKAGE * overall) / (counts + SHRINKAGE)[:, None]
    return Means(states, counts)


@torch.no_grad()
def begin_with_bigrams(head: SequentialHead, means: Means, lm_head: Tensor) -> None:
    """Sets W1 and W2 of a vanilla head so that W2 W1[v] is nearly lm_head @ mean state of v."""
    weight = lm_head.float()
    seen_after = means.counts + 1.0
    metric = (weight * (seen_after / seen_after.sum())[:, None]).T @ weight
    metric += torch.eye(len(metric)) * (_RIDGE * metric.trace() / len(metric))
    scale, axes = torch.linalg.eigh(metric)
    root, inverse = (axes * scale.sqrt()) @ axes.T, (axes * scale.rsqrt()) @ axes.T
    measured = means.states @ root
    _, directions = torch.linalg.eigh((measured * (means.counts + 1.0)[:, None]).T @ measured)
    best = directions[:, -head.rank :]
    head.markov_w1.weight.copy_(measured @ best)
    head.markov_w2.weight.copy_(weight @ (inverse @ best))


@torch.no_grad()
def begin_as_linear(network: MtpNetwork, items: Iterable[TrainItem], norm: RMSNorm) -> None:
    """Sets eh_proj to the least-squares map to the target's next normed state. norm: the target's last."""
    size = network.config.hidden_size
    products, answers = torch.zeros(2 * size, 2 * size), torch.zeros(2 * size, size)
    for item in items:
        states = item.states.final.float()
        embedded = network.embed_tokens(item.token_ids[1 : len(states)]) * network.config.embedding_scale
        inputs = torch.cat([network.enorm(embedded), network.hnorm(states[:-1])], dim=-1)
        products += inputs.T @ inputs
        answers += inputs.T @ rms_norm(states[1:], [size], eps=network.config.rms_norm_eps)
    products += torch.eye(2 * size) * (_RIDGE * products.trace() / (2 * size))
    network.eh_proj.weight.copy_(torch.linalg.solve(products, answers).T)
    nn.init.zeros_(network.layer.self_attn.o_proj.weight)
    nn.init.zeros_(network.layer.mlp.down_proj.weight)
    offset = network.config.family.norm_offset
    network.norm.weight.copy_((norm.weight + offset) * _DOUBT - offset)
