"""The choice of a turn's tokens: the right position, the right prefix, and nothing left behind by a roll-back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkrelay import noise
from sparkrelay.device.choice import Chooser, choose_token, probability_of
from sparkrelay.device.filters import filter_row
from sparkrelay.device.token_counts import TokenCounts
from sparkrelay.sampling import Sampling

VOCAB_SIZE = 40

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 5, 20]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.sampled_from([(), ((3, 2.0), (9, -1.0))]),
    min_tokens=st.sampled_from([0, 4]),
    seed=st.integers(0, 2**64 - 1),
)


def some_rows(seed: int, count: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(scale=2.0, size=(count, VOCAB_SIZE)).astype(np.float32)


def test_a_sampled_token_is_the_noisy_argmax_at_its_own_position() -> None:
    row = some_rows(seed=1, count=1)[0]
    sampling = Sampling(temperature=0.8, seed=99)
    for prompt_length in range(1, 30):
        chooser = Chooser(sampling, (), [0] * prompt_length, prompt_length)
        inverse_t = noise.inverse_temperature(0.8)
        assert chooser.choose(row) == noise.choose_by_whole_vocabulary(row, inverse_t, 99, prompt_length)


def test_a_greedy_token_needs_no_noise() -> None:
    row = some_rows(seed=2, count=1)[0]
    assert {Chooser(Sampling(seed=seed), (), [1], 1).choose(row) for seed in range(20)} == {int(row.argmax())}


@settings(max_examples=100, deadline=None)
@given(
    sampling=SAMPLINGS,
    rows_seed=st.integers(0, 2**32),
    prompt=st.lists(st.integers(0, 39), min_size=1, max_size=9),
)
def test_the_chooser_gives_what_choosing_from_the_whole_prefix_gives(
    sampling: Sampling, rows_seed: int, prompt: list[int]
) -> None:
    rows, stop_ids, tokens = some_rows(rows_seed, count=8), {5, 6}, list(prompt)
    chooser = Chooser(sampling, stop_ids, prompt, len(prompt))
    for produced_count, row in enumerate(rows):
        counts = TokenCounts(tokens, len(prompt))
        expected = choose_token(row, sampling, counts, stop_ids, len(tokens), produced_count)
        assert chooser.choose(row) == expected
        assert chooser.choose(row) == expected, "choosing changes nothing"
        assert not (expected in stop_ids and produced_count < sampling.min_tokens)
        chooser.append(expected)
        tokens.append(expected)
        assert chooser.length == len(tokens)


@settings(max_examples=60, deadline=None)
@given(
    sampling=SAMPLINGS, rows_seed=st.integers(0, 2**32), hypothetical=st.lists(st.integers(0, 39), max_size=9)
)
def test_tokens_taken_back_leave_no_trace(
    sampling: Sampling, rows_seed: int, hypothetical: list[int]
) -> None:
    rows, prompt = some_rows(rows_seed, count=4), [1, 2, 3]
    untouched, used = Chooser(sampling, (5,), prompt, 3), Chooser(sampling, (5,), prompt, 3)
    for row in rows:
        used.extend(hypothetical)
        used.truncate(untouched.length)
        token_id = untouched.choose(row)
        assert used.choose(row) == token_id
        untouched.append(token_id)
        used.append(token_id)


def test_a_turn_replayed_elsewhere_goes_on_with_the_same_tokens() -> None:
    """The emitted tokens become part of the list, and output_start says where they began."""
    sampling = Sampling(temperature=1.0, presence_penalty=0.8, repetition_penalty=1.2, min_tokens=6, seed=5)
    rows = some_rows(seed=4, count=12)
    first = Chooser(sampling, (7,), [1, 2, 3], 3)
    tokens = [1, 2, 3]
    for row in rows:
        tokens.append(first.choose(row))
        first.append(tokens[-1])
    replayed = Chooser(sampling, (7,), tokens[:8], 3)
    for row, token_id in zip(rows[5:], tokens[8:], strict=True):
        assert replayed.choose(row) == token_id
        replayed.append(token_id)


def test_a_grammar_that_allows_nothing_leaves_no_candidate() -> None:
    nothing = np.zeros(VOCAB_SIZE, dtype=bool)
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.9)):
        with pytest.raises(noise.NoCandidate):
            choose_token(some_rows(seed=3, count=1)[0], sampling, None, (), 1, 0, nothing)


class OddThenEven:
    """A mask that follows the output: odd ids where its length is even, even ones where it is odd."""

    def __init__(self, length: int = 0) -> None:
        self.length = length

    def allowed(self) -> npt.NDArray[np.bool_]:
        return np.arange(VOCAB_SIZE) % 2 != self.length % 2

    def append(self, token_id: int) -> None:
        self.length += 1

    def truncate(self, count: int) -> None:
        self.length = count


@settings(max_examples=60, deadline=None)
@given(sampling=SAMPLINGS, rows_seed=st.integers(0, 2**32), taken_back=st.integers(1, 5))
def test_a_mask_follows_the_chooser_forward_and_back(
    sampling: Sampling, rows_seed: int, taken_back: int
) -> None:
    rows = some_rows(rows_seed, count=8)
    prompt = [1, 2, 3]
    chooser = Chooser(sampling, (), prompt, 3, OddThenEven())
    for token_id in (7, 9, 11, 13, 15):
        chooser.append(token_id)
    chooser.truncate(8 - taken_back)
    tokens = [*prompt, 7, 9, 11, 13, 15][: 8 - taken_back]
    straight = Chooser(sampling, (), tokens, 3, OddThenEven(len(tokens) - 3))
    for row in rows:
        token_id = chooser.choose(row)
        assert token_id == straight.choose(row)
        assert token_id % 2 != (len(tokens) - 3) % 2
        for each in (chooser, straight):
            each.append(token_id)
        tokens.append(token_id)


@pytest.mark.parametrize("length", [2, 5])
def test_the_prompt_cannot_be_taken_back_nor_the_future(length: int) -> None:
    chooser = Chooser(Sampling(), (), [1, 2, 3], 3)
    chooser.append(4)
    with pytest.raises(ValueError, match="length"):
        chooser.truncate(length)


@settings(max_examples=60, deadline=None)
@given(sampling=SAMPLINGS, rows_seed=st.integers(0, 2**32))
def test_the_probability_beside_a_token_is_its_share_of_what_the_filters_left(
    sampling: Sampling, rows_seed: int
) -> None:
    row, prompt = some_rows(rows_seed, count=1)[0], [1, 2, 3]
    chooser = Chooser(sampling, (5,), prompt, 3)
    token_id, probability = chooser.choose_with_probability(row)
    assert token_id == chooser.choose(row)
    support = filter_row(row, sampling, TokenCounts(prompt, 3), (5,), 0)
    ids = range(VOCAB_SIZE) if support.ids is None else support.ids.tolist()
    shares = [probability_of(i, support, sampling.temperature) for i in ids]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert probability == shares[list(ids).index(token_id)] > 0.0
