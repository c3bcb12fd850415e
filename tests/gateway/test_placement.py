"""Placement: where a turn goes and whom it asks for drafts."""

from __future__ import annotations

import pytest

from gateway.placement import DrafterView, WorkerState, WorkerView, choose_drafters, place
from gateway.retries import Retries
from sparkrelay.outcomes import Reason, Refusal


def worker(port: int, **changes: object) -> WorkerView:
    values = {
        "address": f"h:{port}",
        "state": WorkerState.READY,
        "model": "m",
        "verifier_id": f"v{port}",
        "epoch": f"e{port}",
    }
    return WorkerView(**(values | changes))  # type: ignore[arg-type]


def drafter(name: str, sessions: int = 0, turnaround_us: int = 0, connected: bool = True) -> DrafterView:
    return DrafterView(name, connected, sessions, turnaround_us, "" if connected else "its stream broke")


def test_a_new_session_goes_to_the_least_loaded_verifier_of_its_model() -> None:
    workers = [worker(1, turn_count=5), worker(2, turn_count=2), worker(3, turn_count=0, model="other")]
    assert place(workers, "m").binding.address == "h:2"


def test_a_session_stays_with_the_incarnation_that_holds_its_state() -> None:
    workers = [worker(1, turn_count=5), worker(2)]
    assert place(workers, "m", pinned=workers[0].binding).binding.address == "h:1"
    restarted = [worker(1, turn_count=5, epoch="new"), worker(2)]
    assert place(restarted, "m", pinned=workers[0].binding).binding.address == "h:2"


def test_an_operators_drain_spares_the_sessions_there_but_leaving_does_not() -> None:
    drained = worker(1, state=WorkerState.DRAINING)
    assert place([drained, worker(2)], "m", pinned=drained.binding).binding.address == "h:1"
    assert place([drained, worker(2)], "m").binding.address == "h:2"
    leaving = worker(1, state=WorkerState.DRAINING, leaving=True)
    assert place([leaving, worker(2)], "m", pinned=leaving.binding).binding.address == "h:2"


def test_without_a_verifier_the_refusal_says_how_each_one_stands() -> None:
    workers = [worker(1, state=WorkerState.LOST, message="connection refused"), worker(2)]
    with pytest.raises(Refusal, match=r"h:1 lost \(connection refused\)") as refused:
        place(workers, "m", excluded=frozenset({"h:2"}))
    assert refused.value.reason is Reason.NO_VERIFIER


def test_the_least_loaded_drafter_is_asked_and_the_next_two_are_alternates() -> None:
    drafters = [
        drafter("a", 3),
        drafter("b", 1, 900),
        drafter("c", 1, 100),
        drafter("d", 9),
        drafter("e", 0, connected=False),
    ]
    assert choose_drafters(drafters) == ("c", "b", "a")


def test_a_warm_drafter_is_preferred_until_it_is_overloaded() -> None:
    assert choose_drafters([drafter("cold"), drafter("warm", 4)], "warm") == ("warm", "cold")
    assert choose_drafters([drafter("cold"), drafter("warm", 5)], "warm") == ("cold", "warm")
    assert choose_drafters([drafter("cold"), drafter("warm", connected=False)], "warm") == ("cold",)


def test_the_reason_for_no_drafter_is_always_given() -> None:
    assert "no drafter is connected to v1" in place([worker(1)], "m").no_drafter_reason
    away = worker(1, drafters=(drafter("d", connected=False),))
    assert place([away], "m").no_drafter_reason == "drafter d is away: its stream broke"
    there = worker(1, drafters=(drafter("d"),))
    assert "plain decoding" in place([there], "m", wants_drafter=False).no_drafter_reason
    assert place([there], "m").no_drafter_reason == ""


def test_a_turn_is_tried_on_two_verifiers_at_most() -> None:
    retries = Retries()
    lost = Refusal(Reason.VERIFIER_LOST, "gone")
    assert retries.pause_s(lost, "h:1", keep_len=0) == 0.0
    assert retries.excluded == {"h:1"}
    assert retries.pause_s(lost, "h:2", keep_len=0) is None


def test_everything_is_sent_again_once_when_the_verifier_has_forgotten() -> None:
    retries = Retries()
    forgotten = Refusal(Reason.PREFIX_MISMATCH, "other tokens")
    assert retries.pause_s(forgotten, "h:1", keep_len=5) == 0.0
    assert retries.pause_s(forgotten, "h:1", keep_len=5) is None
    assert Retries().pause_s(forgotten, "h:1", keep_len=0) is None


def test_a_session_that_is_still_busy_at_the_verifier_is_awaited_for_a_bounded_time() -> None:
    retries, pauses = Retries(), []
    while (pause_s := retries.pause_s(Refusal(Reason.SESSION_BUSY, "busy"), "h:1", keep_len=0)) is not None:
        pauses.append(pause_s)
    assert 1.0 < sum(pauses) < 2.0
    assert pauses == sorted(pauses)


def test_other_refusals_are_final() -> None:
    assert Retries().pause_s(Refusal(Reason.OUT_OF_MEMORY, "too big"), "h:1", keep_len=3) is None
