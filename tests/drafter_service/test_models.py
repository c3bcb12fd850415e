"""The kinds of draft models: how they are found, and those that exist for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from drafter_service.models import (
    KINDS,
    NOTHING,
    CannotLoad,
    DraftedBlock,
    DraftModel,
    DraftRequest,
    ModelOptions,
    TurnRules,
    load_model,
)
from drafter_service.models.adversarial import TRUTHFUL_BLOCKS, WireLies
from drafter_service.session import confidence_bytes
from sparkrelay.frames import Block, Blocks
from sparkrelay.sampling import Sampling
from sparkrelay.wire import drafter_frame_pb

RULES = TurnRules("t", Sampling(), 0, frozenset(), 1)
WEIGHTLESS = sorted(set(KINDS) - {"causal_lm", "dspark", "dflash", "mtp"})


def request(ids: Sequence[int], limit: int = 4, key: int = 1) -> DraftRequest:
    return DraftRequest(key, ids, 0, limit, RULES)


def of_kind(kind: str, seed: int = 0) -> DraftModel:
    return load_model(kind, ModelOptions(block_size=7, seed=seed)).model


@pytest.mark.parametrize("kind", WEIGHTLESS)
def test_every_kind_keeps_to_its_limits_and_says_its_name(kind: str) -> None:
    model = of_kind(kind)
    assert model.fingerprint.proposal_kind == kind
    assert model.fingerprint.block_size == 7
    ids = [1, 2, 3, 1, 2]
    for round_index in range(50):
        limit = 1 + round_index % 7
        (block,) = model.draft([request(ids, limit)])
        assert block is not None
        assert len(block.token_ids) == len(block.confidences) <= limit
        assert all(0 <= token <= max(ids) for token in block.token_ids)
        assert len(confidence_bytes(block.confidences)) == len(block.token_ids)
        ids = [*ids, ids[-3]]
    model.forget(1)
    model.forget(1)


def test_an_unknown_kind_is_refused_with_those_that_exist() -> None:
    with pytest.raises(CannotLoad, match=r"no 'psychic'.*ngram"):
        load_model("psychic", ModelOptions(block_size=7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ModelOptions(block_size=7), "needs one"),
        (ModelOptions(block_size=7, model="x", dtype="int3"), "dtype: is 'int3'"),
        (ModelOptions(block_size=7, model="no-such-model"), "model: .*no-such-model"),
    ],
)
def test_a_causal_lm_that_cannot_be_had_says_which_setting_to_change(
    options: ModelOptions, message: str
) -> None:
    with pytest.raises(CannotLoad, match=message):
        load_model("causal_lm", options)


def test_a_cycle_is_continued_for_ever_once_it_was_seen_once() -> None:
    model = of_kind("cycle")
    ids = [7, 3, 4, 5]
    assert model.draft([request(ids)]) == [NOTHING]
    ids += [3, 4]
    (block,) = model.draft([request(ids, 7)])
    assert block is not None
    assert list(block.token_ids) == [5, 3, 4, 5, 3, 4, 5]
    assert set(block.confidences) == {1.0}


def test_a_cycle_that_breaks_is_looked_up_again() -> None:
    model = of_kind("cycle")
    model.draft([request([1, 2, 1])])
    (block,) = model.draft([request([1, 2, 1, 5, 6, 5], 2)])
    assert block == DraftedBlock([6, 5], (1.0, 1.0))


@pytest.mark.parametrize("kind", ["random", "adversarial"])
def test_a_seed_decides_everything_a_test_kind_says(kind: str) -> None:
    ids = [1, 2, 3, 4, 1, 2, 3, 4, 1]

    def said(seed: int) -> list[tuple[int, ...]]:
        model = of_kind(kind, seed)
        return [tuple(block.token_ids) for _ in range(20) for block in model.draft([request(ids)]) if block]

    assert said(3) == said(3)
    assert said(3) != said(4)


@pytest.mark.parametrize("kind", ["random", "adversarial"])
def test_a_test_kind_is_right_now_and_then_and_wrong_now_and_then(kind: str) -> None:
    model, ids = of_kind(kind), [1, 2, 3, 4] * 4
    first = [block.token_ids[0] for _ in range(60) for block in model.draft([request(ids)]) if block]
    assert 10 < first.count(1) < 50


def blocks(count: int, base_len: int) -> list[Block]:
    return [Block(handle, 3, base_len, (1, 2, 3), b"\x01\x02\x03") for handle in range(1, count + 1)]


def test_lies_on_the_wire_begin_only_after_a_truthful_start() -> None:
    lies = WireLies(1)
    for base_len in range(TRUTHFUL_BLOCKS):
        assert lies(blocks(3, base_len)) == blocks(3, base_len)


def test_the_lies_on_the_wire_are_of_every_sort_and_can_all_be_sent() -> None:
    lies, told = WireLies(5), []
    for base_len in range(10, 2000):
        frame = Blocks(tuple(lies(blocks(2, base_len))))
        drafter_frame_pb(frame).SerializeToString()
        told += [(block, base_len) for block in frame.entries]
    assert any(block.handle not in (1, 2) for block, _ in told)
    assert any(block.base_len != base_len for block, base_len in told)
    assert any(max(block.token_ids) == 2**31 - 1 for block, _ in told)
    assert any(min(block.token_ids) < 0 for block, _ in told)
    assert any(len(block.token_ids) > 100 for block, _ in told)
    assert any(block.assumed_count for block, _ in told)
    assert len(told) > 2 * 1990, "some blocks were told twice"


@pytest.mark.parametrize(
    ("confidence", "byte"),
    [
        (0.0, 0),
        (1.0, 255),
        (0.5, 128),
        (-3.0, 0),
        (7.0, 255),
        (float("nan"), 0),
        (float("inf"), 255),
        (float("-inf"), 0),
    ],
)
def test_confidences_are_clamped_and_nan_is_nothing(confidence: float, byte: int) -> None:
    assert confidence_bytes([confidence]) == bytes([byte])
