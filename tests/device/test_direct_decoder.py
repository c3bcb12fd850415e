"""Layers that are written out give what the model's own modules give, and are not used where they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparkrelay.device import direct_decoder
from sparkrelay.device.direct_decoder import DirectDecoder, RmsNorm
from sparkrelay.device.flat_batch import FlatBatch, FlatEntry
from sparkrelay.device.flat_model import DtypeName, FlatCausalLM, FlatOutput
from sparkrelay.device.packed_linear import PackedLinear
from tests.device.tiny_models import FAMILIES, save_tiny

WRITTEN_OUT = {"llama", "llama3_rope", "qwen2", "qwen3", "mistral_sliding"}
DTYPES: tuple[DtypeName, ...] = ("bfloat16", "float32")


def outputs(model: FlatCausalLM) -> FlatOutput:
    ids = np.arange(23, dtype=np.int64) * 5 + 1
    batch = FlatBatch(ids, (FlatEntry(model.new_state(), 0, len(ids)),), np.array([0, 7, 22]))
    return model.forward_with_taps(batch, (-1, 0, model.layer_count - 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", sorted(WRITTEN_OUT))
def test_written_out_layers_give_the_logits_and_hidden_states_of_the_models_own(
    family: str, dtype: DtypeName, tmp_path: Path
) -> None:
    model = FlatCausalLM.load(save_tiny(FAMILIES[family](), tmp_path), dtype=dtype)
    if not any(isinstance(layer, PackedLinear) for layer in model.linears()):
        pytest.skip("this CPU has no packed kernels for this type")
    direct = outputs(model)
    assert model._direct is not None
    model._direct = None
    own = outputs(model)
    tolerance = 0.03 if dtype == "bfloat16" else 2e-6
    assert list(direct.taps) == list(own.taps) == [-1, 0, model.layer_count - 1]
    for ours, theirs in (
        (direct.logits, own.logits),
        *zip(direct.taps.values(), own.taps.values(), strict=True),
    ):
        assert ours.shape == theirs.shape and theirs.float().std() > 0.05
        assert (ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm()


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - WRITTEN_OUT))
def test_other_families_run_on_their_own_modules(family: str, tmp_path: Path) -> None:
    assert FlatCausalLM.load(save_tiny(FAMILIES[family](), tmp_path), dtype="float32")._direct is None


def test_layers_that_compute_something_else_are_found_out_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny(FAMILIES["llama"](), tmp_path)
    expected = outputs(FlatCausalLM.load(path, dtype="float32")).logits
    monkeypatch.setattr(direct_decoder, "silu", torch.sigmoid)
    model = FlatCausalLM.load(path, dtype="float32")
    assert model._direct is None
    assert torch.allclose(outputs(model).logits, expected, atol=1e-5)


def test_a_model_whose_weights_are_not_packed_keeps_its_modules(tmp_path: Path) -> None:
    model = FlatCausalLM.load(save_tiny(FAMILIES["llama"](), tmp_path), dtype="float32")
    layer = model._model.model.layers[1].mlp
    layer.down_proj = torch.nn.Linear(layer.down_proj.in_features, layer.down_proj.out_features, bias=False)
    assert DirectDecoder.of(model._model) is None


@pytest.mark.parametrize("width", [16, 48, 577])
def test_a_norm_is_the_root_mean_square_one(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(5, width, generator=generator) * 30 + 4
    weight = torch.randn(width, generator=generator)
    expected = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
    assert torch.allclose(RmsNorm(weight, 1e-5)(rows), expected, rtol=1e-5, atol=1e-6)
