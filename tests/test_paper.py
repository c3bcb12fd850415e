"""The DSpark paper (Cheng et al., 2026, arXiv 2607.05147), claim by claim, where it speaks of choosing and accepting.

The processes below write three tokens in rounds: draft, choose a depth, verify, commit. A test of the joint law of
the three then says whether rounds, rejections and depths left the target's law alone. One function judges all of
them, so that each pass is worth what the planted errors, which the same function rejects, say it is worth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.device import noise as device_noise
from tests.chi_square import chi_square_p
from verifier_service.accept import rejection_verify

Law = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int64]
DepthRule = Callable[[Tokens], Tokens]

SAMPLE_COUNT = 200_000
GAMMA = 2
WRITTEN = 3


@dataclass(frozen=True)
class Process:
    """The target's and the draft model's next-token laws given the last two tokens: [vocab, vocab, vocab], rows sum to 1."""

    target: Law
    draft: Law


def process_of_four_tokens() -> Process:
    """Token 0 tends to follow itself: 0.9 after (0, 0), where the draft model gives it 0.5. Everywhere else the laws
    are random with no probability below 0.1. So blocks are accepted, cut and refused at every place, and every cell of
    the joint law is well filled."""
    rng = np.random.default_rng(20)
    target = 0.1 + 0.6 * rng.dirichlet(np.ones(4), size=(4, 4))
    draft = 0.1 + 0.6 * rng.dirichlet(np.ones(4), size=(4, 4))
    target[0, 0] = (0.9, 0.05, 0.03, 0.02)
    draft[0, 0] = (0.5, 0.2, 0.2, 0.1)
    return Process(target, draft)


def process_of_appendix_a() -> Process:
    """Target (0.7, 0.3), draft (0.5, 0.5) over {A, B}, whatever came before."""
    return Process(np.tile((0.7, 0.3), (2, 2, 1)), np.tile((0.5, 0.5), (2, 2, 1)))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Rows of four logits are too small to share, and waiting threads would cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fixed_depth(depth: int) -> DepthRule:
    return lambda draft_ids: np.full(len(draft_ids), depth)


def write_by_rejection(process: Process, depth_rule: DepthRule, seed: int) -> Tokens:
    """[SAMPLE_COUNT, 3] tokens, written in rounds that verify by the rejection rule. The context starts as (0, 0)."""
    rng = np.random.default_rng(seed)

    def one_round(context: Tokens, _samples: Tokens, _length: int) -> Tokens:
        draft_ids = np.zeros((len(context), GAMMA), dtype=np.int64)
        draft_probs, target_probs = [], []
        known = context
        for k in range(GAMMA):
            draft_probs.append(process.draft[known[:, -2], known[:, -1]])
            target_probs.append(process.target[known[:, -2], known[:, -1]])
            cumulated = draft_probs[k].cumsum(axis=1)
            draft_ids[:, k] = (cumulated[:, :-1] <= rng.random((len(known), 1))).sum(axis=1)
            known = np.column_stack([known, draft_ids[:, k]])
        target_probs.append(process.target[known[:, -2], known[:, -1]])
        committed = np.full((len(context), GAMMA + 1), -1)
        depths = depth_rule(draft_ids)
        for depth in range(GAMMA + 1):
            rows = np.flatnonzero(depths == depth)
            verdicts = rejection_verify(
                target_probs=np.stack(target_probs[: depth + 1], axis=1)[rows],
                draft_probs=np.stack(draft_probs, axis=1)[rows, :depth],
                draft_ids=draft_ids[rows, :depth],
                uniforms=rng.random((len(rows), depth + 1)),
            )
            for k in range(depth):
                committed[rows, k] = np.where(k < verdicts.accepted, draft_ids[rows, k], -1)
            committed[rows, verdicts.accepted] = verdicts.next_token
        return committed

    return write(one_round)


@cache
def keys_at(seed: int, position: int) -> torch.Tensor:
    """[SAMPLE_COUNT, 2] the noise keys of every sample at a position: samples differ in their seed alone."""
    return device_noise.keys(range(seed, seed + SAMPLE_COUNT), [position] * SAMPLE_COUNT)


def write_by_coupling(process: Process, depth_rule: DepthRule, seed: int) -> Tokens:
    """The same, with one seed of the coupled noise a sample: the draft model and the target choose with the same noise."""

    def choose(laws: Law, samples: Tokens, position: int) -> Tokens:
        logits = torch.from_numpy(np.log(laws).astype(np.float32))
        row_keys = keys_at(seed, position)[torch.from_numpy(samples)]
        return device_noise.choose(logits, torch.ones(len(samples)), row_keys).numpy()

    def one_round(context: Tokens, samples: Tokens, length: int) -> Tokens:
        known, draft_ids = context, np.zeros((len(context), GAMMA), dtype=np.int64)
        committed = np.full((len(context), GAMMA + 1), -1)
        for k in range(GAMMA):
            draft_ids[:, k] = choose(process.draft[known[:, -2], known[:, -1]], samples, length + k)
            known = np.column_stack([known, draft_ids[:, k]])
        depths = depth_rule(draft_ids)
        known = np.column_stack([context, draft_ids])
        to_match = np.column_stack(
            [draft_ids, np.full(len(context), -1)]
        )  # nothing is drafted behind the block
        alive = np.ones(len(context), dtype=bool)
        for k in range(GAMMA + 1):
            chosen = choose(process.target[known[:, k], known[:, k + 1]], samples, length + k)
            committed[:, k] = np.where(alive, chosen, -1)
            alive &= (k < depths) & (chosen == to_match[:, k])
            if not alive.any():
                break
        return committed

    return write(one_round)


def write(one_round: Callable[[Tokens, Tokens, int], Tokens]) -> Tokens:
    """Runs rounds until every sample has its three tokens.

    A round is given the last two tokens, the sample numbers and the length; it returns what it commits, [n, GAMMA + 1],
    filled up with -1, which the next round then overwrites.
    """
    history = np.zeros((SAMPLE_COUNT, 2 + WRITTEN + GAMMA), dtype=np.int64)
    lengths = np.full(SAMPLE_COUNT, 2)
    while (shortest := int(lengths.min())) < 2 + WRITTEN:
        samples = np.flatnonzero(lengths == shortest)
        committed = one_round(history[samples, shortest - 2 : shortest], samples, shortest)
        history[samples, shortest : shortest + GAMMA + 1] = committed
        lengths[samples] += (committed >= 0).sum(axis=1)
    return history[:, 2 : 2 + WRITTEN]


def joint_law_p(tokens: Tokens, target: Law) -> float:
    """How likely are three-token samples as far off as these, if they follow the target?

    The least p-value of three chi-square tests, of the law of the first token, of the first two and of all three,
    times three (Bonferroni). An error in the first token shows best in the first test, which has the fewest cells;
    dependence between tokens shows in the others alone.
    """
    vocab_size = target.shape[-1]
    law = target[0, 0]
    p_values, cells = [], np.zeros(len(tokens), dtype=np.int64)
    for n in range(WRITTEN):
        cells = cells * vocab_size + tokens[:, n]
        p_values.append(chi_square_p(np.bincount(cells, minlength=law.size), len(tokens) * law.ravel()))
        law = law[..., None] * (target[0] if n == 0 else target)
    return min(1.0, WRITTEN * min(p_values))


# ------------------------------------------------------------------------ depth rules


def objective(confidences: Sequence[float], depth: int, steps_per_s: Sequence[float]) -> float:
    """Section 3.2.2: expected tokens of a round times rounds per second, one session; steps_per_s[n] is for n verified tokens."""
    survivals = itertools.accumulate(confidences[:depth], lambda a, c: a * c, initial=1.0)
    return sum(survivals) * steps_per_s[depth + 1]


def early_stop_depth(confidences: Sequence[float], steps_per_s: Sequence[float]) -> int:
    """Algorithm 1 for one session: deepen while it pays, stop the first time it does not."""
    depth = 0
    while depth < len(confidences) and (
        objective(confidences, depth + 1, steps_per_s) > objective(confidences, depth, steps_per_s)
    ):
        depth += 1
    return depth


def retrospective_depth(confidences: Sequence[float], steps_per_s: Sequence[float]) -> int:
    """The global optimum, which looks at every confidence: what Appendix A warns of."""
    return max(range(len(confidences) + 1), key=lambda depth: objective(confidences, depth, steps_per_s))


APPENDIX_A_STEPS_PER_S = (math.nan, 1.0, 0.5, 0.45)
APPENDIX_A_CONFIDENCES = {0: (0.8, 0.9), 1: (0.8, 0.0)}  # c_1, and c_2 as it follows from x_1 = A and x_1 = B


def appendix_a_rule(depth_of: Callable[[Sequence[float], Sequence[float]], int]) -> DepthRule:
    by_first_token = np.array([depth_of(APPENDIX_A_CONFIDENCES[x], APPENDIX_A_STEPS_PER_S) for x in (0, 1)])
    return lambda draft_ids: by_first_token[np.minimum(draft_ids[:, 0], 1)]


# ------------------------------------------------------------------------ the rejection rule


@pytest.mark.parametrize("depth", range(GAMMA + 1))
def test_the_rejection_rule_writes_three_tokens_by_the_targets_joint_law(depth: int) -> None:
    """Lossless verification, the premise of section 3.2, at every fixed depth."""
    process = process_of_four_tokens()
    tokens = write_by_rejection(process, fixed_depth(depth), seed=100 + depth)
    assert joint_law_p(tokens, process.target) > 1e-4


def test_depths_drawn_without_looking_at_the_block_leave_the_law_alone() -> None:
    """The condition of Appendix A: a depth may be anything, if it did not see the tokens that it judges."""
    process, rng = process_of_four_tokens(), np.random.default_rng(7)
    tokens = write_by_rejection(
        process, lambda draft_ids: rng.integers(0, GAMMA + 1, len(draft_ids)), seed=110
    )
    assert joint_law_p(tokens, process.target) > 1e-4


def test_a_one_percent_error_in_one_probability_is_rejected() -> None:
    """Power: 0.909 for 0.9 moves the first token's law by d = 0.009, a noncentrality of N d^2 (1/0.9 + 1/0.1) = 180 at
    3 degrees of freedom. After Bonferroni p < 1e-9 needs a statistic of 47; its mean is 183, its standard deviation
    27, so it fails to reach that once in some millions of seeds. This is why the process has a probability of 0.9: one
    percent of 0.5 would give a noncentrality of 20, too little for any test of 200,000 samples."""
    process = process_of_four_tokens()
    wrong = process.target.copy()
    wrong[0, 0, 0] *= 1.01
    wrong[0, 0, 1:] *= (1 - wrong[0, 0, 0]) / wrong[0, 0, 1:].sum()
    tokens = write_by_rejection(replace(process, target=wrong), fixed_depth(GAMMA), seed=120)
    assert joint_law_p(tokens, wrong) > 1e-4, "it is the law it was given"
    assert joint_law_p(tokens, process.target) < 1e-9


def test_sharing_the_targets_draw_between_tokens_is_rejected() -> None:
    """Each token has the right law of its own; only the joint law shows that the second copies the first's luck."""
    process = process_of_appendix_a()
    tokens = write_by_rejection(process, fixed_depth(GAMMA), seed=130)
    copied = tokens[:, [0, 0, 2]]
    assert joint_law_p(tokens, process.target) > 1e-4
    assert joint_law_p(copied, process.target) < 1e-9


