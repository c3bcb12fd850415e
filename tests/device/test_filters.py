"""The filters against transformers' own logits processors, and what they promise beyond them: ties, independence, order."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparkrelay import noise
from sparkrelay.device import filters
from sparkrelay.device.filters import Support, adjusted_row, filter_row, nucleus_edge
from sparkrelay.device.token_counts import TokenCounts
from sparkrelay.sampling import Sampling

FloatRow = npt.NDArray[np.float32]


def as_row(values: list[float]) -> FloatRow:
    return np.array(values, dtype=np.float32)


def random_row(seed: int, size: int, step: float, scale: float = 3.0) -> FloatRow:
    """Normal logits on a grid. A coarse grid gives ties, a fine one none to speak of; neither gives near ties, at which two
    correct roundings may disagree."""
    values = np.random.default_rng(seed).normal(scale=scale, size=size)
    return (np.round(values / step) * step).astype(np.float32)


ROWS = st.builds(
    random_row,
    seed=st.integers(0, 2**32),
    size=st.integers(2, 3000),
    step=st.sampled_from([0.5, 0.125, 2**-10]),
    scale=st.sampled_from([0.3, 1.0, 3.0]),
)


def kept_ids(support: Support) -> list[int]:
    if support.ids is None:
        return [int(i) for i in np.flatnonzero(np.isfinite(support.logits))]
    return [int(i) for i in support.ids]


def ids_left_by(processors: list[object], row: FloatRow, history: list[int]) -> npt.NDArray[np.int64]:
    """What transformers leaves of a row, computed in float64, with every token tied with the last one kept."""
    scores = torch.from_numpy(row.astype(np.float64))[None]
    for processor in processors:
        scores = with_ties(processor(torch.tensor([history]), scores.clone()), scores)  # type: ignore[operator]
    return np.flatnonzero(np.isfinite(scores[0].numpy()))


def with_ties(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """top-p of transformers keeps an arbitrary part of a group of equal tokens; this puts the others back."""
    left = torch.isfinite(after)
    if left.all():
        return after
    return torch.where(before >= before[left].min(), before, -torch.inf)


def clear_of_the_edges(row: FloatRow, sampling: Sampling) -> bool:
    """No cumulated probability is within rounding of top_p, and no token within rounding of min_p."""
    scaled = np.sort(row.astype(np.float64))[::-1] / sampling.temperature
    if sampling.top_k:
        scaled = scaled[scaled >= scaled[min(sampling.top_k, scaled.size) - 1]]
    weights = np.exp(scaled - scaled[0])
    clear = True
    if sampling.top_p < 1.0:
        clear = bool(np.abs(weights.cumsum() / weights.sum() - sampling.top_p).min() > 1e-6)
    if sampling.min_p:
        clear &= bool(np.abs(scaled - scaled[0] - math.log(sampling.min_p)).min() > 1e-5)
    return clear


# ------------------------------------------------------------------------------------------------ as transformers


@settings(max_examples=150, deadline=None)
@given(row=ROWS, top_k=st.integers(1, 200), temperature=st.floats(0.2, 2.0))
def test_top_k_keeps_what_transformers_keeps(row: FloatRow, top_k: int, temperature: float) -> None:
    support = filter_row(row, Sampling(temperature=temperature, top_k=top_k), None, (), 0)
    assert kept_ids(support) == ids_left_by([TopKLogitsWarper(top_k)], row, []).tolist()
    assert (support.logits == row[support.ids]).all()


@pytest.mark.parametrize("sorted_count", [1, 16, 1024])
@settings(max_examples=80, deadline=None)
@given(row=ROWS, top_p=st.floats(0.02, 0.999), temperature=st.floats(0.2, 2.0))
def test_top_p_keeps_what_transformers_keeps_and_all_tied_with_the_last(
    sorted_count: int, row: FloatRow, top_p: float, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p)
    assume(clear_of_the_edges(row, sampling))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "NUCLEUS_SORTED", sorted_count)
        support = filter_row(row, sampling, None, (), 0)
    processors = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
    assert kept_ids(support) == ids_left_by(processors, row, []).tolist()


@settings(max_examples=150, deadline=None)
@given(row=ROWS, min_p=st.floats(1e-4, 0.99), temperature=st.floats(0.2, 2.0))
def test_min_p_keeps_what_transformers_keeps(row: FloatRow, min_p: float, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, min_p=min_p)
    assume(clear_of_the_edges(row, sampling))
    processors = [TemperatureLogitsWarper(temperature), MinPLogitsWarper(min_p)]
    assert kept_ids(filter_row(row, sampling, None, (), 0)) == ids_left_by(processors, row, []).tolist()


@settings(max_examples=150, deadline=None)
@given(row=ROWS, penalty=st.floats(0.5, 3.0), picks=st.lists(st.integers(0, 2**16), min_size=1, max_size=30))
def test_the_repetition_penalty_is_transformers_own(row: FloatRow, penalty: float, picks: list[int]) -> None:
    history = [pick % row.size for pick in picks]
    sampling = Sampling(repetition_penalty=penalty)
    penalised = adjusted_row(row, sampling, TokenCounts(history, len(history)), (), 0)
    processor = RepetitionPenaltyLogitsProcessor(float(np.float32(penalty)))
    theirs = processor(torch.tensor([history]), torch.from_numpy(row.copy())[None])[0].numpy()
    np.testing.assert_allclose(penalised, theirs, rtol=2e-7)


@settings(max_examples=150, deadline=None)
@given(
    row=ROWS, temperature=st.floats(0.3, 2.0), top_k=st.integers(1, 300), top_p=st.floats(0.05, 0.99),
    min_p=st.floats(1e-3, 0.5), picks=st.lists(st.integers(0, 2**16), min_size=1, max_size=30),
)  # fmt: skip
def test_all_filters_together_leave_what_transformers_leaves(
    row: FloatRow, temperature: float, top_k: int, top_p: float, min_p: float, picks: list[int]
) -> None:
    history = [pick % row.size for pick in picks]
    # A penalty of 2 keeps logits on their grid, so that no near ties appear.
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty=2.0)
    counts = TokenCounts(history, len(history))
    assume(clear_of_the_edges(adjusted_row(row, sampling, counts, (), 0), sampling))
    processors = [
        RepetitionPenaltyLogitsProcessor(2.0), TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p), MinPLogitsWarper(min_p),
    ]  # fmt: skip
    assert (
        kept_ids(filter_row(row, sampling, counts, (), 0)) == ids_left_by(processors, row, history).tolist()
    )


# ------------------------------------------------------------------------------------------------ ties and edges


def test_every_token_tied_with_the_last_one_kept_is_kept() -> None:
    row = as_row([1.0, 2.0, 1.0, 0.0, 1.0])
    assert kept_ids(filter_row(row, Sampling(temperature=1.0, top_k=2), None, (), 0)) == [0, 1, 2, 4]
    assert kept_ids(filter_row(row, Sampling(temperature=1.0, top_p=0.5), None, (), 0)) == [0, 1, 2, 4]
    assert kept_ids(filter_row(row, Sampling(temperature=1.0, min_p=math.exp(-1.0)), None, (), 0)) == [
        0,
        1,
        2,
        4,
    ]


def test_top_p_counts_only_what_top_k_left() -> None:
    row = as_row([2.0, 1.0, *[0.0] * 50])
    # Of all 52 tokens the best has 0.12; of the best two it has 0.73.
    assert kept_ids(filter_row(row, Sampling(temperature=1.0, top_p=0.7), None, (), 0)) != [0]
    assert kept_ids(filter_row(row, Sampling(temperature=1.0, top_k=2, top_p=0.7), None, (), 0)) == [0]


def test_a_flat_row_keeps_everything_whatever_top_p() -> None:
    row = np.zeros(20_000, dtype=np.float32)
    assert filter_row(row, Sampling(temperature=1.0, top_p=0.3), None, (), 0).logits.size == 20_000


@pytest.mark.parametrize("top_p", [0.01, 0.1, 0.5, 0.8, 0.99])
def test_a_nucleus_of_any_size_is_found_without_sorting_the_vocabulary(top_p: float) -> None:
    row = random_row(seed=3, size=50_000, step=2**-12, scale=0.5)
    order = np.sort(row.astype(np.float64))[::-1]
    weights = np.exp(order - order[0])
    last = np.searchsorted(weights.cumsum(), top_p * weights.sum())
    assert nucleus_edge(row - row.max(), top_p) == np.float32(order[last]) - row.max()


def test_masked_tokens_are_never_kept() -> None:
    row = as_row([-np.inf, 0.0, -np.inf, -1.0])
    for sampling in (
        Sampling(1.0, top_k=4),
        Sampling(1.0, top_k=3),
        Sampling(1.0, top_p=0.999999),
        Sampling(1.0, min_p=1e-9),
    ):
        assert kept_ids(filter_row(row, sampling, None, (), 0)) == [1, 3]


@pytest.mark.parametrize("bad", [[-np.inf, -np.inf, -np.inf], [0.0, np.nan, 1.0], [np.inf, 0.0, 0.0]])
def test_a_row_without_a_candidate_is_refused(bad: list[float]) -> None:
    with pytest.raises(noise.NoCandidate):
        filter_row(as_row(bad), Sampling(temperature=1.0, top_k=2), None, (), 0)


@settings(max_examples=60, deadline=None)
@given(row=ROWS, offset=st.integers(0, 16), top_p=st.floats(0.05, 0.99))
def test_a_row_is_filtered_alike_wherever_it_lies_in_memory(row: FloatRow, offset: int, top_p: float) -> None:
    shelf = np.zeros(row.size + offset, dtype=np.float32)
    shelf[offset:] = row
    sampling = Sampling(temperature=0.9, top_p=top_p)
    here, there = filter_row(row, sampling, None, (), 0), filter_row(shelf[offset:], sampling, None, (), 0)
    assert kept_ids(here) == kept_ids(there)


# ------------------------------------------------------------------------------------------------ single logits


def test_neutral_sampling_hands_the_row_on_untouched() -> None:
    row = as_row([0.0, 1.0])
    for sampling in (Sampling(), Sampling(temperature=0.7), Sampling(temperature=0.7, top_p=1.0, top_k=0)):
        support = filter_row(row, sampling, None, (1,), 0)
        assert support.ids is None and support.logits is row


def test_greedy_skips_the_filters_that_keep_the_best_token() -> None:
    row = as_row([0.0, 1.0, 0.5])
    assert filter_row(row, Sampling(top_k=1, top_p=0.1, min_p=0.9), None, (), 0).logits is row


def test_the_models_row_is_never_written_to() -> None:
    row = random_row(seed=1, size=50, step=2**-10)
    row.flags.writeable = False
    sampling = Sampling(
        0.8, 10, 0.9, 0.1, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2,
        logit_bias=((3, 1.0),), min_tokens=4,
    )  # fmt: skip
    mask = np.ones(50, dtype=bool)
    assert filter_row(row, sampling, TokenCounts([1, 2, 3], 1), (7,), 0, mask).ids is not None


def test_a_bias_is_added_even_twice_to_one_token() -> None:
    row = adjusted_row(as_row([0.0, 1.0]), Sampling(logit_bias=((1, 2.0), (1, 0.5), (0, -1.0))), None, (), 0)
    assert row.tolist() == [-1.0, 3.5]


@pytest.mark.parametrize(("produced_count", "kept"), [(0, [0, 2]), (2, [0, 2]), (3, [0, 1, 2, 3])])
def test_stop_ids_are_masked_until_the_turn_has_its_min_tokens(produced_count: int, kept: list[int]) -> None:
    row = as_row([0.0, 1.0, 0.0, 1.0])
    assert kept_ids(filter_row(row, Sampling(min_tokens=3), None, {1, 3}, produced_count)) == kept


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 9), max_size=20), output=st.lists(st.integers(0, 9), max_size=20),
    presence=st.floats(-2, 2), frequency=st.floats(-2, 2),
)  # fmt: skip
def test_presence_and_frequency_count_this_turns_output_alone(
    prompt: list[int], output: list[int], presence: float, frequency: float
) -> None:
    row = random_row(seed=5, size=10, step=2**-10)
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency)
    penalised = adjusted_row(row, sampling, TokenCounts(prompt + output, len(prompt)), (), 0)
    occurrences = Counter(output)
    expected = [
        logit - (presence if occurrences[i] else 0.0) - frequency * occurrences[i]
        for i, logit in enumerate(row)
    ]
    np.testing.assert_allclose(penalised, expected, rtol=1e-5, atol=1e-5)


def test_penalties_without_counts_are_a_bug() -> None:
    with pytest.raises(ValueError, match="counts"):
        filter_row(as_row([0.0]), Sampling(presence_penalty=1.0), None, (), 0)


def test_the_grammar_mask_is_applied_after_bias_and_before_top_k() -> None:
    row = as_row([5.0, 4.0, 3.0, 2.0])
    mask = np.array([False, True, True, True])
    sampling = Sampling(temperature=1.0, top_k=2, logit_bias=((0, 50.0), (3, 3.0)))
    assert kept_ids(filter_row(row, sampling, None, (), 0, mask)) == [1, 3]


@settings(max_examples=150, deadline=None)
@given(
    row=ROWS,
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
        top_k=st.sampled_from([0, 1, 7]),
        top_p=st.sampled_from([1.0, 0.7, 0.01]),
        min_p=st.sampled_from([0.0, 0.1, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.5, 0.5]),
        presence_penalty=st.sampled_from([0.0, 100.0]),
        min_tokens=st.sampled_from([0, 9]),
    ),
    allowed_share=st.sampled_from([0.0, 0.02, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_no_filter_lets_through_what_the_grammar_forbids_or_makes_no_number_of_it(
    row: FloatRow, sampling: Sampling, allowed_share: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    mask = generator.random(row.size) < allowed_share
    mask[generator.integers(0, row.size)] = True  # a grammar allows at least one, or says so
    stop_ids = {int(generator.integers(0, row.size))}
    history = [int(i) for i in generator.integers(0, row.size, size=6)]
    support = filter_row(row, sampling, TokenCounts(history, 2), stop_ids, 3, mask)
    assert not np.isnan(support.logits).any()
    kept = kept_ids(support)
    assert kept and all(mask[token_id] for token_id in kept)
    if sampling.min_tokens and not filters.allows_only(mask, stop_ids):
        assert not stop_ids & set(kept)
