"""Whose rows a step computes: shares, chunks, room. Time here is rows computed, never a clock."""

from __future__ import annotations

import pytest

from sparkrelay.protocol import chain_hash
from tests.verifier_service.driver import Driver, block, member, of, turn
from tests.verifier_service.plain_decoder import decode
from verifier_service.events import CancelTurn, Committed, TurnAccepted, TurnOver
from verifier_service.models import FloatRows
from verifier_service.models.toy import FreeToyModel, ToyModel
from verifier_service.ragged_batch import RaggedBatch


class CountedModel(FreeToyModel):
    """Counts in a circle, and remembers how many rows each sequence had in each step."""

    def __init__(self) -> None:
        super().__init__(vocab_size=100, block_tokens=16)
        self.steps: list[dict[int, int]] = []

    def forward(self, batch: RaggedBatch) -> FloatRows:
        self.steps.append({segment.sequence_id: segment.row_count for segment in batch.segments})
        return super().forward(batch)


def rows_between_commits(budget: int, prompt_len: int, session_count: int = 1) -> int:
    """The most rows computed from one commit of any running turn to its next, while a long prompt is read beside them."""
    model = CountedModel()
    driver = Driver(model, block_count=1000, step_token_budget=budget)
    names = [f"runs{n}" for n in range(session_count)]
    driver.step(*(turn(name, name, max_tokens=300) for name in names))
    clock, longest = 0, 0
    last = dict.fromkeys(names, clock)  # turn |-> when it committed last
    command = turn("long", "long", (5,) * prompt_len, max_tokens=2)
    while not driver.output("long"):
        events = driver.step(command) if clock == 0 else driver.step()
        clock += sum(model.steps[-1].values())
        for commit in of(events, Committed):
            if commit.turn_id in last:
                longest = max(longest, clock - last[commit.turn_id])
                last[commit.turn_id] = clock
    assert clock >= prompt_len and all(clock - then <= longest for then in last.values()), (
        "somebody stood still"
    )
    return longest


def test_a_long_prompt_is_read_in_chunks_beside_the_running_turns() -> None:
    assert rows_between_commits(64, 3000) <= 64
    assert rows_between_commits(4096, 3000) > 3000, (
        "without chunks the running turn would have stood still so long"
    )


@pytest.mark.parametrize("budget", [32, 128, 512])
def test_a_2000_token_prompt_delays_none_of_7_running_turns_by_more_than_one_step_budget(budget: int) -> None:
    assert rows_between_commits(budget, 2000, session_count=7) <= budget


def test_prompts_are_read_in_order_of_admission_in_what_decoding_leaves() -> None:
    model = CountedModel()
    driver = Driver(model, step_token_budget=20, block_count=100)
    driver.run(*(turn(name, name, (n,) * 30, max_tokens=3) for n, name in enumerate(("first", "second"))))
    assert model.steps == [{0: 20}, {0: 10, 1: 10}, {0: 1, 1: 19}, {0: 1, 1: 1}, {1: 1}, {1: 1}]


def test_decoding_leaves_a_quarter_of_the_rows_to_a_waiting_prompt_and_takes_them_all_otherwise() -> None:
    model = CountedModel()
    driver = Driver(model, "fixed:15", step_token_budget=16, block_count=100)
    driver.step(turn("s", "t", (1, 2, 3), max_tokens=90), member("s", 1))
    driver.step(block(1, 4, range(5, 20)))
    assert model.steps[-1] == {0: 16}
    length = 3 + len(driver.output("t"))
    driver.step(turn("long", "long", (1,) * 50), block(1, length, range(length + 1, length + 16)))
    assert model.steps[-1] == {0: 12, 1: 4}


def test_depth_is_shared_out_when_the_rows_do_not_suffice() -> None:
    model = CountedModel()
    driver = Driver(model, "fixed:15", step_token_budget=16, block_count=100)
    sessions = range(4)
    driver.step(
        *(turn(f"s{i}", f"t{i}", (1, 2, 3), max_tokens=90) for i in sessions),
        *(member(f"s{i}", i + 1) for i in sessions),
    )
    driver.step(*(block(i + 1, 4, range(5, 15)) for i in sessions))
    assert model.steps[-1] == {0: 4, 1: 4, 2: 4, 3: 4}


