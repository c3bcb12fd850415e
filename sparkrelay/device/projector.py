"""The projector: from what leaves some layers of the target to the rows that a draft model reads.

It is the draft's own, `hidden_norm(fc([tap; tap; ...]))` for DSpark and DFlash, and it runs beside the target, so that one row a
token crosses the wire instead of one a tap. MTP reads the last layer's output as it is. Which projector made some rows is told by
a hash of its weights: the drafter has the same folder and computes the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from sparkrelay.device.packed_linear import pack_linears
from sparkrelay.device.slab import round_up

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
EMBEDDING_TAP: Final = -1
"""The layer number that stands for the embedding's output."""
WIDTH_LIMIT: Final = 16_384
"""The widest row: half of a FeedContext frame."""
TAP_LIMIT: Final = 64
OFFSET_NORMS: Final = frozenset({"gemma3_text"})
"""Families whose norms multiply by weight + 1."""

Taps = Mapping[int, Tensor]
"""Layer -> what left it, [T, hidden]."""


class UnusableProjector(ValueError):
    """A folder from which no context rows can be made for this target. The message names what is wrong with it."""


class Projector:
    """Makes rows. One thread uses it.

    tap_layers  the layers whose outputs it reads, in its order; -1 is the embedding's
    width       elements of a row
    hash        which projector it is, hex: rows are only for drafts with the same
    """

    def __init__(
        self,
        tap_layers: tuple[int, ...],
        width: int,
        projector_hash: str,
        project: Callable[[Tensor], Tensor],
    ) -> None:
        """project: [T, taps * hidden] bfloat16 -> [T, width]; each row from its own alone if T is padded as the target's."""
        self.tap_layers = tap_layers
        self.width = width
        self.hash = projector_hash
        self._project = project

    @torch.inference_mode()
    def rows(self, taps: Taps, row_multiple: int) -> Tensor:
        """The context rows of all T rows of a forward: bfloat16 [T, width] on the taps' device.

        row_multiple  what the target pads its products to
        """
        parts = [taps[layer] for layer in self.tap_layers]
        count, hidden = parts[0].shape
        side_by_side = parts[0].new_zeros(
            round_up(count, row_multiple), len(parts) * hidden, dtype=torch.bfloat16
        )
        for index, part in enumerate(parts):
            side_by_side[:count, index * hidden : (index + 1) * hidden] = part
        return self._project(side_by_side)[:count]


def load_projector(
    folder: Path, *, hidden_size: int, layer_count: int, device: torch.device | str = "cpu"
) -> Projector:
    """The projector of a draft's folder (config.json, model.safetensors) for a target of this size.

    UnusableProjector: it is none, or one for another target. OSError: there is no such folder.
    """
    config = _read_config(folder)
    if any(str(name).endswith("MtpModel") for name in config.get("architectures") or ()):
        return _last_layer(config, hidden_size, layer_count)
    tap_layers = _tap_layers(config, layer_count)
    fc = _read_tensor(folder, "fc.weight", (_width(config, hidden_size), len(tap_layers) * hidden_size))
    norm = _read_tensor(folder, "hidden_norm.weight", (hidden_size,))
    eps = config.get("rms_norm_eps")
    if not isinstance(eps, float) or not 0 <= eps < 1:
        raise UnusableProjector(f"rms_norm_eps: is {eps!r}; a number from 0 to 1 is needed")
    projector_hash = _hash_of(tap_layers, fc, norm)  # before packing: packed weights cannot be read back
    module = _FcAndNorm(fc, norm + 1 if config.get("model_type") in OFFSET_NORMS else norm, eps).to(device)
    pack_linears(module)
    return Projector(tap_layers, hidden_size, projector_hash, module)


class _FcAndNorm(torch.nn.Module):
    """hidden_norm(fc(x))."""

    def __init__(self, fc: Tensor, norm: Tensor, eps: float) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(fc.shape[1], fc.shape[0], bias=False, dtype=fc.dtype, device="meta")
        self.fc.weight = torch.nn.Parameter(fc, requires_grad=False)
        self.register_buffer("norm", norm)
        self._eps = eps

    def forward(self, rows: Tensor) -> Tensor:
        norm = self.get_buffer("norm")
        return functional.rms_norm(self.fc(rows), list(norm.shape), norm, self._eps)


def _last_layer(config: Mapping[str, Any], hidden_size: int, layer_count: int) -> Projector:
    """MTP: no projector. Its hash names the layer."""
    _width(config, hidden_size)
    made_for = config.get("num_target_layers")
    if made_for != layer_count:
        raise UnusableProjector(f"num_target_layers: is {made_for!r}; the target has {layer_count}")
    last = layer_count - 1
    name = hashlib.sha256(f"the output of layer {last}".encode()).hexdigest()
    return Projector((last,), hidden_size, name, lambda rows: rows)


def _hash_of(tap_layers: tuple[int, ...], fc: Tensor, norm: Tensor) -> str:
    digest = hashlib.sha256(repr(list(tap_layers)).encode())
    for weight in (fc, norm):
        digest.update(weight.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _tap_layers(config: Mapping[str, Any], layer_count: int) -> tuple[int, ...]:
    ids = config.get("target_layer_ids")
    if not isinstance(ids, list) or not 1 <= len(ids) <= TAP_LIMIT or not all(type(i) is int for i in ids):
        raise UnusableProjector(f"target_layer_ids: is {ids!r}; a list of 1 to {TAP_LIMIT} layers is needed")
    outside = [layer for layer in ids if not EMBEDDING_TAP <= layer < layer_count]
    if outside:
        raise UnusableProjector(
            f"target_layer_ids: has {outside[0]}; the target has layers 0 to {layer_count - 1}"
        )
    return tuple(ids)


def _width(config: Mapping[str, Any], hidden_size: int) -> int:
    """The draft's width is the target's: it works with the target's embedding."""
    if config.get("hidden_size") != hidden_size:
        raise UnusableProjector(
            f"hidden_size: is {config.get('hidden_size')!r}; the target has {hidden_size}"
        )
    if hidden_size > WIDTH_LIMIT:
        raise UnusableProjector(
            f"hidden_size: is {hidden_size}; rows of at most {WIDTH_LIMIT} elements can be sent"
        )
    return hidden_size


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnusableProjector(f"{folder / CONFIG_FILE}: is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise UnusableProjector(f"{folder / CONFIG_FILE}: is no JSON object")
    return config


def _read_tensor(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """One tensor of a folder of safetensors, sharded or not, as bfloat16 of its own memory."""
    index, file = folder / INDEX_FILE, folder / WEIGHTS_FILE
    try:
        if index.is_file():
            file = folder / json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(
                name, WEIGHTS_FILE
            )
        with safe_open(file, framework="pt") as tensors:
            if name not in tensors.keys():  # noqa: SIM118 - not a mapping
                raise UnusableProjector(
                    f"{name}: is missing in {file}; name the folder of a DSpark, DFlash or MTP draft"
                )
            tensor: Tensor = tensors.get_tensor(name)
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, UnusableProjector):
            raise
        raise UnusableProjector(f"{file}: cannot be read: {error}") from error
    if tuple(tensor.shape) != shape:
        raise UnusableProjector(f"{name}: is {list(tensor.shape)}; for this target {list(shape)} is needed")
    return tensor.to(torch.bfloat16, copy=True)
