"""Turns: what is refused, what is kept, what is told in which order, why they end."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sparkrelay.device.logprobs import logprobs_row
from sparkrelay.outcomes import FinishReason, Reason
from sparkrelay.protocol import chain_hash
from sparkrelay.sampling import Sampling
from tests.verifier_service.driver import Driver, member, of, turn
from tests.verifier_service.plain_decoder import decode
from verifier_service.engine import EngineSettings
from verifier_service.events import (
    CancelTurn,
    Committed,
    EndSession,
    StartTurn,
    TurnAccepted,
    TurnOver,
    TurnRefused,
)
from verifier_service.models import FloatRows
from verifier_service.models.toy import FreeToyModel, SnapshotToyModel, ToyModel
from verifier_service.ragged_batch import RaggedBatch, Segment


def refusal(driver: Driver, command: StartTurn) -> TurnRefused:
    [event] = of(driver.step(command), TurnRefused)
    assert event.turn_id == command.turn_id
    return event


def test_a_turn_is_accepted_then_commits_then_is_over() -> None:
    driver = Driver()
    command = turn("s", "t", max_tokens=5)
    events = driver.run(command)
    assert [type(event) for event in events] == [TurnAccepted, *[Committed] * 5, TurnOver]
    assert driver.output("t") == decode(ToyModel(), [1, 2, 3], command, 100)
    assert events[-1] == TurnOver("t", FinishReason.LENGTH, 3, 0, 5, 8)


def test_the_token_that_ends_the_reading_is_no_round_and_rounds_count_from_0() -> None:
    driver = Driver()
    driver.run(turn("s", "t", max_tokens=4))
    commits = of(driver.events, Committed)
    assert [commit.round and commit.round.number for commit in commits] == [None, 0, 1, 2]
    assert [commit.start for commit in commits] == [3, 4, 5, 6]


def test_a_turn_ends_after_its_stop_id_which_is_committed() -> None:
    driver = Driver()
    plain = decode(ToyModel(), [1, 2, 3], turn("s", "t", max_tokens=30), 100)
    stop = plain[7]
    events = driver.run(turn("s", "t", max_tokens=30, stop_ids=frozenset({stop})))
    assert driver.output("t") == plain[: plain.index(stop) + 1]
    assert of(events, TurnOver)[0].finish_reason == FinishReason.STOP


def test_the_context_limit_ends_a_turn() -> None:
    driver = Driver(context_limit=10)
    assert of(driver.run(turn("s", "t", max_tokens=30)), TurnOver)[0].finish_reason == FinishReason.CONTEXT
    assert len(driver.output("t")) == 7


def test_memory_that_is_smaller_than_the_context_limit_ends_a_turn_too() -> None:
    driver = Driver(block_count=1)
    assert of(driver.run(turn("s", "t", max_tokens=30)), TurnOver)[0].finish_reason == FinishReason.CONTEXT
    assert len(driver.output("t")) == 16 - 3


def test_the_next_turn_keeps_what_it_names_and_reads_only_the_rest() -> None:
    driver = Driver()
    driver.run(turn("s", "first", max_tokens=6))
    ids = [1, 2, 3, *driver.output("first")]
    keep_hash = chain_hash(ids[:5])
    command = turn("s", "second", (9, 9), keep_len=5, keep_hash=keep_hash)
    [accepted] = of(driver.run(command), TurnAccepted)
    assert (accepted.prompt_token_count, accepted.cached_token_count) == (7, 5)
    assert driver.output("second") == decode(ToyModel(), [*ids[:5], 9, 9], command, 100)


def test_three_turns_that_drop_earlier_reasoning_equal_the_one_shot_prompt_of_the_same_ids() -> None:
    """As a template does that renders an answer without its reasoning: each turn rewinds to before the last reasoning."""
    driver = Driver()
    prompt, ids = [1, 2, 3, 4, 5], list[int]()
    for name in ("first", "second", "third"):
        keep_len = next((i for i, pair in enumerate(zip(ids, prompt, strict=False)) if pair[0] != pair[1]), 0)
        command = turn(
            "s",
            name,
            prompt[keep_len:],
            keep_len=keep_len,
            keep_hash=chain_hash(ids[:keep_len]),
            max_tokens=20,
        )
        [over] = of(driver.run(command), TurnOver)
        ids = prompt + driver.output(name)
        assert over.session_token_count == len(ids)
        one_shot = Driver()
        one_shot.run(turn("new", name, prompt, max_tokens=20))
        assert driver.output(name) == one_shot.output(name)
        prompt = prompt + driver.output(name)[12:] + [9, 8, 7]


def test_a_turn_that_appends_nothing_reads_its_anchor_again() -> None:
    driver = Driver()
    driver.run(turn("s", "first", max_tokens=6))
    ids = [1, 2, 3, *driver.output("first")]
    command = turn("s", "second", (), keep_len=4, keep_hash=chain_hash(ids[:4]), output_start=4)
    [accepted] = of(driver.run(command), TurnAccepted)
    assert accepted.cached_token_count == 3
    assert driver.output("second") == decode(ToyModel(), ids[:4], command, 100)


def test_a_model_that_cannot_go_back_exactly_reads_again_from_where_it_could() -> None:
    driver = Driver(SnapshotToyModel())
    driver.run(turn("s", "first", tuple(range(1, 21)), max_tokens=2))
    ids = [*range(1, 21), *driver.output("first")]
    command = turn("s", "second", (7,), keep_len=15, keep_hash=chain_hash(ids[:15]))
    [accepted] = of(driver.run(command), TurnAccepted)
    assert accepted.cached_token_count == 8
    assert driver.output("second") == decode(ToyModel(), [*ids[:15], 7], command, 100)


def test_a_replayed_turn_goes_on_where_its_output_was() -> None:
    """output_start lies below the tokens that are sent: penalties, min_tokens, max_tokens and usage count from there."""
    sampling = Sampling(frequency_penalty=1.0, presence_penalty=0.5, temperature=0.9, min_tokens=9, seed=5)
    stop_ids = frozenset(range(0, 64, 3))
    whole, replay = Driver(), Driver()
    whole.run(turn("s", "t", max_tokens=12, sampling=sampling, stop_ids=stop_ids))
    output = whole.output("t")
    replayed = turn(
        "s", "t", (1, 2, 3, *output[:4]), output_start=3, max_tokens=12, sampling=sampling, stop_ids=stop_ids
    )
    events = replay.run(replayed)
    assert replay.output("t") == output[4:]
    assert of(events, TurnOver)[0].output_token_count == len(output)
    assert of(events, TurnAccepted)[0].prompt_token_count == 3


@pytest.mark.parametrize(
    ("command", "reason", "field"),
    [
        (turn("new", "t", keep_len=2), Reason.SESSION_NOT_FOUND, "session_id"),
        (turn("busy", "t"), Reason.SESSION_BUSY, "session_id"),
        (turn("other", "running"), Reason.SESSION_BUSY, "turn_id"),
        (turn("idle", "t", keep_len=3, keep_hash=b"of other tokens."), Reason.PREFIX_MISMATCH, "keep_hash"),
        (turn("idle", "t", keep_len=99, keep_hash=b"of other tokens."), Reason.PREFIX_MISMATCH, "keep_hash"),
        (turn("idle", "t", ()), Reason.INVALID_FIELD, "append_token_ids"),
        (turn("idle", "t", output_start=4), Reason.INVALID_FIELD, "output_start"),
        (turn("idle", "t", max_tokens=0), Reason.INVALID_FIELD, "stop.max_token_count"),
        (turn("idle", "t", output_start=1, max_tokens=2), Reason.INVALID_FIELD, "stop.max_token_count"),
        (turn("idle", "t", (1,) * 100), Reason.CONTEXT_EXCEEDED, "append_token_ids"),
        (turn("idle", "t", (1,) * 64), Reason.OUT_OF_MEMORY, "append_token_ids"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(command: StartTurn, reason: Reason, field: str) -> None:
    driver = Driver(block_count=4, context_limit=100)
    driver.run(turn("idle", "before"))
    driver.step(turn("busy", "running", max_tokens=40))
    event = refusal(driver, command)
    assert (event.reason, event.field, event.retry_after_ms) == (reason, field, 0)
    assert event.message
    driver.run()
    assert len(driver.output("running")) == 40


def test_more_turns_than_may_wait_are_refused_with_a_time_to_come_back() -> None:
    driver = Driver(block_count=2, max_queued_turns=1, retry_after_ms=700)
    driver.step(turn("a", "a", (1,) * 17), turn("b", "b", (2,) * 17))
    event = refusal(driver, turn("c", "c"))
    assert (event.reason, event.retry_after_ms) == (Reason.OVERLOADED, 700)
    driver.run()
    assert [over.turn_id for over in of(driver.events, TurnOver)] == ["a", "b"]


def test_the_longest_idle_session_makes_room_for_a_new_one() -> None:
    driver = Driver(max_sessions=2)
    driver.run(turn("a", "1"))
    driver.run(turn("b", "2"))
    driver.run(turn("a", "3"))
    driver.run(turn("c", "4"))
    assert refusal(driver, turn("b", "5", keep_len=3)).reason == Reason.SESSION_NOT_FOUND
    assert driver.engine.load().session_count == 2


def test_a_new_session_is_refused_while_all_have_turns() -> None:
    driver = Driver(max_sessions=1)
    driver.step(turn("a", "1"))
    assert refusal(driver, turn("b", "2")).reason == Reason.OVERLOADED


def test_a_cancelled_turn_ends_and_its_tokens_stay() -> None:
    driver = Driver()
    driver.step(turn("s", "t", max_tokens=100))
    driver.step()
    events = driver.step(CancelTurn("t"))
    assert events == [TurnOver("t", FinishReason.CANCELLED, 3, 0, 2, 5)]
    assert driver.step(CancelTurn("t")) == []
    ids = [1, 2, 3, *driver.output("t")]
    [accepted] = of(driver.run(turn("s", "u", (4,), keep_len=5, keep_hash=chain_hash(ids))), TurnAccepted)
    assert accepted.cached_token_count == 4


def test_a_turn_cancelled_while_it_waits_for_room_leaves_the_session_as_it_was() -> None:
    driver = Driver(block_count=2)
    driver.run(turn("b", "before", max_tokens=1))
    driver.step(turn("a", "a", (1,) * 17, max_tokens=3))
    driver.step(turn("b", "b", (2,) * 17))
    [refused] = of(driver.step(CancelTurn("b")), TurnRefused)
    assert refused.reason == Reason.CANCELLED
    ids = [1, 2, 3, *driver.output("before")]
    driver.run(turn("b", "after", (4,), keep_len=4, keep_hash=chain_hash(ids)))
    assert len(driver.output("after")) == 8


def test_ending_a_session_ends_its_turn_and_frees_its_room() -> None:
    driver = Driver()
    driver.step(turn("s", "t", max_tokens=100))
    assert of(driver.step(EndSession("s")), TurnOver)[0].finish_reason == FinishReason.CANCELLED
    load = driver.engine.load()
    assert (load.session_count, load.used_block_count) == (0, 0)
    assert driver.step(EndSession("s")) == []


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    """Each token's row is computed again alone; filters and noise are on, and must not show."""
    driver = Driver()
    driver.run(
        turn("s", "t", max_tokens=6, sampling=Sampling(temperature=1.5, top_k=5, seed=3), logprob_count=3)
    )
    ids = [1, 2, 3, *driver.output("t")]
    model = ToyModel()
    model.open(0)
    model.resize(0, range(8))
    rows = model.forward(RaggedBatch.of([Segment(0, 0, ids[:-1], 6)]))
    said = [logprob for commit in of(driver.events, Committed) for logprob in commit.logprobs]
    for row, logprob, token_id in zip(rows, said, ids[3:], strict=True):
        expected = logprobs_row(row, token_id, 3)
        assert (logprob.token_id, logprob.logprob, logprob.top) == (token_id, expected.chosen, expected.top)