@pytest.mark.parametrize("laws", [((0.7, 0.3), (0.5, 0.5)), ((0.25, 0.75), (0.5, 0.5))])
def test_the_acceptance_rate_is_one_minus_total_variation_and_lengths_follow(
    laws: tuple[tuple[float, float], tuple[float, float]],
) -> None:
    """Accepted length = 1 + the sum of the survivals, each the product of the acceptance rates so far; the rate itself,
    which is the label that the confidence is trained on (sections 3.1 to 3.3), is 1 - |target - draft|_1 / 2."""
    target, draft = (np.array(law) for law in laws)
    rate, depth = 1 - np.abs(target - draft).sum() / 2, 4
    rng = np.random.default_rng(140)
    draft_ids = (rng.random((SAMPLE_COUNT, depth)) >= draft[0]).astype(np.int64)
    verdicts = rejection_verify(
        target_probs=np.broadcast_to(target, (SAMPLE_COUNT, depth + 1, 2)),
        draft_probs=np.broadcast_to(draft, (SAMPLE_COUNT, depth, 2)),
        draft_ids=draft_ids,
        uniforms=rng.random((SAMPLE_COUNT, depth + 1)),
    )
    survivals = rate ** np.arange(depth + 1)
    expected = SAMPLE_COUNT * np.append(-np.diff(survivals), survivals[-1])
    assert chi_square_p(np.bincount(verdicts.accepted, minlength=depth + 1), expected) > 1e-4
    standard_error = verdicts.accepted.std() / math.sqrt(SAMPLE_COUNT)
    assert 1 + verdicts.accepted.mean() == pytest.approx(survivals.sum(), abs=4.5 * standard_error)


