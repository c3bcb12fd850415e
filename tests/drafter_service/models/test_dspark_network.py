"""The draft network: against an independent reference, and its two forms against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.models.dspark.cached import GROWTH, NewContext, append_rows, draft_hidden, new_cache
from drafter_service.models.dspark.config import FAMILIES
from drafter_service.models.dspark.network import DSparkNetwork
from drafter_service.models.dspark.packed import PackedSequence, packed_hidden
from tests.drafter_service.models import dspark_reference as reference
from tests.drafter_service.models.dspark_networks import (
    draft_config,
    random_network,
    random_sequence,
    relative_error,
    released_form,
)

KINDS: list[dict[str, Any]] = [
    {"markov_head_type": "vanilla"},
    {"markov_head_type": "gated"},
    {"markov_head_type": "rnn"},
    {"markov_head_type": "vanilla", "confidence_head_with_markov": False},
    {"markov_rank": 0, "enable_confidence_head": False},
    {"markov_rank": 0, "enable_confidence_head": False, "sample_from_anchor": False},
]


def cached_block(
    network: DSparkNetwork, sequence: PackedSequence, anchor: int, pieces: list[int]
) -> torch.Tensor:
    """The block [gamma, hidden] at `anchor`, its context having come in pieces of these lengths."""
    cache = new_cache(network)
    rows = network.context_rows(sequence.taps[:anchor])
    start = 0
    for piece in torch.split_with_sizes(rows, pieces):
        append_rows(network, [NewContext(cache, piece, start)])
        start += len(piece)
    assert cache.length == anchor
    return draft_hidden(network, [cache], sequence.token_ids[anchor : anchor + 1], torch.tensor([anchor]))[0]


@pytest.mark.parametrize("fields", KINDS, ids=str)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_block_is_what_the_reference_computes(family: str, fields: dict[str, Any]) -> None:
    network = random_network(draft_config(family, **fields))
    config, tensors = released_form(network)
    sequence = random_sequence(11, [9])
    before = [*sequence.token_ids[9:10].tolist(), 3, 17, 17]
    expected = reference.block(config, tensors, sequence.taps[:9].double().numpy(), before[0])

    hidden = packed_hidden(network, [sequence])[0]
    assert relative_error(hidden, expected) < 1e-5
    assert relative_error(cached_block(network, sequence, 9, [4, 1, 4]), expected) < 1e-5

    logits = network.base_logits(hidden)
    previous = None
    if network.markov_head is not None:
        previous = network.markov_head.previous(torch.tensor([before]))
        features = network.markov_head.block_features(previous, hidden[None])
        bias = network.markov_head.bias(features)[0]
        assert bias.abs().max() > 0.01
        logits = logits + bias
    assert relative_error(logits, reference.block_logits(config, tensors, expected, before)) < 1e-5
    if network.confidence_head is not None:
        found = torch.sigmoid(network.confidence_head(hidden, None if previous is None else previous[0]))
        assert relative_error(found, reference.confidences(config, tensors, expected, before)) < 1e-5


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_slot_by_slot_the_head_says_what_it_says_of_the_whole_block(kind: str) -> None:
    head = random_network(draft_config(markov_head_type=kind)).markov_head
    assert head is not None
    hidden, ids = torch.randn(3, 4, 24), torch.randint(0, 60, (3, 4))
    whole = head.block_features(head.previous(ids), hidden)
    state = head.first_state(hidden)
    for slot in range(4):
        features, state = head.step(head.previous(ids[:, slot]), hidden[:, slot], state)
        assert torch.allclose(features, whole[:, slot], atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_drafting_round_by_round_is_what_training_sees(data: st.DataObject) -> None:
    """Any sequences, any anchors, any pieces: the packed blocks are the blocks of a session that got there."""
    anchor_first = data.draw(st.booleans(), label="sample_from_anchor")
    network = random_network(
        draft_config(sample_from_anchor=anchor_first), seed=data.draw(st.integers(0, 3), label="weights")
    )
    sequences = []
    for number in range(data.draw(st.integers(1, 3), label="sequences")):
        length = data.draw(st.integers(1, 40), label="length")
        anchors = data.draw(st.lists(st.integers(0, length), min_size=1, max_size=5), label="anchors")
        sequences.append(random_sequence(length, anchors, seed=number))
    packed = iter(packed_hidden(network, sequences))
    for sequence in sequences:
        for anchor in sequence.anchors.tolist():
            cuts = sorted(data.draw(st.lists(st.integers(0, anchor), max_size=4), label="cuts"))
            pieces = [
                end - start for start, end in zip([0, *cuts], [*cuts, anchor], strict=True) if end > start
            ]
            found = cached_block(network, sequence, anchor, pieces)
            assert relative_error(found, next(packed)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_does_not_depend_on_pieces_or_company(dtype: torch.dtype) -> None:
    """Bit for bit: a drafter that was killed, joins cold and shares its step drafts what one that never died drafts alone."""
    network = random_network(draft_config()).to(dtype)
    long = random_sequence(GROWTH + 40, [], seed=1, dtype=dtype)
    anchor = GROWTH + 33
    at_once = cached_block(network, long, anchor, [anchor])
    grown = new_cache(network)
    rows = network.context_rows(long.taps[:anchor])
    for start in range(0, anchor, 5):
        append_rows(network, [NewContext(grown, rows[start : start + 5], start)])
    other = new_cache(network)
    append_rows(network, [NewContext(other, rows[:7], 0)])
    together = draft_hidden(network, [other, grown], long.token_ids[[7, anchor]], torch.tensor([7, anchor]))
    assert torch.equal(together[1], at_once)
    assert not torch.equal(together[0], at_once)


def test_positions_without_rows_are_masked() -> None:
    network = random_network(draft_config())
    sequence = random_sequence(12, [])
    rows = network.context_rows(sequence.taps)
    holes = new_cache(network)
    append_rows(network, [NewContext(holes, rows[:3], 0)])
    append_rows(network, [NewContext(holes, rows[7:10], 7)])
    assert holes.length == 10
    whole = new_cache(network)
    append_rows(network, [NewContext(whole, rows[:10], 0)])
    anchor_ids, anchors = sequence.token_ids[10:11], torch.tensor([10])
    masked = draft_hidden(network, [holes], anchor_ids, anchors)
    assert not torch.allclose(masked, draft_hidden(network, [whole], anchor_ids, anchors), atol=1e-3)

    whole._known[3:7] = False
    assert torch.equal(masked, draft_hidden(network, [whole], anchor_ids, anchors))


def test_what_was_cut_off_is_not_seen_again() -> None:
    network = random_network(draft_config())
    sequence = random_sequence(30, [])
    rows = network.context_rows(sequence.taps)
    cache = new_cache(network)
    append_rows(network, [NewContext(cache, rows[:20], 0)])
    cache.truncate(5)
    append_rows(network, [NewContext(cache, rows[20:24], 5)])
    straight = new_cache(network)
    append_rows(network, [NewContext(straight, torch.cat([rows[:5], rows[20:24]]), 0)])
    anchor_ids, anchors = sequence.token_ids[9:10], torch.tensor([9])
    assert torch.equal(
        draft_hidden(network, [cache], anchor_ids, anchors),
        draft_hidden(network, [straight], anchor_ids, anchors),
    )
