"""The conversion, judged by transformers' own reading of the same GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GgufConfig

from sparkrelay.store import UnsupportedFile
from sparkrelay.store.gguf_to_hf import convert, hf_name, undo_rope_interleave
from sparkrelay.store.safetensors_writer import TensorPlan, bfloat16_words, header_bytes
from tests.store.tiny_gguf import HEADS, HIDDEN, KV_HEADS, write_gguf


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert(gguf_file, folder, lambda done, total: None)
    return folder


def test_every_weight_is_bit_for_bit_what_transformers_reads(gguf_file: Path, converted: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    ).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(converted).state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}


def test_the_config_is_the_models_with_clean_numbers(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert config["head_dim"] == HIDDEN // HEADS
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 2


def test_progress_ends_with_every_byte_written(gguf_file: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert(gguf_file, tmp_path, lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[0][0] == 0
    assert calls[-1][0] == calls[-1][1] < (tmp_path / "model.safetensors").stat().st_size


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFile, match="'falcon'"):
        convert(write_gguf(tmp_path / "x.gguf", architecture="falcon"), tmp_path, lambda done, total: None)


def test_an_unknown_text_splitter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFile, match="'deepseek-coder'"):
        convert(write_gguf(tmp_path / "x.gguf", pre="deepseek-coder"), tmp_path, lambda done, total: None)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.x.attn_q.weight", "rope_freqs.weight", "blk.0"])
def test_an_unknown_tensor_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedFile, match=name):
        hf_name(name)


def test_undoing_the_interleave_collects_even_rows_before_odd_ones_in_each_head() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert undo_rope_interleave(rows, head_count=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_rounding_to_bfloat16_is_torchs(words: list[int]) -> None:
    bits = np.array(words, dtype=np.uint32)
    row = np.where(bits & 0x7F800000 == 0x7F800000, 0, bits).astype(np.uint32).view(np.float32)  # finite ones
    theirs = torch.from_numpy(row.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert bfloat16_words(row).tolist() == theirs.tolist()


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        bfloat16_words(np.array([1.0, np.inf], dtype=np.float32))


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two tensors"):
        header_bytes([TensorPlan("a", (1,)), TensorPlan("a", (2,))])