# ------------------------------------------------------------------------ Appendix A


def test_the_depths_of_appendix_a_are_the_papers() -> None:
    """The rule that looks back verifies two tokens after A and none after B; Algorithm 1 stops at once, whatever comes."""
    assert [retrospective_depth(c, APPENDIX_A_STEPS_PER_S) for c in APPENDIX_A_CONFIDENCES.values()] == [2, 0]
    assert [early_stop_depth(c, APPENDIX_A_STEPS_PER_S) for c in APPENDIX_A_CONFIDENCES.values()] == [0, 0]
    objectives = [objective(APPENDIX_A_CONFIDENCES[0], depth, APPENDIX_A_STEPS_PER_S) for depth in range(3)]
    assert objectives == pytest.approx([1.0, 0.9, 1.134])


def test_appendix_a_by_arithmetic() -> None:
    """A is drafted half the time and then always accepted; a drafted B is thrown away unseen, and the target draws afresh."""
    accept_a = min(1.0, 0.7 / 0.5)
    assert 0.5 * accept_a + 0.5 * 0.7 == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("write_tokens", "depth_of", "share_of_a"),
    [
        pytest.param(write_by_rejection, retrospective_depth, 0.85, id="rejection, looking back: biased"),
        pytest.param(write_by_rejection, early_stop_depth, 0.70, id="rejection, early stop: right"),
        pytest.param(write_by_coupling, retrospective_depth, 0.70, id="coupled, looking back: right"),
    ],
)
def test_appendix_a_gives_the_papers_share_of_a(
    write_tokens: Callable[[Process, DepthRule, int], Tokens],
    depth_of: Callable[[Sequence[float], Sequence[float]], int],
    share_of_a: float,
) -> None:
    process = process_of_appendix_a()
    tokens = write_tokens(process, appendix_a_rule(depth_of), 200)
    observed = np.bincount(tokens[:, 0], minlength=2)
    assert chi_square_p(observed, SAMPLE_COUNT * np.array([share_of_a, 1 - share_of_a])) > 1e-4
    p_of_the_target = joint_law_p(tokens, process.target)
    assert p_of_the_target > 1e-4 if share_of_a == 0.70 else p_of_the_target < 1e-9


