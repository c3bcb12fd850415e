"""The promise: through real processes and sockets, the tokens are those of plain decoding, whatever drafts and however deep.

Each run also shows from its round reports that there was something to be exact about: blocks were drafted, verified, accepted
and, by drafters that guess or lie, rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sparkrelay.cli.stack import Child, Stack
from sparkrelay.client.blocking import Client, connect
from sparkrelay.client.results import Generation
from tests.system.conftest import RunDrafter, drafter_beside, drafter_state, wait_until

pytestmark = pytest.mark.system

GREEDY: dict[str, Any] = {}
FILTERED: dict[str, Any] = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 11}
WARM: dict[str, Any] = {"temperature": 1.0, "seed": 12}
EVERYTHING: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 0.95,
    "min_p": 0.02,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "logit_bias": {3: 0.5, 5: -0.5},
    "min_tokens": 8,
    "seed": 13,
}
SAMPLINGS = (GREEDY, FILTERED, WARM, EVERYTHING)
DEPTHS = range(16)
TOY_PROMPT = [7, 3, 9, 7, 3, 9, 7, 3]
DEMO_MESSAGES = [{"role": "user", "content": "Repeat twice: the cat sat on the mat, the cat ate the rat."}]


def turns_equal_plain(
    client: Client, turn: dict[str, Any], samplings: Iterable[dict[str, Any]], depths: Iterable[int]
) -> list[Generation]:
    """Runs every combination and holds it against the plain turn; returns the speculative ones."""
    runs = []
    for sampling in samplings:
        plain = client.generate(**turn, **sampling, speculation="off", include_rounds=True)
        assert plain.totals.drafted == 0
        for depth in depths:
            run = client.generate(**turn, **sampling, speculation=f"fixed:{depth}", include_rounds=True)
            assert run.token_ids == plain.token_ids, f"{sampling} at depth {depth}"
            assert run.finish_reason == plain.finish_reason
            assert all(report.depth <= depth for report in run.rounds)
            runs.append(run)
    return runs


def counts(runs: Iterable[Generation]) -> Counter[str]:
    """What the round reports of these turns add up to."""
    total: Counter[str] = Counter()
    for run in runs:
        for report in run.rounds:
            total["drafted"] += report.drafted
            total["verified"] += report.depth
            total["accepted"] += report.accepted
            total["rejected"] += report.depth - report.accepted
    return total


@pytest.mark.parametrize("kind", ["ngram", "random", "adversarial"])
def test_the_toys_tokens_are_the_plain_ones_at_every_depth(
    toy_stack: Stack, run_drafter: RunDrafter, kind: str
) -> None:
    turn = {"token_ids": TOY_PROMPT, "max_tokens": 96, "ignore_default_stop_ids": True}
    with run_drafter(toy_stack, kind), connect(toy_stack.gateway) as client:
        total = counts(turns_equal_plain(client, turn, SAMPLINGS, DEPTHS))
    assert min(total[name] for name in ("drafted", "verified", "accepted", "rejected")) > 0, total


def test_the_toys_tokens_are_the_plain_ones_where_a_stop_id_ends_the_turn_inside_a_block(
    toy_stack: Stack, run_drafter: RunDrafter
) -> None:
    with run_drafter(toy_stack, "ngram"), connect(toy_stack.gateway) as client:
        for first in range(1, 9):
            turn = {"token_ids": [first, *TOY_PROMPT], "max_tokens": 200, "stop_token_ids": [11, 12]}
            turns_equal_plain(client, turn, (FILTERED,), (4, 15))


def test_without_a_drafter_the_turn_is_plain_and_says_why(toy_stack: Stack) -> None:
    with connect(toy_stack.gateway) as client:
        turn = {"token_ids": TOY_PROMPT, "max_tokens": 64}
        runs = turns_equal_plain(client, turn, SAMPLINGS, (0, 4, 15))
    assert counts(runs)["drafted"] == 0
    assert all(run.no_drafter_reason for run in runs if run.drafter_id == "")
    assert all(report.block_state in ("no_drafter", "not_asked") for run in runs for report in run.rounds)


@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING])
def test_a_drafter_killed_in_mid_turn_changes_no_token(
    toy_stack: Stack, run_drafter: RunDrafter, sampling: dict[str, Any]
) -> None:
    turn = {"token_ids": TOY_PROMPT, "max_tokens": 3000, "ignore_default_stop_ids": True, **sampling}
    with run_drafter(toy_stack, "ngram") as drafter, connect(toy_stack.gateway) as client:
        killed_in_mid_turn(client, drafter, turn)


def killed_in_mid_turn(client: Client, drafter: Child, turn: dict[str, Any]) -> None:
    """Kills the drafter once it has been of use, and holds the turn against the plain one."""
    plain = client.generate(**turn, speculation="off")
    with client.generate_stream(**turn, speculation="fixed:4", include_rounds=True) as stream:
        deltas = iter(stream)  # one iterator to the end: leaving it would cancel the turn
        while not any(report.accepted for report in next(deltas).rounds):
            pass
        drafter.kill()
        run = stream.result
    wait_until(lambda: drafter_state(client) == "lost")
    assert run.token_ids == plain.token_ids
    assert run.totals.drafted > 0 and run.totals.accepted > 0
    assert run.rounds[-1].block_state == "no_drafter"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ngram", "random", "adversarial"])
def test_the_demo_models_tokens_are_the_plain_ones_at_every_depth(
    demo_stack: Stack, run_drafter: RunDrafter, kind: str
) -> None:
    turn = {"messages": DEMO_MESSAGES, "max_tokens": 32, "ignore_default_stop_ids": True}
    with run_drafter(demo_stack, kind), connect(demo_stack.gateway) as client:
        total = counts(turns_equal_plain(client, turn, (GREEDY, FILTERED, EVERYTHING), DEPTHS))
    assert min(total[name] for name in ("drafted", "verified", "accepted", "rejected")) > 0, total


@pytest.mark.timeout(300)
def test_a_draft_that_reads_context_rows_has_them_in_its_first_turn_and_after_a_restart(
    demo_stack: Stack, demo_draft: Path, tmp_path: Path
) -> None:
    turn = {"max_tokens": 24, "ignore_default_stop_ids": True}
    flags = ("--model", str(demo_draft), "--target", demo_stack.plan.model)
    with connect(demo_stack.gateway) as client:
        plain = client.generate(messages=DEMO_MESSAGES, **turn, speculation="off").token_ids
        with client.create_session() as session:
            for _ in range(2):
                with drafter_beside(demo_stack, "dspark", tmp_path, flags):
                    asked = session.generate(
                        messages=DEMO_MESSAGES, **turn, speculation="fixed:4", include_rounds=True
                    )
                assert asked.token_ids == plain
                assert asked.rounds[0].drafted > 0, "without rows it would have nothing to say"
                assert asked.totals.verified > asked.totals.accepted


@pytest.mark.parametrize("sampling", [GREEDY, FILTERED, EVERYTHING])
def test_a_drafter_of_the_demo_model_killed_in_mid_turn_changes_no_token(
    demo_stack: Stack, run_drafter: RunDrafter, sampling: dict[str, Any]
) -> None:
    turn = {"messages": DEMO_MESSAGES, "max_tokens": 96, "ignore_default_stop_ids": True, **sampling}
    with run_drafter(demo_stack, "random") as drafter, connect(demo_stack.gateway) as client:
        killed_in_mid_turn(client, drafter, turn)


@pytest.mark.timeout(300)
def test_the_target_as_its_own_drafter_has_every_block_accepted_whole(
    demo_stack: Stack, run_drafter: RunDrafter
) -> None:
    turn = {"messages": DEMO_MESSAGES, "max_tokens": 40, "ignore_default_stop_ids": True}
    with run_drafter(demo_stack, "causal_lm"), connect(demo_stack.gateway) as client:
        runs = turns_equal_plain(client, turn, (GREEDY, FILTERED, EVERYTHING), DEPTHS[1:])
    total = counts(runs)
    assert total["accepted"] == total["verified"] > 0
    for run in runs:
        assert [r.accepted for r in run.rounds] == [r.depth for r in run.rounds]
        without_draft = sum(report.depth == 0 for report in run.rounds)
        assert without_draft <= 1, "only a turn's last token needs no draft"
