"""Sessions through real processes: forks go on as fresh sessions would, and what was read once is not read again."""

from __future__ import annotations

import pytest

from sparkrelay.cli.stack import Stack
from sparkrelay.client.blocking import connect
from tests.system.conftest import RunDrafter

pytestmark = pytest.mark.system

PROMPT = [1 + i * i % 61 for i in range(80)]


def test_a_forks_turn_is_a_fresh_sessions_turn_and_its_source_goes_on(
    toy_stack: Stack, run_drafter: RunDrafter
) -> None:
    drafted = 0
    with run_drafter(toy_stack, "ngram"), connect(toy_stack.gateway) as client:
        for turn in ({}, {"temperature": 0.9, "seed": 3}):
            session = client.create_session()
            first = session.generate(token_ids=PROMPT, max_tokens=30, ignore_default_stop_ids=True)
            told = [*PROMPT, *first.token_ids]
            asked = {"max_tokens": 60, "ignore_default_stop_ids": True, "speculation": "fixed:5", **turn}
            fork = session.fork(100)
            branch = fork.generate(token_ids=[*told[:100], 7], **asked)
            main = session.generate(token_ids=[*told, 9], **asked)
            assert branch.usage.cached == 99 and main.usage.cached == 109
            assert branch.token_ids == client.generate(token_ids=[*told[:100], 7], **asked).token_ids
            assert main.token_ids == client.generate(token_ids=[*told, 9], **asked).token_ids
            drafted += branch.totals.verified + main.totals.verified
            fork.end()
            session.end()
    assert drafted > 0
