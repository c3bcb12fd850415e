"""Tiny random draft networks for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from drafter_service.models.dspark.config import DraftConfig, draft_of, to_json
from drafter_service.models.dspark.network import DSparkNetwork
from drafter_service.models.dspark.packed import PackedSequence
from tests.drafter_service.models.dspark_reference import Rows

VOCAB = 61
TAPS = 2
HIDDEN = 24


def target_config(family: str = "llama", **fields: Any) -> dict[str, Any]:
    """A config.json as a target of that family has it."""
    return {
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 40,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "max_position_embeddings": 2048,
        **fields,
    }


def draft_config(family: str = "llama", **fields: Any) -> DraftConfig:
    """A two-layer draft with a vanilla head of rank 6 and a confidence head, unless `fields` say otherwise."""
    defaults: dict[str, Any] = {
        "num_hidden_layers": 2,
        "target_layer_ids": (1, 5),
        "mask_token_id": 60,
        "block_size": 4,
        "markov_rank": 6,
        "enable_confidence_head": True,
    }
    return draft_of(target_config(family), **{**defaults, **fields})


def random_network(config: DraftConfig, seed: int = 0) -> DSparkNetwork:
    """Every weight drawn anew, norms included, so that nothing is accidentally neutral."""
    torch.manual_seed(seed)
    network = DSparkNetwork(config)
    for tensor in network.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * (0.3 if tensor.ndim > 1 else 0.5))
    return network.eval().requires_grad_(False)


def released_form(network: DSparkNetwork) -> tuple[dict[str, Any], dict[str, Rows]]:
    """The network as its checkpoint has it: config.json and tensors by name."""
    tensors = {name: tensor.double().numpy() for name, tensor in network.state_dict().items()}
    return to_json(network.config), tensors


def random_sequence(
    length: int, anchors: list[int], seed: int = 0, dtype: torch.dtype = torch.float32
) -> PackedSequence:
    generator = torch.Generator().manual_seed(seed)
    taps = torch.randn(length, TAPS * HIDDEN, generator=generator).to(dtype)
    ids = torch.randint(0, VOCAB - 1, (length + 1,), generator=generator)
    return PackedSequence(taps, ids, torch.tensor(anchors, dtype=torch.int64))


def relative_error(found: torch.Tensor, expected: Rows | torch.Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    wanted = np.asarray(expected, dtype=np.float64)
    return float(np.abs(found.double().numpy() - wanted).max() / np.abs(wanted).max())
