"""The Hugging Face target keeps the engine's bargain: memory by sequence id, room by blocks, rows by ragged batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from sparkrelay.device.slab import BLOCK_TOKENS
from tests.device.tiny_models import COMMON, VOCAB_SIZE, save_tiny
from verifier_service.models import TargetModel
from verifier_service.models.huggingface import HuggingFaceModel
from verifier_service.ragged_batch import RaggedBatch, Segment

IDS = [int(i) for i in np.random.default_rng(2).integers(3, VOCAB_SIZE, 600)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(LlamaConfig(**COMMON), tmp_path_factory.mktemp("models") / "tiny")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def model(path: Path) -> TargetModel:
    return HuggingFaceModel.load(path, model_id="tiny", dtype="float32")


def opened(model: TargetModel, sequence_id: int, blocks: int) -> None:
    model.open(sequence_id)
    model.resize(sequence_id, range(blocks))


def logits(model: TargetModel, sequence_id: int, start: int, stop: int, kept: int) -> np.ndarray:
    return model.forward(RaggedBatch.of([Segment(sequence_id, start, IDS[start:stop], kept)]))


def test_it_says_what_it_is(model: TargetModel) -> None:
    info = model.info
    assert (info.model_id, info.vocab_size, info.context_limit) == ("tiny", VOCAB_SIZE, 2048)
    assert (info.block_tokens, info.block_bytes) == (BLOCK_TOKENS, BLOCK_TOKENS * 4 * 4 * 2 * 2 * 8)
    assert info.default_stop_ids == (2,)
    assert info.dtype == "float32"
    assert info.exact or info.exact_reason
    assert len(info.numerics) == 16
    assert info.tokenizer_hash == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_a_batch_of_several_sequences_gives_each_its_own_rows_in_order(model: TargetModel) -> None:
    for sequence_id in (1, 2, 3):
        opened(model, sequence_id, 1)
    alone = logits(model, 3, 0, 20, 20)
    both = model.forward(RaggedBatch.of([Segment(1, 0, IDS[:20], 3), Segment(2, 0, IDS[:8], 0)]))
    assert np.array_equal(both, alone[17:])
    assert both.dtype == np.float32
    later = model.forward(RaggedBatch.of([Segment(2, 8, IDS[8:9], 1), Segment(1, 20, IDS[20:21], 1)]))
    assert np.array_equal(later[0], alone[8])


def test_rewinding_goes_exactly_as_far_as_it_is_asked_to(model: TargetModel) -> None:
    opened(model, 1, 2)
    first = logits(model, 1, 0, 600, 600)
    assert model.rewind(1, 511) == 511
    assert model.rewind(1, 550) == 511, "nothing comes back"
    assert np.array_equal(logits(model, 1, 511, 514, 3), first[511:514])


def test_a_fork_goes_on_as_the_original_would(model: TargetModel) -> None:
    opened(model, 1, 2)
    opened(model, 2, 1)
    first = logits(model, 1, 0, 600, 600)
    assert model.fork(1, 2, 300) == 300
    assert np.array_equal(logits(model, 2, 300, 302, 2), first[300:302])
    assert model.fork(1, 2, 600) == 512, "a fork gets no more than it has room for"


def test_room_that_is_taken_away_takes_what_lay_in_it(model: TargetModel) -> None:
    opened(model, 1, 2)
    first = logits(model, 1, 0, 600, 600)
    model.resize(1, [0])
    assert model.rewind(1, 600) == 512
    model.resize(1, [0, 1])
    assert np.array_equal(logits(model, 1, 512, 516, 4), first[512:516])


def test_rows_beyond_the_room_are_the_engines_bug(model: TargetModel) -> None:
    opened(model, 1, 1)
    with pytest.raises(AssertionError, match="beyond the room"):
        logits(model, 1, 0, 513, 1)


def test_a_closed_sequence_is_gone_and_its_number_free(model: TargetModel) -> None:
    opened(model, 1, 1)
    model.close(1)
    opened(model, 1, 1)
    assert logits(model, 1, 0, 2, 1).shape == (1, VOCAB_SIZE)
