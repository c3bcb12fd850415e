"""The flat ragged forward computes what each model's own forward computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Llama4TextConfig, LlamaConfig, MambaConfig

from sparkrelay.device.flat_batch import FlatBatch, FlatEntry
from sparkrelay.device.flat_model import FlatCausalLM, UnsupportedModel
from tests.device.ragged import Line, run, step
from tests.device.tiny_models import COMMON, FAMILIES, VOCAB_SIZE, save_tiny


def own_logits(path: Path, ids: np.ndarray) -> torch.Tensor:
    """[T, vocab] of transformers' own forward with its plainest attention and experts."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None], use_cache=False).logits[0]


def ragged_run(model: FlatCausalLM, sequences: list[Line], generator: np.random.Generator) -> None:
    """Random chunks of random subsets, all in shared forwards, until every sequence is through."""
    while waiting := [sequence for sequence in sequences if sequence.left]:
        chosen = [sequence for sequence in waiting if generator.random() < 0.7] or waiting[:1]
        step(
            model, [(sequence, int(generator.integers(1, min(9, sequence.left) + 1))) for sequence in chosen]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_in_random_chunks_equals_the_models_own_forward(family: str, tmp_path: Path) -> None:
    path = save_tiny(FAMILIES[family](), tmp_path)
    model = FlatCausalLM.load(path, dtype="float32")
    generator = np.random.default_rng(3)
    sequences = [
        Line(generator.integers(0, VOCAB_SIZE, length), model.new_state()) for length in (41, 23, 30)
    ]
    ragged_run(model, sequences, generator)
    for sequence in sequences:
        own = own_logits(path, sequence.ids)
        ours = torch.stack([sequence.rows[position] for position in range(len(sequence.ids))])
        assert own.std() > 0.05, "the tiny model must have something to say"
        assert (ours - own).abs().max() <= 2e-5 * max(1.0, float(own.abs().max()))
        assert torch.equal(ours.argmax(dim=-1), own.argmax(dim=-1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_familys_rows_are_bit_equal_alone_and_in_company_across_512(
    family: str, dtype: str, tmp_path: Path
) -> None:
    model = FlatCausalLM.load(save_tiny(FAMILIES[family](), tmp_path), dtype=dtype)  # type: ignore[arg-type]
    generator = np.random.default_rng(5)
    ids = generator.integers(0, VOCAB_SIZE, 530)
    watched = range(490, 530)
    alone = run(model, ids, [490] + [1] * 40, kept_from=490)
    in_blocks = run(model, ids, [7] * 70 + [3, 5, 8, 13, 11], kept_from=490)
    company = [Line(ids, model.new_state())]
    company += [
        Line(generator.integers(0, VOCAB_SIZE, length), model.new_state()) for length in (700, 520, 60)
    ]
    for sequence, count in zip(company, (489, 500, 500, 3), strict=True):
        step(model, [(sequence, count)], kept_from=490)
    while company[0].left:
        step(
            model, [(sequence, min(4, sequence.left)) for sequence in company if sequence.left], kept_from=490
        )
    for other in (in_blocks, company[0]):
        assert [
            position for position in watched if not torch.equal(alone.rows[position], other.rows[position])
        ] == []


def test_layers_that_share_keys_have_no_slab_of_their_own(tmp_path: Path) -> None:
    layout = FlatCausalLM.load(save_tiny(FAMILIES["gemma4_shared_kv"](), tmp_path), dtype="float32").layout
    assert [place.writes for place in layout.places] == [True, True, False, False]
    assert [(place.kind, place.index) for place in layout.places] == [(0, 0), (1, 0), (0, 0), (1, 0)]
    assert [kind.key_dim for kind in layout.kinds] == [16, 32]


def test_a_rewound_sequence_gives_the_rows_of_one_that_was_never_ahead(tmp_path: Path) -> None:
    model = FlatCausalLM.load(save_tiny(FAMILIES["gemma3"](), tmp_path), dtype="float32")
    generator = np.random.default_rng(11)
    ids = generator.integers(0, VOCAB_SIZE, 40)
    plain = run(model, ids, [10] * 4)
    sequence = Line(np.concatenate([ids[:20], generator.integers(0, VOCAB_SIZE, 15)]), model.new_state())
    step(model, [(sequence, 20)])
    step(model, [(sequence, 15)])
    sequence.state.rewind(20)
    again = Line(ids, sequence.state)
    step(model, [(again, 20)])
    assert all(torch.equal(again.rows[position], plain.rows[position]) for position in range(20, 40))


def test_taps_are_the_hidden_states_that_leave_the_named_layers(tmp_path: Path) -> None:
    path = save_tiny(FAMILIES["llama"](), tmp_path)
    model = FlatCausalLM.load(path, dtype="float32")
    ids = np.arange(5, 12)
    own = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        hidden = own(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states
    batch = FlatBatch(ids, (FlatEntry(model.new_state(), 0, len(ids)),), np.array([], dtype=np.int64))
    output = model.forward_with_taps(batch, (0, 2))
    assert output.logits.shape == (0, VOCAB_SIZE)
    assert sorted(output.taps) == [0, 2]
    for layer, rows in output.taps.items():
        assert torch.allclose(rows, hidden[layer + 1][0], atol=1e-5)


def test_logits_are_float32_of_the_kept_rows_in_their_order(tmp_path: Path) -> None:
    model = FlatCausalLM.load(save_tiny(FAMILIES["qwen3"](), tmp_path), dtype="bfloat16")
    ids = np.arange(9)
    whole = model.forward(FlatBatch(ids, (FlatEntry(model.new_state(), 0, 9),), np.arange(9)))
    some = model.forward(FlatBatch(ids, (FlatEntry(model.new_state(), 0, 9),), np.array([7, 2])))
    assert whole.dtype == torch.float32 and whole.shape == (9, VOCAB_SIZE)
    assert torch.equal(some, whole[[7, 2]])


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_looks_at_the_neighbours_is_refused_in_exact_mode(rope_type: str, tmp_path: Path) -> None:
    factors = [1.0] * 4
    rope = {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 1024,
    }
    if rope_type == "longrope":
        rope |= {"short_factor": factors, "long_factor": factors}
    path = save_tiny(LlamaConfig(**COMMON, rope_parameters=rope), tmp_path)
    with pytest.raises(UnsupportedModel, match=f"RoPE is {rope_type}"):
        FlatCausalLM.load(path, dtype="float32")
    assert FlatCausalLM.load(path, dtype="float32", exact=False).row_multiple == 1


def test_layers_with_a_state_of_their_own_are_refused_by_name(tmp_path: Path) -> None:
    mamba = save_tiny(
        MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=2, state_size=4),
        tmp_path / "mamba",
    )
    with pytest.raises(UnsupportedModel, match="mamba cannot be served: its attention cannot be reached"):
        FlatCausalLM.load(mamba, dtype="float32")
    chunked = Llama4TextConfig(
        **COMMON,
        head_dim=8,
        num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"] * 2,
        intermediate_size_mlp=64,
    )
    with pytest.raises(UnsupportedModel, match="layers of type chunked_attention"):
        FlatCausalLM.load(save_tiny(chunked, tmp_path / "llama4"), dtype="float32")


def test_learned_positions_are_served_too(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    path = save_tiny(config, tmp_path)
    model = FlatCausalLM.load(path, dtype="float32")
    ids = np.arange(3, 23)
    ours = run(model, ids, [6, 1, 9, 4])
    rows = torch.stack([ours.rows[position] for position in range(20)])
    assert (rows - own_logits(path, ids)).abs().max() <= 1e-5
    assert model.context_limit == 64
