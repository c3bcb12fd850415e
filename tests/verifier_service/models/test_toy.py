"""The toys are honest models: same tokens, same logits, however they are read; and they notice an engine's mistakes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier_service.models.toy import FreeToyModel, SnapshotToyModel, ToyModel, toy_model
from verifier_service.ragged_batch import RaggedBatch, Segment

IDS = st.lists(st.integers(0, 63), min_size=1, max_size=40)


def opened(model: ToyModel, sequence_id: int = 1) -> ToyModel:
    model.open(sequence_id)
    model.resize(sequence_id, range(8))
    return model


def read(
    model: ToyModel, start: int, token_ids: list[int], logit_count: int, sequence_id: int = 1
) -> np.ndarray:
    return model.forward(RaggedBatch.of([Segment(sequence_id, start, token_ids, logit_count)]))


@given(IDS, st.lists(st.integers(1, 7)))
def test_logits_do_not_depend_on_how_the_tokens_were_read(ids: list[int], chunks: list[int]) -> None:
    whole = read(opened(ToyModel()), 0, ids, len(ids))
    model, parts, start = opened(ToyModel()), [], 0
    while start < len(ids):
        chunk = ids[start : start + (chunks.pop() if chunks else 3)]
        parts.append(read(model, start, chunk, len(chunk)))
        start += len(chunk)
    assert np.array_equal(np.concatenate(parts), whole)


@given(IDS, IDS, st.data())
def test_after_a_rewind_it_is_as_if_the_rest_had_never_been_read(
    ids: list[int], others: list[int], data: st.DataObject
) -> None:
    length = data.draw(st.integers(0, len(ids)))
    for kind in (ToyModel, SnapshotToyModel):
        model = opened(kind())
        read(model, 0, ids, 0)
        left = model.rewind(1, length)
        assert left == (length if kind is ToyModel or length == len(ids) else length // 8 * 8)
        rest = (ids[left:length] + others)[: 128 - left]
        again = opened(ToyModel())
        read(again, 0, ids[:left], 0)
        assert np.array_equal(read(model, left, rest, len(rest)), read(again, left, rest, len(rest)))


def test_every_token_ever_read_matters() -> None:
    one, other = opened(ToyModel()), opened(ToyModel())
    common = [int(i) for i in np.random.default_rng(3).integers(0, 64, size=60)]
    differing = [
        not np.array_equal(a, b)
        for a, b in zip(read(one, 0, [1, *common], 61)[3:], read(other, 0, [2, *common], 61)[3:], strict=True)
    ]
    assert 0.05 < np.mean(differing) < 0.6, (
        "some rows tell the pasts apart, most repeat what an n-gram can learn"
    )


def test_a_fork_remembers_what_its_source_did() -> None:
    model = opened(opened(ToyModel()), 2)
    read(model, 0, [5, 6, 7, 8], 0)
    assert model.fork(1, 2, 3) == 3
    assert np.array_equal(read(model, 3, [8, 9], 1, sequence_id=2), read(model, 4, [9], 1))


def test_a_gap_or_missing_room_is_noticed() -> None:
    model = opened(ToyModel())
    with pytest.raises(AssertionError, match="begin where the memory ends"):
        read(model, 1, [1], 1)
    with pytest.raises(AssertionError, match="must have room"):
        read(model, 0, [1] * 129, 1)
    read(model, 0, [1] * 20, 0)
    with pytest.raises(AssertionError, match="room was taken"):
        model.resize(1, [0])


def test_the_free_toy_counts_in_a_circle() -> None:
    model = FreeToyModel(vocab_size=4)
    logits = model.forward(RaggedBatch.of([Segment(0, 0, [0, 3, 2], 2), Segment(1, 9, [1], 1)]))
    assert logits.argmax(axis=1).tolist() == [0, 3, 2]
    assert model.info.default_stop_ids == ()


def test_toys_go_by_name() -> None:
    assert toy_model("toy").info.model_id == "toy"
    assert toy_model("toy:free").info.model_id == "toy:free"
    with pytest.raises(ValueError, match="the toy models are toy, toy:rows and toy:free"):
        toy_model("toy:big")
