"""Depths of a step, all sessions together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier_service.depth_policies import (
    DepthQuestion,
    level,
    parse_depth_policy,
    survivals_of,
    typical_budget,
)
from verifier_service.step_curve import CurveProfile, StepCurve


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
    "text",
    [
        "",
        "fixed",
        "fixed:",
        "fixed:16",
        "fixed:-1",
        "fixed:2x",
        "fixed:³",
        "adaptve",
        "OFF",
        "threshold:1.1",
        "threshold:",
        "threshold:nan",
    ],
)
def test_a_policy_that_does_not_exist_is_refused_with_those_that_do(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"depth_policy: is .* choose off, auto, .* fixed:K with K from 0 to 15"
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


# ---- adaptive and its twin ----------------------------------------------------------------------------------------------


def pace(question: DepthQuestion, depths: Sequence[int]) -> float:
    """Expected tokens per microsecond, said the plain way."""
    weights = question.weights or [1.0] * len(depths)
    worth = float(question.session_count)
    for survivals, weight, depth in zip(question.survivals(), weights, depths, strict=True):
        worth += weight * sum(survivals[:depth])
    row_count = question.fixed_row_count + sum(depths)
    return worth / (question.curve.step_us(question.shape(row_count)) + question.idle_us)


def best_by_force(question: DepthQuestion) -> float:
    """The best pace of all depths without tokens that cannot match."""
    every = itertools.product(*(range(len(values) + 1) for values in question.values()))
    return max(pace(question, depths) for depths in every if sum(depths) <= question.row_limit)


@st.composite
def small_questions(draw: st.DrawFn) -> DepthQuestion:
    """Up to three blocks of up to four tokens, ties and zeros among their confidences, on a curve that jumps about."""
    confidence = st.sampled_from((0.0, 0.25, 0.5, 0.5, 0.9, 1.0)) | st.floats(0.0, 1.0)
    blocks = draw(st.lists(st.lists(confidence, min_size=1, max_size=4).map(tuple), min_size=1, max_size=3))
    knots = [(rows, draw(st.floats(1.0, 9.0))) for rows in (1, 3, 4, 8, 9, 14)]
    curve = StepCurve(CurveProfile(tuple(knots), 0.1, 0.2, draw(st.sampled_from((1, 2, 4)))))
    fixed_row_count = draw(st.integers(1, 6))
    return DepthQuestion(
        blocks,
        [draw(st.integers(1, len(block))) for block in blocks],
        fixed_row_count,
        max(len(blocks), fixed_row_count // 2),
        draw(st.integers(0, 13)),
        key_block_count=draw(st.integers(0, 5)),
        idle_us=draw(st.sampled_from((0.0, 5.0))),
        weights=draw(st.none() | st.just([1.0, 0.5, 2.0][: len(blocks)])),
        curve=curve,
    )


@given(small_questions())
def test_no_other_depths_give_more_tokens_per_time_than_adaptive(question: DepthQuestion) -> None:
    depths = parse_depth_policy("adaptive").depths(question)
    assert sum(depths) <= question.row_limit
    assert all(0 <= depth <= most for depth, most in zip(depths, question.max_depths, strict=True))
    assert pace(question, depths) == pytest.approx(best_by_force(question), rel=1e-9)
    assert all(0.0 not in question.survivals()[i][:depth] for i, depth in enumerate(depths))


def wave(multiple: int = 4) -> StepCurve:
    return StepCurve(CurveProfile(((4, 10.0), (64, 20.0), (1024, 210.0)), row_multiple=multiple))


def test_depth_falls_with_load_and_surer_blocks_go_deeper() -> None:
    means = []
    for session_count in (1, 8, 32, 128):
        sure, unsure = (0.95,) * 7, (0.5,) * 7
        blocks = [sure, unsure] * (session_count // 2) or [sure]
        asked = DepthQuestion(blocks, [7] * len(blocks), len(blocks), len(blocks), 1024, curve=wave())
        depths = parse_depth_policy("adaptive").depths(asked)
        means.append(sum(depths) / len(depths))
        if len(depths) > 1:
            assert depths[0] > depths[1]
    assert means == sorted(means, reverse=True) and means[0] == 7 and 0 < means[-1] < 4


def test_free_rows_are_filled_but_not_with_tokens_that_cannot_match() -> None:
    steep = StepCurve(CurveProfile(((4, 1.0), (8, 100.0))))
    asked = DepthQuestion([(0.3, 0.3), (0.2, 0.0)], [2, 2], 2, 2, 99, curve=steep)
    assert list(parse_depth_policy("adaptive").depths(asked)) == [1, 1]
    alone = DepthQuestion([(0.2, 0.0, 1.0)], [3], 1, 1, 99, curve=steep)
    assert list(parse_depth_policy("adaptive").depths(alone)) == [1]


def test_equal_values_go_to_the_shallower_and_then_to_the_earlier_block() -> None:
    curve = StepCurve(CurveProfile(((4, 1.0), (8, 1e6))))
    asked = DepthQuestion([(1.0, 1.0), (1.0, 1.0), (1.0, 0.5)], [2, 2, 2], 4, 3, 4, curve=curve)
    assert list(parse_depth_policy("adaptive").depths(asked)) == [0, 0, 0]
    flat = StepCurve(CurveProfile(((4, 1.0), (8, 1.0))))
    shared = DepthQuestion(asked.confidences, [2, 2, 2], 4, 3, 4, curve=flat)
    assert list(parse_depth_policy("adaptive").depths(shared)) == [2, 1, 1]


def test_time_that_is_lost_anyway_makes_deeper_checking_pay() -> None:
    curve = StepCurve(CurveProfile(((1, 10.0), (8, 80.0)), row_multiple=1))
    depths = [
        parse_depth_policy("adaptive").depths(
            DepthQuestion([(0.6,) * 7], [7], 1, 1, 99, idle_us=idle_us, curve=curve)
        )[0]
        for idle_us in (0.0, 40.0, 400.0)
    ]
    assert depths == sorted(depths) and depths[0] < depths[-1]


def test_threshold_goes_as_deep_as_tokens_survive() -> None:
    asked = DepthQuestion([(0.9, 0.9, 0.9), (0.5, 1.0), (1.0, 1.0)], [3, 2, 1], 3, 3, 99)
    assert list(parse_depth_policy("threshold:0.8").depths(asked)) == [2, 0, 1]
    assert list(parse_depth_policy("threshold:0").depths(asked)) == [3, 2, 1]


@pytest.mark.parametrize("text", ["adaptive", "algorithm1", "threshold:0.5"])
@given(
    st.lists(st.lists(st.floats(), min_size=1, max_size=15).map(tuple), min_size=1, max_size=6),
    st.integers(0, 40),
)
def test_no_confidence_leads_a_policy_beyond_its_limits(
    text: str, blocks: list[tuple[float, ...]], row_limit: int
) -> None:
    most = [len(block) for block in blocks]
    depths = parse_depth_policy(text).depths(DepthQuestion(blocks, most, len(blocks), len(blocks), row_limit))
    assert all(0 <= depth <= limit for depth, limit in zip(depths, most, strict=True))
    assert text.startswith("threshold") or sum(depths) <= row_limit


# ---- the paper's own example -------------------------------------------------------------------------------------------


def appendix_a(x1_is_a: bool) -> DepthQuestion:
    """R = 1, gamma = 2, SPS 1.0, 0.5, 0.45; a_1 = 0.8, and c_2 gives away what x_1 is."""
    curve = StepCurve(CurveProfile(((1, 1.0), (2, 2.0), (3, 1 / 0.45)), row_multiple=1))
    return DepthQuestion([(0.8, 0.9 if x1_is_a else 0.0)], [2], 1, 1, 99, curve=curve)


def test_the_papers_rule_does_not_look_ahead_and_the_global_optimum_does() -> None:
    """Appendix A: under the rejection rule the optimum would bias the output, so Algorithm 1 must not know x_1."""
    early, optimum = parse_depth_policy("algorithm1"), parse_depth_policy("adaptive")
    assert list(early.depths(appendix_a(True))) == list(early.depths(appendix_a(False))) == [0]
    assert (list(optimum.depths(appendix_a(True))), list(optimum.depths(appendix_a(False)))) == ([2], [0])


@given(small_questions())
def test_the_papers_rule_stops_at_the_first_row_that_does_not_pay(question: DepthQuestion) -> None:
    depths = parse_depth_policy("algorithm1").depths(question)
    values = sorted((value for block in question.values() for value in block), reverse=True)
    paces = [question.session_count / question.curve.step_us(question.shape(question.fixed_row_count))]
    worth = float(question.session_count)
    for count, value in enumerate(values[: question.row_limit], start=1):
        worth += value
        paces.append(worth / question.curve.step_us(question.shape(question.fixed_row_count + count)))
    assert sum(depths) == next((i for i in range(len(paces) - 1) if paces[i + 1] < paces[i]), len(paces) - 1)


# ---- budgets -------------------------------------------------------------------------------------------------------------


def test_blocks_are_asked_for_a_little_longer_than_they_are_checked_and_not_at_all_where_rows_are_dear() -> (
    None
):
    good = (0.9,) * 7
    budgets = [typical_budget(wave(), count, good, 512) for count in (1, 8, 64, 256)]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] == 9
    dear = StepCurve(CurveProfile(((4, 1.0), (512, 128.0))))
    assert typical_budget(dear, 64, (0.3,) * 7, 512) == 0
    assert typical_budget(dear, 1, (0.3,) * 7, 512) > 0, "rows that are free are worth a draft"
