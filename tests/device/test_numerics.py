"""The probe tells a machine that keeps exact mode's promise from one that does not, and names its bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from sparkrelay.device import numerics, product_attention
from sparkrelay.device.flat_model import FlatCausalLM
from sparkrelay.device.numerics import probe
from sparkrelay.device.packed_linear import SharedProduct, pack_linears
from tests.device.tiny_models import COMMON, FAMILIES, save_tiny

WIDE = COMMON | {"hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 2}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_tiny(LlamaConfig(**WIDE), tmp_path)


def test_two_loads_of_one_model_have_one_fingerprint_and_other_bits_have_another(path: Path) -> None:
    first, second = (probe(FlatCausalLM.load(path, dtype="float32")) for _ in range(2))
    other = probe(FlatCausalLM.load(path, dtype="bfloat16"))
    assert first == second
    assert first.exact and first.reason == "" and first.row_multiple in numerics.ROW_MULTIPLES
    assert first.fingerprint != other.fingerprint
    assert torch.__version__ in first.description and "float32" in first.description


def test_exact_mode_switched_off_is_said_and_still_has_a_fingerprint(path: Path) -> None:
    found = probe(FlatCausalLM.load(path, dtype="float32", exact=False))
    assert (found.exact, found.row_multiple, found.reason) == (False, 1, "exact mode is switched off")
    assert len(found.fingerprint) == 16


def test_a_kernel_that_looks_at_the_row_count_is_found_and_named(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FlatCausalLM.load(path, dtype="float32")
    layer = next(model.linears())
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda rows: plain(rows) * (1 + 1e-6 * rows.shape[-2]))
    found = probe(model)
    assert not found.exact and model.row_multiple == 1
    assert found.reason.startswith("a linear layer 192 x ") and found.reason.endswith(
        "padded to a multiple of 16"
    )


def test_a_kernel_that_needs_eight_rows_gets_eight(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FlatCausalLM.load(path, dtype="float32")
    layer = next(model.linears())
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda rows: plain(rows) + (1e-3 if rows.shape[-2] % 8 else 0.0))
    found = probe(model)
    assert found.exact and found.row_multiple == model.row_multiple == 8


def test_attention_that_looks_at_the_neighbours_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FlatCausalLM.load(path, dtype="float32")
    plain = product_attention._sums
    monkeypatch.setattr(
        product_attention,
        "_sums",
        lambda weights, *rest: plain(weights, *rest) * (1 + 1e-6 * weights.shape[1]),
    )
    found = probe(model)
    assert not found.exact and "attention with 2 key heads of 32" in found.reason


def test_experts_as_transformers_runs_them_would_be_found(tmp_path: Path) -> None:
    """With its own implementation an expert's products have as many rows as neighbours chose it."""
    config = Qwen3MoeConfig(
        **WIDE, head_dim=32, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=192
    )
    model = FlatCausalLM.load(save_tiny(config, tmp_path), dtype="float32")
    assert probe(model).exact
    model._model.set_experts_implementation("eager")
    assert numerics._model_failure(model) is not None


class Attention(torch.nn.Module):
    """Three layers with one input, one with another, and one that cannot be packed."""

    def __init__(self, bias: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            torch.nn.Linear(96, size, bias=bias) for size in (160, 32, 32)
        )
        self.o_proj = torch.nn.Linear(160, 96, bias=bias)
        self.to(dtype).requires_grad_(False)
        self.gate = torch.nn.Linear(4, 4, dtype=torch.float64).requires_grad_(False)


def random_rows(count: int, width: int) -> torch.Tensor:
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(count)).to(torch.bfloat16)


@pytest.mark.parametrize("bias", [False, True])
def test_packing_changes_no_bit_and_no_layer_that_it_cannot_pack(bias: bool) -> None:
    model = Attention(bias)
    plain = {name: (layer.weight, layer.bias) for name, layer in model.named_children()}
    packed_count = pack_linears(model)
    assert packed_count in (0, 4), "all or, on a CPU without bfloat16 kernels, none"
    assert type(model.gate) is torch.nn.Linear
    for count in (4, 7, 16, 100):
        rows = random_rows(count, 96)
        for name in ("q_proj", "k_proj", "v_proj"):
            assert torch.equal(getattr(model, name)(rows), torch.nn.functional.linear(rows, *plain[name]))
        rows = random_rows(count, 160)
        assert torch.equal(model.o_proj(rows), torch.nn.functional.linear(rows, *plain["o_proj"]))
    assert model.q_proj(torch.zeros(0, 96, dtype=torch.bfloat16)).shape == (0, 160)


def test_packing_float32_keeps_results_within_rounding_and_rows_independent() -> None:
    model = Attention(bias=True, dtype=torch.float32)
    weight, bias = model.o_proj.weight, model.o_proj.bias
    if not pack_linears(model):
        pytest.skip("this CPU has no packed float32 kernels")
    rows = random_rows(64, 160).float()
    together = model.o_proj(rows)
    assert torch.allclose(together, torch.nn.functional.linear(rows, weight, bias), atol=1e-4)
    for count in (4, 8, 12, 16):
        assert torch.equal(model.o_proj(rows[:, :count].clone()), together[:, :count])


def test_layers_of_one_product_may_be_asked_in_any_order_for_any_rows() -> None:
    model = Attention(bias=False)
    if not pack_linears(model):
        pytest.skip("this CPU has no packed bfloat16 kernels")
    first, second = random_rows(4, 96), random_rows(8, 96)
    expected = {
        (name, number): getattr(model, name)(rows.clone())
        for name in ("q_proj", "k_proj", "v_proj")
        for number, rows in enumerate((first, second))
    }
    for name, number in (
        ("k_proj", 0),
        ("k_proj", 0),
        ("q_proj", 1),
        ("v_proj", 0),
        ("v_proj", 1),
        ("q_proj", 0),
    ):
        assert torch.equal(getattr(model, name)((first, second)[number]), expected[name, number])


@pytest.mark.parametrize(
    "error", [RuntimeError("mkldnn_bf16_gemm: not supported"), AttributeError("_linear_pointwise")]
)
def test_a_cpu_without_the_operators_keeps_plain_layers(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: SharedProduct, *arguments: object) -> None:
        raise error

    monkeypatch.setattr(SharedProduct, "__init__", refuse)
    model = Attention(bias=False)
    assert pack_linears(model) == 0
    assert all(type(layer) is torch.nn.Linear for layer in model.children())


def test_the_probe_holds_for_windows_and_experts_too(tmp_path: Path) -> None:
    for family in ("gemma3", "qwen3_moe", "gpt_oss_sinks"):
        assert probe(
            FlatCausalLM.load(save_tiny(FAMILIES[family](), tmp_path / family), dtype="bfloat16")
        ).exact