def test_the_bias_of_appendix_a_is_rejected_in_the_process_of_four_tokens_too() -> None:
    """Appendix A, planted where the test of the right rule passes."""
    process = process_of_four_tokens()
    tokens = write_by_rejection(process, appendix_a_rule(retrospective_depth), seed=210)
    assert joint_law_p(tokens, process.target) < 1e-9


def test_coupled_acceptance_bears_any_choice_of_depth() -> None:
    """What the product builds on: the scheduler may look at everything, for no token depends on its round's depth."""
    process = process_of_four_tokens()
    looking_back = write_by_coupling(process, appendix_a_rule(retrospective_depth), seed=220)
    assert joint_law_p(looking_back, process.target) > 1e-4
    assert (looking_back == write_by_coupling(process, fixed_depth(0), seed=220)).all(), "and token by token"


def test_coupled_acceptance_matches_within_the_known_bounds_of_total_variation() -> None:
    """The price of coupling: the match rate lies between (1-TV)/(1+TV) and 1-TV, which the rejection rule reaches."""
    rng = np.random.default_rng(8)
    row_keys = device_noise.keys(range(50_000), [3] * 50_000)
    for _ in range(8):
        target, draft = rng.dirichlet(np.ones(6), size=2)
        tokens = [
            device_noise.choose(
                torch.from_numpy(np.log(law).astype(np.float32)).expand(50_000, -1),
                torch.ones(50_000),
                row_keys,
            )
            for law in (target, draft)
        ]
        rate, distance = float((tokens[0] == tokens[1]).double().mean()), np.abs(target - draft).sum() / 2
        slack = 4.5 * 0.5 / math.sqrt(50_000)
        assert (1 - distance) / (1 + distance) - slack < rate < 1 - distance + slack


