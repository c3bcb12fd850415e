"""Greedy verdicts for many rows at once are those of the rule for one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparkrelay import noise
from sparkrelay.device.choice import Chooser
from sparkrelay.sampling import Sampling
from verifier_service.accept import verify_block
from verifier_service.commit import best_tokens, judge_greedy

# Halves, so that ties are common; and all that a broken row may hold.
LOGITS = st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0, float("inf"), float("-inf"), float("nan")])


@given(arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 6)), elements=LOGITS))
def test_the_best_tokens_of_many_rows_are_those_of_each_alone(rows: np.ndarray) -> None:
    expected = []
    for row in rows:
        try:
            expected.append(noise.greedy(row))
        except noise.NoCandidate:
            expected.append(-1)
    assert best_tokens(rows) == expected


@given(st.data())
def test_a_greedy_verdict_is_that_of_the_acceptance_rule(data: st.DataObject) -> None:
    draft = data.draw(st.lists(st.integers(0, 3), max_size=4))
    finite = st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0, float("nan")])
    rows = data.draw(arrays(np.float32, (len(draft) + 1, 4), elements=finite))
    if data.draw(st.booleans()):
        for row, token_id in zip(rows, draft, strict=False):
            row[:] = -1.0
            row[token_id] = 3.0  # a block that is accepted, so that its end is reached
    stop_ids = frozenset(data.draw(st.sets(st.integers(0, 3), max_size=2)))
    chooser = Chooser(Sampling(), stop_ids, [1], 1)
    by_rule = verify_block(rows, draft, chooser, stop_ids)
    verdict = judge_greedy(best_tokens(rows), tuple(draft), stop_ids)
    assert (verdict.accepted, tuple(verdict.tokens), verdict.stopped) == (
        by_rule.accepted,
        by_rule.tokens,
        by_rule.stopped,
    )
    assert (verdict.failure is None) == (by_rule.failure is None)
