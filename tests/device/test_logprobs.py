"""Log-probabilities: log_softmax of the raw logits, best first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.device.logprobs import logprobs_row


@given(seed=st.integers(0, 2**32), size=st.integers(1, 2000), top_n=st.integers(0, 20))
def test_they_are_torchs_log_softmax(seed: int, size: int, top_n: int) -> None:
    row = np.random.default_rng(seed).normal(scale=4.0, size=size).astype(np.float32)
    expected = torch.log_softmax(torch.from_numpy(row), dim=-1)
    chosen_id = seed % size
    found = logprobs_row(row, chosen_id, top_n)
    assert found.chosen == pytest.approx(expected[chosen_id].item(), abs=2e-6)
    best = expected.topk(min(top_n, size))
    assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=2e-6)
    assert [row[i] for i, _ in found.top] == [row[i] for i in best.indices.tolist()]


def test_the_lowest_ids_come_first_among_equals() -> None:
    row = np.array([0.0, 1.0, 1.0, 0.0, 1.0], dtype=np.float32)
    assert [token_id for token_id, _ in logprobs_row(row, 0, 4).top] == [1, 2, 4, 0]


def test_a_masked_token_has_no_probability() -> None:
    row = np.array([0.0, -np.inf], dtype=np.float32)
    assert logprobs_row(row, 1, 2).top == ((0, 0.0), (1, -np.inf))