# ------------------------------------------------------------------------ section 3.2.2: the choice of depth

CONFIDENCES = st.lists(st.floats(0.0, 1.0), max_size=7)
STEPS_PER_S = st.lists(st.floats(0.05, 1.0), min_size=8, max_size=8).map(
    lambda speeds: [math.nan, *sorted(speeds, reverse=True)]
)


@given(confidences=CONFIDENCES, later=CONFIDENCES, steps_per_s=STEPS_PER_S)
def test_early_stop_does_not_look_at_confidences_behind_the_first_that_does_not_pay(
    confidences: list[float], later: list[float], steps_per_s: list[float]
) -> None:
    """Section 3.2.2 and Appendix A: c_k follows from x_1 .. x_{k-1}; a depth fixed by c_1 .. c_{depth+1} never saw the
    token it turned away, so the rejection rule stays exact."""
    depth = early_stop_depth(confidences, steps_per_s)
    other_end = (confidences[: depth + 1] + later)[: len(confidences)]
    if depth < len(confidences):
        assert early_stop_depth(other_end, steps_per_s) == depth


@given(confidences=CONFIDENCES, steps_per_s=STEPS_PER_S)
def test_early_stop_never_beats_the_global_optimum_and_never_falls_below_plain_decoding(
    confidences: list[float], steps_per_s: list[float]
) -> None:
    early = objective(confidences, early_stop_depth(confidences, steps_per_s), steps_per_s)
    best = objective(confidences, retrospective_depth(confidences, steps_per_s), steps_per_s)
    assert objective(confidences, 0, steps_per_s) <= early <= best


@given(
    sessions=st.lists(st.lists(st.floats(0.0, 1.0), max_size=3), min_size=1, max_size=3),
    budget=st.integers(0, 9),
)
def test_the_best_survivals_of_all_sessions_are_a_prefix_of_each_and_the_best_set(
    sessions: list[list[float]], budget: int
) -> None:
    """Section 3.2.2: survivals fall along a block, so admitting the highest ones needs no rule about the order inside a
    block. Checked against every way of giving each session a depth."""
    survivals = [list(itertools.accumulate(confidences, lambda a, c: a * c)) for confidences in sessions]
    ranked = sorted((-a, k, session) for session, row in enumerate(survivals) for k, a in enumerate(row))[
        :budget
    ]
    for session in range(len(sessions)):
        admitted = sorted(k for _, k, owner in ranked if owner == session)
        assert admitted == list(range(len(admitted)))
    every_way = itertools.product(*(range(len(row) + 1) for row in survivals))
    best = max(
        sum(sum(row[:depth]) for row, depth in zip(survivals, depths, strict=True))
        for depths in every_way
        if sum(depths) <= budget
    )
    assert -sum(a for a, _, _ in ranked) == pytest.approx(best)
