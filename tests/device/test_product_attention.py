"""Attention from two products is softmax attention, and sequences that share a call do not see each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.device.attention_step import (
    WASTED_KEYS,
    AttentionStep,
    Segment,
    groups_of,
    segments_of,
)
from sparkrelay.device.flat_batch import FlatEntry
from sparkrelay.device.product_attention import KEY_MULTIPLE, VALUE_KEYS, attend
from sparkrelay.device.slab import KVLayout, LayerPlace, SlabKind, SlabPool, SlabState
from sparkrelay.device.step_profile import Stopwatch

CPU = torch.device("cpu")
KV_HEADS, GROUP, DIM = 2, 3, 16


def layout(window: int | None) -> KVLayout:
    return KVLayout((SlabKind(KV_HEADS, DIM, DIM),), (1,), (LayerPlace(0, 0, True, window),))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("first_key", "key_count"), [(0, 64), (64, 192), (128, 2112)])
def test_products_give_softmax_attention(
    first_key: int, key_count: int, with_sinks: bool, softcap: float | None
) -> None:
    query, keys, values = normal(4, 8, DIM), normal(4, key_count, DIM), normal(4, key_count, DIM, seed=1)
    sinks = normal(2, 2, 8, seed=2) if with_sinks else None
    mask = torch.zeros(2, 1, 8, key_count).masked_fill_(normal(2, 1, 8, key_count, seed=3) > 1, -math.inf)
    ours = attend(query, keys, values, mask, first_key, 512, scaling=0.4, softcap=softcap, sinks=sinks)
    logits = (query @ keys.transpose(1, 2) * 0.4).view(2, 2, 8, key_count)
    logits = (logits if softcap is None else torch.tanh(logits / softcap) * softcap) + mask
    if sinks is not None:
        logits = torch.cat([logits, sinks[..., None]], dim=3)
    expected = torch.softmax(logits, dim=3)[..., :key_count].reshape(4, 8, key_count) @ values
    assert torch.allclose(ours, expected, atol=2e-6)


def test_keys_that_are_added_up_at_once_come_in_whole_multiples() -> None:
    assert all(count % KEY_MULTIPLE == 0 for counts in VALUE_KEYS.values() for count in counts)


lengths = st.lists(st.tuples(st.integers(0, 700), st.integers(1, 90)), min_size=1, max_size=7)


def random_entries(pool: SlabPool, parts: list[tuple[int, int]]) -> list[FlatEntry]:
    """Sequences of given lengths whose keys and values so far are random, each with some rows to come."""
    entries = []
    for number, (length, row_count) in enumerate(parts):
        state = SlabState(pool)
        state.reserve(length + row_count)
        state.keys[0].copy_(normal(*state.keys[0].shape, seed=number))
        state.values[0].copy_(normal(*state.values[0].shape, seed=number + 100))
        state.length = length
        entries.append(FlatEntry(state, length, row_count))
    return entries


@given(lengths, st.sampled_from([None, 5, 100]), st.randoms(use_true_random=False))
def test_every_row_sees_its_own_sequence_up_to_itself_whoever_shares_its_call(
    parts: list[tuple[int, int]], window: int | None, random: np.random.Generator
) -> None:
    kv = layout(window)
    entries = random_entries(SlabPool(kv, torch.float32, CPU), parts)
    random.shuffle(entries)  # type: ignore[arg-type]
    count = sum(entry.row_count for entry in entries)
    query = normal(count + 2, KV_HEADS * GROUP, DIM, seed=7)
    key, value = normal(count + 2, KV_HEADS, DIM, seed=8), normal(count + 2, KV_HEADS, DIM, seed=9)
    step = AttentionStep(kv, entries, count + 2, 4, 64, CPU, Stopwatch())
    output = step.attend_rows(0, query, key, value, scaling=0.3)
    first = 0
    for entry in entries:
        keys, values = entry.state.keys[0][0], entry.state.values[0][0]
        rows = slice(first, first + entry.row_count)
        assert torch.equal(keys[:, entry.start : entry.end], key[rows].transpose(0, 1))
        assert torch.equal(values[:, entry.start : entry.end], value[rows].transpose(0, 1))
        for row in {first, first + entry.row_count - 1}:
            end = entry.start + row - first + 1
            seen = slice(max(0, end - window) if window else 0, end)
            for head in (0, KV_HEADS * GROUP - 1):
                weights = torch.softmax(keys[head // GROUP, seen] @ query[row, head] * 0.3, dim=0)
                assert torch.allclose(output[row, head], weights @ values[head // GROUP, seen], atol=1e-5)
        first += entry.row_count


@given(lengths, st.sampled_from([None, 100]))
def test_calls_take_every_row_once_and_waste_a_bounded_number_of_keys(
    parts: list[tuple[int, int]], window: int | None
) -> None:
    entries = random_entries(SlabPool(layout(window), torch.float32, CPU), parts)
    first_rows = np.cumsum([0, *(entry.row_count for entry in entries)]).tolist()
    calls = list(groups_of(segments_of(entries, first_rows, GROUP, 4, window)))
    rows = [segment.first_row + row for call in calls for segment in call for row in range(segment.row_count)]
    assert sorted(rows) == list(range(first_rows[-1]))
    for call in calls:
        assert len({(segment.arena.capacity, segment.rows) for segment in call}) == 1
        assert [segment.slot for segment in call] == list(range(call[0].slot, call[0].slot + len(call)))
        assert wasted(call) <= WASTED_KEYS


def wasted(call: list[Segment]) -> int:
    stop, start = max(each.keys.stop for each in call), min(each.keys.start for each in call)
    return len(call) * (stop - start) - sum(len(each.keys) for each in call)


def test_sessions_that_decode_beside_each_other_share_one_call() -> None:
    entries = random_entries(SlabPool(layout(None), torch.float32, CPU), [(40 + n, 1) for n in range(16)])
    [call] = groups_of(segments_of(entries, range(17), GROUP, 4, None))
    assert len(call) == 16 and wasted(call) == 0 and call[0].rows == 4
