"""What a verifier reads of a draft's folder: config.json and the projector, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def save_projector(
    folder: Path, taps: tuple[int, ...] = (-1, 1, 3), hidden_size: int = 48, seed: int = 3, **fields: Any
) -> Path:
    """A DSpark draft as far as its projector goes. `fields` of config.json may say otherwise."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (hidden_size, len(taps) * hidden_size)
    tensors = {
        "fc.weight": torch.randn(shape, generator=generator).bfloat16(),
        "hidden_norm.weight": torch.rand(hidden_size, generator=generator).bfloat16(),
    }
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "target_layer_ids": list(taps),
        "rms_norm_eps": 1e-5,
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