class BrokenModel(FreeToyModel):
    """Counts, until it has to say what comes after 9."""

    def forward(self, batch: RaggedBatch) -> FloatRows:
        rows = super().forward(batch)
        rows[batch.token_ids[batch.logit_rows] == 9] = np.nan
        return rows


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.01, seed=1)])
def test_a_row_without_a_best_token_ends_its_turn_and_no_other(sampling: Sampling) -> None:
    driver = Driver(BrokenModel())
    driver.run(
        turn("s", "bad", (6, 7), sampling=sampling), member("s", 1), turn("r", "good", (1,), max_tokens=4)
    )
    assert driver.output("bad") == [8, 9]
    assert driver.output("good") == [2, 3, 4, 5]
    [refused] = of(driver.events, TurnRefused)
    assert (refused.turn_id, refused.reason) == ("bad", Reason.INTERNAL)
    assert "logits" in refused.message


def test_the_load_counts_what_is_under_way() -> None:
    driver = Driver(block_count=2)
    driver.step(turn("a", "a", (1,) * 17), turn("b", "b", (2,) * 17), member("a", 1))
    load = driver.engine.load()
    assert (load.active_turn_count, load.queued_turn_count, load.session_count, load.member_count) == (
        1,
        1,
        2,
        1,
    )
    assert (load.used_block_count, load.block_count, load.step_count, load.committed_token_count) == (
        2,
        2,
        1,
        1,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_count", 0), ("block_wait_us", -1), ("step_token_budget", 15), ("context_limit", -1)],
)
def test_settings_that_cannot_work_are_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}: is {value}"):
        dataclasses.replace(EngineSettings(block_count=1), **{field: value})
