"""Draft checkpoints: what is written can be read, and what cannot be used is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from drafter_service.models.dspark.checkpoint import (
    load_draft,
    read_config,
    save_draft,
    target_vocabulary,
)
from drafter_service.models.dspark.config import UnusableCheckpoint, from_json, to_json
from drafter_service.models.dspark.layers import rope_frequencies
from drafter_service.models.dspark.packed import packed_hidden
from tests.drafter_service.models.dspark_networks import (
    draft_config,
    random_network,
    random_sequence,
    target_config,
)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gemma4_text"])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_saved_draft_comes_back(tmp_path: Path, family: str, kind: str) -> None:
    network = random_network(draft_config(family, markov_head_type=kind))
    save_draft(network, tmp_path, {"target": "a name"}, with_vocabulary=True)
    loaded = load_draft(tmp_path, torch.float32)
    assert loaded.config == network.config
    assert read_config(tmp_path)["target"] == "a name"
    sequence = random_sequence(9, [5, 7])
    hidden = packed_hidden(network, [sequence])
    assert torch.equal(packed_hidden(loaded, [sequence]), hidden)
    assert torch.equal(loaded.base_logits(hidden), network.base_logits(hidden))


def test_the_released_names_are_the_file_s_names(tmp_path: Path) -> None:
    save_draft(random_network(draft_config("qwen3", num_hidden_layers=1)), tmp_path, {}, with_vocabulary=True)
    layer = "layers.0."
    assert set(load_file(tmp_path / "model.safetensors")) == {
        "embed_tokens.weight",
        "lm_head.weight",
        "fc.weight",
        "hidden_norm.weight",
        "norm.weight",
        "markov_head.markov_w1.weight",
        "markov_head.markov_w2.weight",
        "confidence_head.proj.weight",
        "confidence_head.proj.bias",
        *(f"{layer}{name}_layernorm.weight" for name in ("input", "post_attention")),
        *(f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"{layer}self_attn.{name}_norm.weight" for name in "qk"),
        *(f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    assert read_config(tmp_path)["architectures"] == ["Qwen3DSparkModel"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_target_lends_its_vocabulary(tmp_path: Path, tied: bool) -> None:
    network = random_network(draft_config())
    if tied:
        network.lm_head.weight = torch.nn.Parameter(network.embed_tokens.weight.detach(), requires_grad=False)
    target, draft = tmp_path / "target", tmp_path / "draft"
    target.mkdir()
    tensors = {"model.embed_tokens.weight": network.embed_tokens.weight.detach()}
    if not tied:
        tensors["lm_head.weight"] = network.lm_head.weight.detach()
    save_file(tensors, target / "model.safetensors")
    save_draft(network, draft, {}, with_vocabulary=False)
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(load_file(draft / "model.safetensors"))
    loaded = load_draft(draft, torch.float32, target_vocabulary(target))
    assert torch.equal(loaded.embed_tokens.weight, network.embed_tokens.weight)
    assert torch.equal(loaded.lm_head.weight, network.lm_head.weight)
    with pytest.raises(UnusableCheckpoint, match=r"embed_tokens\.weight: is missing .* name the target"):
        load_draft(draft, torch.float32)


def test_a_sharded_target_lends_its_vocabulary(tmp_path: Path) -> None:
    embedding, lm_head = torch.randn(4, 3), torch.randn(4, 3)
    save_file({"model.embed_tokens.weight": embedding}, tmp_path / "one.safetensors")
    save_file({"lm_head.weight": lm_head}, tmp_path / "two.safetensors")
    places = {"model.embed_tokens.weight": "one.safetensors", "lm_head.weight": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = target_vocabulary(tmp_path)
    assert torch.equal(found.embedding, embedding)
    assert torch.equal(found.lm_head, lm_head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head.weight": None}, r"lm_head\.weight: is missing"),
        ({"fc.weight": torch.zeros(3, 3)}, r"fc\.weight: is \[3, 3\], the configuration says \[24, 48\]"),
        (
            {"layers.2.mlp.up_proj.weight": torch.zeros(1)},
            r"layers\.2\.mlp\.up_proj\.weight: is no tensor of",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_draft(random_network(draft_config()), tmp_path, {}, with_vocabulary=True)
    tensors = {**load_file(tmp_path / "model.safetensors"), **change}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(UnusableCheckpoint, match=message):
        load_draft(tmp_path, torch.float32, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "model_type: is 'mamba'; known families are llama"),
        ({"target_layer_ids": [1, 8]}, "target_layer_ids: 8 cannot be read; -1 to 7 can"),
        ({"target_layer_ids": []}, "target_layer_ids: is empty"),
        ({"mask_token_id": 61}, "mask_token_id: is 61; the vocabulary has 61"),
        ({"block_size": None}, "block_size: is missing"),
        ({"markov_head_type": "lstm"}, "markov_head_type: is 'lstm'; known are vanilla, gated, rnn"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide 4"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type: is 'dynamic'"),
        ({"markov_rank": 0}, "confidence_head_with_markov: needs a markov_rank"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    config = {**to_json(draft_config()), **fields}
    with pytest.raises(UnusableCheckpoint, match=message):
        from_json({name: value for name, value in config.items() if value is not None})


def test_the_anchor_layout_is_never_guessed() -> None:
    config = to_json(draft_config(markov_rank=0, enable_confidence_head=False, sample_from_anchor=False))
    assert not from_json(config).sample_from_anchor
    del config["sample_from_anchor"]
    with pytest.raises(UnusableCheckpoint, match=r"sample_from_anchor: .* Add the key"):
        from_json(config)
    assert from_json({**config, "architectures": ["Qwen3DSparkModel"]}).sample_from_anchor


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_stretched_rope_is_that_of_transformers(rope: dict[str, Any]) -> None:
    parameters = {**rope, "rope_theta": 1000.0}
    config = target_config()
    del config["rope_theta"]
    theirs = LlamaConfig(**{**config, "rope_parameters": parameters})
    expected, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, device="cpu")
    assert scale == 1.0
    ours = from_json({**to_json(draft_config()), "rope_parameters": parameters})
    found = rope_frequencies(ours.rope, ours.head_dim)
    assert torch.allclose(found, expected, rtol=1e-6)
    plain = rope_frequencies({"rope_type": "default", "rope_theta": 1000.0}, ours.head_dim)
    assert not torch.allclose(found, plain, rtol=1e-3)
