"""Recent turns and watchers: bounded, and honest about what they dropped."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from gateway.turn_output import RoundTotals, Timing, TurnSummary, Usage
from gateway.turns import RecentTurns
from gateway.watchers import RoundBoard, SeenRound, Watcher
from sparkrelay.outcomes import FinishReason, Reason, Refusal
from tests.gateway.test_turn_output import Report

SUMMARY = TurnSummary(FinishReason.STOP, "", Usage(), Timing(), RoundTotals())


def test_the_oldest_finished_turn_is_forgotten_and_one_under_way_never() -> None:
    turns = RecentTurns(limit=2, rounds_limit=10)
    turns.start("running", "trace", "s", "m", 0.0)
    for name in "abc":
        turns.finish(turns.start(name, "trace", "s", "m", 0.0), SUMMARY)
    page, token = turns.page(10, "", "")
    assert ([record.turn_id for record in page], token) == (["c", "running"], "")
    with pytest.raises(Refusal) as refused:
        turns.get("a")
    assert refused.value.reason is Reason.TURN_NOT_FOUND


def test_the_first_rounds_of_a_long_turn_are_kept() -> None:
    turns = RecentTurns(limit=2, rounds_limit=2)
    record = turns.start("t", "trace", "s", "m", 0.0)
    for depth in range(5):
        turns.add_round(record, Report(depth=depth))
    assert [report.depth for report in turns.get("t").rounds] == [0, 1]


def test_turns_are_listed_by_session_in_pages() -> None:
    turns = RecentTurns(limit=100, rounds_limit=2)
    for index in range(6):
        turns.start(f"t{index}", "trace", "even" if index % 2 == 0 else "odd", "m", 0.0)
    page, token = turns.page(2, "", "even")
    assert [record.turn_id for record in page] == ["t4", "t2"]
    page, token = turns.page(2, token, "even")
    assert ([record.turn_id for record in page], token) == (["t0"], "")


async def seen(watcher: Watcher, count: int) -> list[SeenRound]:
    result: list[SeenRound] = []
    async with aclosing(watcher.rounds()) as rounds:
        async for each in rounds:
            result.append(each)
            if len(result) == count:
                break
    return result


async def test_a_watcher_sees_its_session_and_counts_what_it_was_too_slow_for() -> None:
    board = RoundBoard(limit=2)
    with board.watch("s") as watcher:
        for depth in range(5):
            board.publish("turn", "s", Report(depth=depth))
            board.publish("turn", "other", Report())
        assert [(each.report.depth, each.skipped_count) for each in await seen(watcher, 2)] == [
            (0, 0),
            (1, 0),
        ]
        board.publish("turn", "s", Report(depth=9))
        assert [(each.report.depth, each.skipped_count) for each in await seen(watcher, 1)] == [(9, 3)]


async def test_a_waiting_watcher_is_woken_by_a_round_and_by_the_end() -> None:
    board = RoundBoard(limit=2)
    with board.watch("") as watcher:
        waiting = asyncio.create_task(seen(watcher, 2))
        await asyncio.sleep(0)
        board.publish("turn", "any", Report())
        board.close()
        assert len(await waiting) == 1