def test_more_sessions_than_rows_take_turns() -> None:
    model = CountedModel()
    driver = Driver(model, step_token_budget=16, block_count=1000)
    for i in range(40):
        driver.step(turn(f"s{i}", f"t{i}", (1, 2, 3), max_tokens=1000))
        driver.now_us += 1
    while not all(driver.output(f"t{i}") for i in range(40)):
        driver.step()
        driver.now_us += 1
    served: dict[int, int] = dict.fromkeys(range(40), 0)
    for _ in range(50):
        driver.step()
        driver.now_us += 1
        assert sum(model.steps[-1].values()) == 16
        for sequence_id in model.steps[-1]:
            served[sequence_id] += 1
    assert max(served.values()) - min(served.values()) <= 1


def test_a_turn_waits_for_room_and_begins_when_there_is_some() -> None:
    driver = Driver(ToyModel(), block_count=3)
    driver.step(
        turn("a", "a", (1,) * 20, max_tokens=4),
        turn("b", "b", (2,) * 30, max_tokens=4),
        turn("c", "c", (3,), max_tokens=4),
    )
    assert [event.turn_id for event in of(driver.events, TurnAccepted)] == ["a"], "c must not overtake b"
    driver.run()
    assert [event.turn_id for event in of(driver.events, TurnAccepted)] == ["a", "b", "c"]


def test_the_youngest_turn_is_preempted_and_says_the_same_as_if_it_had_not_been() -> None:
    driver = Driver(ToyModel(), "off", block_count=4, step_token_budget=64)
    commands = [turn(name, name, (number,) * 12, max_tokens=30) for number, name in enumerate("abc", start=1)]
    driver.step(*commands, member("c", 1))
    driver.run()
    assert driver.engine.load().preempted_count > 0
    order = [event.turn_id for event in of(driver.events, TurnOver)]
    assert order == ["a", "b", "c"], "the oldest never waits for a younger one"
    for command in commands:
        assert driver.output(command.turn_id) == decode(ToyModel(), command.append_ids, command, 64)
    rounds = [commit.round for commit in driver.rounds("c")]
    assert [done.number for done in rounds if done is not None] == list(range(29)), (
        "reading again is no second beginning"
    )


def test_a_wait_that_a_preemption_broke_off_begins_anew_when_the_session_is_back() -> None:
    driver = Driver(CountedModel(), "fixed:4", block_count=2)
    driver.step(
        turn("a", "a", (1,) * 14, max_tokens=10), turn("b", "b", (1,) * 10, max_tokens=90), member("b", 1)
    )
    while not driver.engine.load().preempted_count:
        driver.step()
    before = len(driver.output("b"))
    driver.now_us = 60_000  # beyond the wait for the block that was on its way
    while len(driver.output("b")) == before:
        driver.step()
    assert of(driver.step(), Committed) == [] and driver.due_us == 60_000 + 50_000


def test_an_idle_session_gives_its_room_and_reads_again_when_it_returns() -> None:
    driver = Driver(ToyModel(), block_count=4)
    driver.run(turn("old", "1", (1,) * 20, max_tokens=2))
    driver.run(turn("new", "2", (2,) * 20, max_tokens=2))
    driver.run(turn("large", "3", (3,) * 30, max_tokens=2))
    assert driver.engine.load().evicted_count == 1, "the longest unused one alone"
    for session_id, first in (("new", 2), ("old", 1)):
        ids = [first] * 20 + driver.output(str(first))
        command = turn(
            session_id, f"again-{session_id}", (9,), keep_len=22, keep_hash=chain_hash(ids), max_tokens=3
        )
        [accepted] = of(driver.run(command), TurnAccepted)
        assert accepted.cached_token_count == (21 if session_id == "new" else 0)
        assert driver.output(f"again-{session_id}") == decode(ToyModel(), [*ids, 9], command, 64)


def test_drafts_give_way_where_only_they_lack_room() -> None:
    """Two sessions fill the memory to the last position: depth falls to 0, and nobody is preempted for a draft."""
    model = CountedModel()
    driver = Driver(model, "fixed:15", block_count=2)
    driver.step(
        turn("a", "a", (1,) * 14, max_tokens=2), turn("b", "b", (1,) * 10, max_tokens=90), member("b", 1)
    )
    driver.step(block(1, 11, range(3, 18)))
    assert model.steps[-1] == {0: 1, 1: 1}
    assert driver.engine.load().preempted_count == 0


@pytest.mark.parametrize("cancelled", ["a", "b", "c"])
def test_cancelling_any_turn_of_a_crowd_lets_the_others_finish(cancelled: str) -> None:
    driver = Driver(ToyModel(), "off", block_count=4)
    driver.step(*(turn(name, name, (1, 2, 3) * 4, max_tokens=30) for name in "abc"))
    for _ in range(6):
        driver.step()
    driver.run(CancelTurn(cancelled))
    assert all(len(driver.output(name)) == 30 for name in set("abc") - {cancelled})
