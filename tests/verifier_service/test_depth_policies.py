"""Depths of a step, all sessions together."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier_service.depth_policies import DepthQuestion, level, parse_depth_policy, survivals_of


def question(max_depths: list[int], row_limit: int = 100) -> DepthQuestion:
    confidences = [(0.5,) * depth for depth in max_depths]
    return DepthQuestion(confidences, max_depths, len(max_depths), len(max_depths), row_limit)


@pytest.mark.parametrize(
    ("text", "depths", "budget"),
    [("off", [0, 0], 0), ("fixed:0", [0, 0], 0), ("fixed:3", [3, 2], 3), ("auto", [4, 2], 4)],
)
def test_a_fixed_policy_goes_as_deep_as_the_block_reaches(text: str, depths: list[int], budget: int) -> None:
    policy = parse_depth_policy(text)
    assert policy.name == text
    assert list(policy.depths(question([7, 2]))) == depths
    assert policy.draft_budget(1) == policy.draft_budget(256) == budget


@pytest.mark.parametrize(
    "text", ["", "fixed", "fixed:", "fixed:16", "fixed:-1", "fixed:2x", "fixed:³", "adaptve", "OFF"]
)
def test_a_policy_that_does_not_exist_is_refused_with_those_that_do(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"depth_policy: is .* choose off, auto, or fixed:K with K from 0 to 15"
    ):
        parse_depth_policy(text)


@given(st.lists(st.floats(), max_size=15))
def test_survivals_stay_within_bounds_and_never_grow_whatever_the_drafter_says(
    confidences: list[float],
) -> None:
    survivals = survivals_of(confidences)
    assert len(survivals) == len(confidences)
    previous = 1.0
    for survival, confidence in zip(survivals, confidences, strict=True):
        assert 0.0 <= survival <= previous
        if 0.0 <= confidence <= 1.0:
            assert survival == previous * confidence
        elif math.isnan(confidence):
            assert survival == 0.0
        previous = survival


def test_survivals_of_a_step_are_those_of_its_blocks() -> None:
    assert question([2, 1]).survivals() == [(0.5, 0.25), (0.5,)]


@given(st.lists(st.integers(0, 15), max_size=20), st.integers(0, 100))
def test_leveling_keeps_to_the_limit_and_takes_from_the_deepest_only(
    depths: list[int], row_limit: int
) -> None:
    leveled = level(depths, row_limit)
    assert sum(leveled) == min(sum(depths), row_limit)
    assert all(0 <= after <= before for before, after in zip(depths, leveled, strict=True))
    lowered = [after for before, after in zip(depths, leveled, strict=True) if after < before]
    assert not lowered or max(leveled) <= min(lowered) + 1, "a shallow block paid for a deeper one"
