"""Draft checkpoints on disk: a folder with config.json and model.safetensors, in the released layout.

The embedding and the LM head are the target's and frozen, so a folder may leave them out; they are then the target's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafter_service.models.dspark.config import DraftConfig, UnusableCheckpoint, from_json, to_json
from drafter_service.models.dspark.network import DSparkNetwork
from drafter_service.models.mtp.network import MtpNetwork, mtp_from_json, mtp_to_json

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
EMBEDDING: Final = "embed_tokens.weight"
LM_HEAD: Final = "lm_head.weight"
TARGET_PREFIXES: Final = ("model.", "model.language_model.")
"""What the names of a target's tensors may begin with."""


class Vocabulary(NamedTuple):
    """What a draft shares with its target, each [vocab, hidden]; the same tensor twice where the target ties them."""

    embedding: Tensor
    lm_head: Tensor


def target_vocabulary(folder: Path) -> Vocabulary:
    """Embedding and LM head of a target's checkpoint folder. UnusableCheckpoint if it has none under a known name."""
    embedding = target_tensor(folder, EMBEDDING)
    lm_head = read_tensor(folder, LM_HEAD)
    return Vocabulary(embedding, embedding if lm_head is None else lm_head)


def target_tensor(folder: Path, name: str) -> Tensor:
    """A tensor of a target's decoder, `layers.0.mlp.up_proj.weight` say. UnusableCheckpoint if there is none of that name."""
    for prefix in TARGET_PREFIXES:
        tensor = read_tensor(folder, prefix + name)
        if tensor is not None:
            return tensor
    raise UnusableCheckpoint(
        f"{folder}: has no tensor {' or '.join(prefix + name for prefix in TARGET_PREFIXES)}"
    )


def save_draft(
    network: DSparkNetwork | MtpNetwork,
    folder: Path,
    more: Mapping[str, Any],
    *,
    with_vocabulary: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a draft, in another type if one is given. `more` goes into config.json beside the draft's own fields."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to(dtype or tensor.dtype, copy=True).contiguous()
        for name, tensor in network.state_dict().items()
        if with_vocabulary or name not in (EMBEDDING, LM_HEAD)
    }
    config = network.config
    own = to_json(config) if isinstance(config, DraftConfig) else mtp_to_json(config)
    saved_type = str(dtype or network.norm.weight.dtype).removeprefix("torch.")
    save_file(tensors, folder / WEIGHTS_FILE)
    record = {**own, "dtype": saved_type, **more}
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_draft(folder: Path, dtype: torch.dtype, vocabulary: Vocabulary | None = None) -> DSparkNetwork:
    """Reads a DSpark or DFlash draft; `vocabulary` fills in what the folder leaves out.

    UnusableCheckpoint names tensors that are missing, unknown or of another shape; OSError: there is no such folder.
    """
    config = from_json(read_config(folder))
    with torch.device("meta"):
        network = DSparkNetwork(config)
    _load(network, folder, dtype, vocabulary)
    return network


def load_mtp(folder: Path, dtype: torch.dtype, vocabulary: Vocabulary | None = None) -> MtpNetwork:
    """Reads an MTP-1 draft, as `load_draft` does."""
    config = mtp_from_json(read_config(folder))
    with torch.device("meta"):
        network = MtpNetwork(config)
    _load(network, folder, dtype, vocabulary)
    return network


def _load(
    network: DSparkNetwork | MtpNetwork, folder: Path, dtype: torch.dtype, vocabulary: Vocabulary | None
) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    if vocabulary is not None:
        tensors.setdefault(EMBEDDING, vocabulary.embedding)
        tensors.setdefault(LM_HEAD, vocabulary.lm_head)
    _check(folder, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}, tensors)
    shared = (EMBEDDING, LM_HEAD)
    network.load_state_dict(
        {name: tensor.to(dtype, copy=name not in shared) for name, tensor in tensors.items()}, assign=True
    )
    network.eval().requires_grad_(False)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. UnusableCheckpoint if it is no JSON object; OSError if there is none."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnusableCheckpoint(f"{folder / CONFIG_FILE}: is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise UnusableCheckpoint(f"{folder / CONFIG_FILE}: is no JSON object")
    return config


def _check(folder: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    for name, shape in expected.items():
        if name not in found:
            hint = "; name the target, whose own it is" if name in (EMBEDDING, LM_HEAD) else ""
            raise UnusableCheckpoint(f"{name}: is missing in {folder / WEIGHTS_FILE}{hint}")
        if tuple(found[name].shape) != shape:
            raise UnusableCheckpoint(
                f"{name}: is {list(found[name].shape)}, the configuration says {list(shape)}"
            )
    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise UnusableCheckpoint(
            f"{unknown[0]}: is no tensor of this configuration ({len(unknown)} such in {folder})"
        )


def read_tensor(folder: Path, name: str) -> Tensor | None:
    """One tensor of a folder of safetensors, sharded or not; None if it has no such."""
    index = folder / INDEX_FILE
    file = folder / WEIGHTS_FILE
    if index.is_file():
        shard = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)
        if shard is None:
            return None
        file = folder / shard
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name) if name in tensors.keys() else None  # noqa: SIM118 - not a mapping
