"""Prompt lookup against a twin that searches the whole sequence."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafter_service.kept_sessions import KeepLimits
from drafter_service.models import DraftRequest, TurnRules
from drafter_service.models.hit_rates import FADE_AT, HitRates, Label
from drafter_service.models.ngram import NgramIndex, NgramModel, common_prefix
from drafter_service.settings import DrafterSettings
from sparkrelay.sampling import Sampling
from sparkrelay.settings import read

RULES = TurnRules("t", Sampling(), 0, frozenset(), 1)
ids_lists = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def searched(ids: list[int], n_min: int, n_max: int) -> tuple[int, int]:
    """The longest suffix that occurred before, and the position behind its most recent occurrence; by trying everything."""
    for n in range(min(n_max, len(ids) - 1), n_min - 1, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[-n:]:
                return n, start + n
    return 0, 0


@given(
    ids=ids_lists,
    n_min=st.integers(1, 2),
    n_more=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
def test_the_index_finds_what_a_search_finds_after_any_growth_and_cuts(
    ids: list[int], n_min: int, n_more: int, cuts: list[int]
) -> None:
    index = NgramIndex(n_min, n_min + n_more)
    for cut in cuts:
        index.extend(ids)
        assert index.longest_match() == searched(index.ids, n_min, n_min + n_more)
        index.truncate(min(cut, len(index.ids)))
    index.truncate(0)
    for end in range(len(ids)):
        index.extend(ids[end : end + 1])
        assert index.longest_match() == searched(ids[: end + 1], n_min, n_min + n_more)


@given(ids=ids_lists, cut=st.integers(0, 40))
def test_growing_again_after_a_cut_is_as_growing_at_once(ids: list[int], cut: int) -> None:
    once, again = NgramIndex(1, 4), NgramIndex(1, 4)
    once.extend(ids)
    again.extend([*ids, 9, 9, 1])
    again.truncate(min(cut, len(ids)))
    again.catch_up(ids)
    assert (again.ids, again._latest, again._before) == (once.ids, once._latest, once._before)


def test_the_indexes_of_all_sessions_that_are_kept_by_default_stay_below_256_mib() -> None:
    ids, index = list(range(10_000)), NgramIndex(1, 4)  # no n-gram occurs twice: the largest index there is
    tracemalloc.start()
    index.extend(ids)
    bytes_per_token = tracemalloc.get_traced_memory()[0] / len(ids)
    tracemalloc.stop()
    kept = read(DrafterSettings, [], {}).kept_tokens
    assert kept == KeepLimits().token_count and kept * bytes_per_token < 256 * 2**20


def test_the_copy_goes_on_with_itself_where_the_text_ends_in_a_loop() -> None:
    index = NgramIndex(1, 4)
    index.extend([5, 1, 2, 3, 1, 2, 3])
    _, start = index.longest_match()
    assert index.continuation(start, 7) == [1, 2, 3, 1, 2, 3, 1]


def request(ids: list[int], cut_count: int = 0, limit: int = 4) -> DraftRequest:
    return DraftRequest(1, ids, cut_count, limit, RULES)


def test_a_model_drafts_from_the_most_recent_longest_match() -> None:
    (block,) = NgramModel(7, 1, 4).draft([request([1, 2, 3, 4, 9, 3, 4, 8, 1, 2, 3, 4])])
    assert block.token_ids == [9, 3, 4, 8]
    assert len(block.confidences) == 4


def test_without_a_match_it_says_one_token_with_little_confidence() -> None:
    (block,) = NgramModel(7, 1, 4).draft([request([1, 2, 3])])
    assert block.token_ids == [3]
    assert block.confidences[0] == pytest.approx(0.1)


def test_a_cut_session_is_looked_up_anew() -> None:
    model = NgramModel(7, 1, 4)
    model.draft([request([1, 2, 7, 1, 2])])
    (block,) = model.draft([request([1, 2, 8, 1, 2], cut_count=1)])
    assert block.token_ids[0] == 8


def test_confidence_rises_with_matches_that_hold_and_falls_with_those_that_do_not() -> None:
    model = NgramModel(7, 1, 1)
    ids = [1, 2, 1]
    (first,) = model.draft([request(ids)])
    (after_hits,) = model.draft([request([*ids, *first.token_ids, 2, 1])])
    assert after_hits.confidences[0] > first.confidences[0]
    for wrong in range(3, 9):
        ids = [*ids, wrong, 1]
        (after_misses,) = model.draft([request(ids)])
    assert after_misses.confidences[0] < after_hits.confidences[0]


def test_a_forgotten_session_begins_anew() -> None:
    model = NgramModel(7, 1, 4)
    model.draft([request([1, 2, 7, 1, 2])])
    model.forget(1)
    model.forget(1)
    (block,) = model.draft([request([4])])
    assert block.token_ids == [4]


def test_only_tokens_that_were_put_to_the_test_are_counted() -> None:
    rates = HitRates(1)
    before = rates.rate(1)
    rates.learn(Label(1, 3, [7, 8]), [0, 0, 0])
    assert rates.rate(1) == before
    rates.learn(Label(1, 3, [7, 8]), [0, 0, 0, 7])
    assert rates.rate(1) > before


@given(st.lists(st.booleans(), max_size=400))
def test_rates_stay_probabilities_and_follow_what_is_new(outcomes: list[bool]) -> None:
    rates = HitRates(4)
    for hit in outcomes:
        rates.learn(Label(4, 0, [1]), [1 if hit else 2])
        assert 0.0 < rates.rate(4) < 1.0
    for _ in range(int(FADE_AT) * 6):
        rates.learn(Label(4, 0, [1]), [1])
    assert rates.rate(4) > 0.95


@given(a=ids_lists, b=ids_lists)
def test_the_common_prefix_is_the_longest(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n in (len(a), len(b)) or a[n] != b[n]
