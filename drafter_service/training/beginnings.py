"""Where a draft's weights begin: drawn at random, and then, if wanted, taken over from the target's last layers.

A draft layer that is the target's last one reads, through `fc` and `hidden_norm`, just what that layer reads: `fc` hands on the
deepest tap, and `hidden_norm` is the layer's own input norm. What is left to learn is to do without the anchor's own history.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from drafter_service.models.dspark.checkpoint import Vocabulary, target_tensor
from drafter_service.models.dspark.config import LayerShape
from drafter_service.models.dspark.layers import DraftLayer, RMSNorm
from drafter_service.models.dspark.network import DSparkNetwork
from drafter_service.models.mtp.network import MtpNetwork

_SPREAD = 0.02
_QUIET = 0.1
"""The last norm's first weight: hidden states that mean nothing yet should say little."""


def begin_at_random(network: DSparkNetwork | MtpNetwork, vocabulary: Vocabulary, seed: int) -> None:
    """Draws all weights but the vocabulary's, which are the target's and frozen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * _SPREAD)
            elif name.endswith("bias"):
                weight.zero_()
    if isinstance(network, DSparkNetwork) and network.markov_head is not None:
        nn.init.zeros_(network.markov_head.markov_w2.weight)  # at first no token sways the next
    nn.init.constant_(network.norm.weight, _QUIET - network.config.family.norm_offset)
    network.embed_tokens.weight = nn.Parameter(vocabulary.embedding.float(), requires_grad=False)
    network.lm_head.weight = nn.Parameter(vocabulary.lm_head, requires_grad=False)


def begin_with_target(network: DSparkNetwork | MtpNetwork, target: Path) -> None:
    """Takes over the target's last layers, its last norm, and the way into them. UnusableCheckpoint if it has no such tensors."""
    with torch.no_grad():
        network.norm.weight.copy_(target_tensor(target, "norm.weight"))
        if isinstance(network, DSparkNetwork):
            layers = [layer for layer in network.layers if isinstance(layer, DraftLayer)]
        else:
            layers = [network.layer]
        first = network.config.num_target_layers - len(layers)
        for number, layer in enumerate(layers, start=first):
            _take_layer(layer, target, number, network.config)
        if isinstance(network, DSparkNetwork):
            _hand_through(network.fc.weight, [len(network.config.target_layer_ids) - 1])
            _copy_norm(network.hidden_norm, layers[-1].input_layernorm)
        else:
            _hand_through(network.eh_proj.weight, [0, 1])


def _take_layer(layer: DraftLayer, target: Path, number: int, shape: LayerShape) -> None:
    for name, tensor in layer.state_dict().items():
        taken = target_tensor(target, f"layers.{number}.{name}")
        if taken.shape != tensor.shape:  # the draft has more key heads: each of the target's serves several
            copies = tensor.shape[0] // taken.shape[0]
            by_head = taken.view(-1, shape.head_dim, *taken.shape[1:])
            taken = by_head.repeat_interleave(copies, dim=0).view(tensor.shape)
        tensor.copy_(taken)


def _hand_through(weight: Tensor, parts: list[int]) -> None:
    """Makes a projection of several states side by side, [size, n * size], the sum of some of them; the others begin small."""
    size = weight.shape[0]
    for part in parts:
        weight[:, part * size : (part + 1) * size] += torch.eye(size)


def _copy_norm(to: RMSNorm, source: RMSNorm) -> None:
    to.weight.copy_(source.weight)
