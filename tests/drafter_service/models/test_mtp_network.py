"""MTP-1: against an independent reference, and its two forms against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.models.dspark.cached import ContextCache
from drafter_service.models.dspark.config import FAMILIES, UnusableCheckpoint
from drafter_service.models.mtp.network import (
    MtpNetwork,
    MtpSequence,
    NewRows,
    advance,
    mtp_from_json,
    mtp_of,
    mtp_to_json,
    sequences_hidden,
)
from tests.drafter_service.models import dspark_reference as reference
from tests.drafter_service.models.dspark_networks import HIDDEN, VOCAB, relative_error, target_config
from tests.drafter_service.models.dspark_reference import Rows


def random_mtp(family: str = "llama", seed: int = 0) -> MtpNetwork:
    torch.manual_seed(seed)
    network = MtpNetwork(mtp_of(target_config(family)))
    for tensor in network.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 0.3)
    return network.eval().requires_grad_(False)


def random_rows(length: int, seed: int = 0) -> MtpSequence:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(length, HIDDEN, generator=generator)
    return MtpSequence(states, torch.randint(0, VOCAB, (length,), generator=generator))


def reference_hidden(network: MtpNetwork, rows: MtpSequence) -> Rows:
    """[n, hidden], each row as the last slot of a "block" that sees only rows before it: row i is a block of one behind i rows.

    The reference's layer takes keys and values of normed context rows and of normed block rows alike, so the rows before i, put
    through the layer's own input norm, are its context.
    """
    config: dict[str, Any] = mtp_to_json(network.config)
    tensors = {name: tensor.double().numpy() for name, tensor in network.state_dict().items()}
    own = {
        name.removeprefix("layer."): tensor for name, tensor in tensors.items() if name.startswith("layer.")
    }
    embedded = tensors["embed_tokens.weight"][rows.next_ids.numpy()]
    if config["model_type"] in reference.SANDWICH:
        embedded = embedded * np.sqrt(HIDDEN)
    halves = [
        reference.norm(config, tensors["enorm.weight"], embedded),
        reference.norm(config, tensors["hnorm.weight"], rows.states.double().numpy()),
    ]
    joined = np.concatenate(halves, axis=1) @ tensors["eh_proj.weight"].T
    normed = reference.norm(config, own["input_layernorm.weight"], joined)
    outputs = [
        reference.decoder_layer(config, own, normed[:i], joined[i : i + 1])[0] for i in range(len(joined))
    ]
    return reference.norm(config, tensors["norm.weight"], np.array(outputs))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_mtp_is_what_the_reference_computes(family: str) -> None:
    network, rows = random_mtp(family), random_rows(7)
    assert relative_error(sequences_hidden(network, [rows]), reference_hidden(network, rows)) < 1e-5


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_mtp_round_by_round_is_what_training_sees(data: st.DataObject) -> None:
    network = random_mtp()
    sessions = [
        random_rows(data.draw(st.integers(2, 30), label="length"), seed=number)
        for number in range(data.draw(st.integers(1, 3), label="sessions"))
    ]
    expected = torch.split_with_sizes(
        sequences_hidden(network, sessions), [len(rows.next_ids) for rows in sessions]
    )
    caches = [ContextCache(network.config, 1, torch.float32) for _ in sessions]
    checked = 0
    while any(cache.length < len(rows.next_ids) for cache, rows in zip(caches, sessions, strict=True)):
        parts, numbers = [], []
        for number, (cache, rows) in enumerate(zip(caches, sessions, strict=True)):
            left = len(rows.next_ids) - cache.length
            if left:
                part = slice(cache.length, cache.length + data.draw(st.integers(1, left), label="rows"))
                parts.append(NewRows(cache, rows.states[part], rows.next_ids[part]))
                numbers.append(number)
        for number, hidden in zip(numbers, advance(network, parts), strict=True):
            assert relative_error(hidden, expected[number][caches[number].length - 1]) < 1e-5
            checked += 1
    assert checked >= len(sessions)


def test_an_mtp_configuration_comes_back() -> None:
    config = mtp_of(target_config("qwen3"))
    assert mtp_from_json(mtp_to_json(config)) == config
    with pytest.raises(UnusableCheckpoint, match="num_nextn_predict_layers: is 2; only MTP-1"):
        mtp_from_json({**mtp_to_json(config), "num_nextn_predict_layers": 2})
