"""Drafters: what they are told, what becomes of their blocks, and what the wait for them costs."""

from __future__ import annotations

import pytest

from sparkrelay.frames import NO_TOKEN, PREFILL_ROUND
from sparkrelay.outcomes import BlockState, FinishReason, Reason
from sparkrelay.protocol import chain_hash
from tests.verifier_service.driver import Driver, block, member, of, turn, verdicts
from verifier_service.events import (
    BlockDropped,
    CancelTurn,
    Committed,
    DrafterUnavailable,
    EndSession,
    MemberAdded,
    MemberContext,
    MemberRemoved,
    MemberRewound,
    MemberTurnEnded,
    MemberTurnStarted,
    MemberVerdict,
    RemoveMember,
    TurnAccepted,
    TurnOver,
)
from verifier_service.models.toy import FreeToyModel

WAIT_US = 50_000


def counting(policy: str = "auto", **settings: int) -> Driver:
    """The target counts 1, 2, 3, ...: right drafts are easy to write down."""
    return Driver(FreeToyModel(vocab_size=100), policy, **settings)


def drafted_by(driver: Driver, member_id: int = 1, session_id: str = "s", **kwargs: object) -> None:
    """A session whose prompt is read, with a drafter that owes a block: tokens 1, 2, 3 and 4 are committed."""
    driver.step(turn(session_id, f"turn-{session_id}", **kwargs), member(session_id, member_id))  # type: ignore[arg-type]


def test_a_member_is_told_of_the_turn_then_what_it_lacks_then_every_commit_then_the_end() -> None:
    driver = counting("off")
    events = driver.run(turn("s", "t", max_tokens=2), member("s", 1))
    told = [event for event in events if isinstance(event, MemberVerdict) or hasattr(event, "member_id")]
    assert [type(event) for event in told] == [
        MemberAdded,
        MemberTurnStarted,
        MemberContext,
        MemberVerdict,
        MemberVerdict,
        MemberTurnEnded,
    ]
    assert told[1].base_len == 3 and told[1].remaining_count == 2
    assert (told[2].start, told[2].token_ids) == (0, (1, 2, 3))
    assert [(v.round, v.base_len, v.next_token_id) for v in verdicts(events)] == [
        (PREFILL_ROUND, 3, 4),
        (0, 4, 5),
    ]
    assert told[-1].finish_reason == FinishReason.LENGTH


def test_the_callers_events_come_before_the_members_of_the_same_commit() -> None:
    driver = counting("off")
    events = driver.run(turn("s", "t", max_tokens=1), member("s", 1))
    kinds = [type(event) for event in events]
    assert kinds.index(TurnAccepted) < kinds.index(MemberTurnStarted) < kinds.index(MemberContext)
    assert (
        kinds.index(Committed)
        < kinds.index(MemberVerdict)
        < kinds.index(TurnOver)
        < kinds.index(MemberTurnEnded)
    )


def test_a_drafter_keeps_what_it_holds_only_if_it_is_the_sessions() -> None:
    driver = counting()
    driver.run(turn("s", "t", max_tokens=2))
    ids = [1, 2, 3, 4, 5]
    held = [
        (member("s", 1, tokens_held=4, held_hash=chain_hash(ids[:4])), 4),
        (member("s", 2, tokens_held=4, held_hash=chain_hash([1, 2, 3, 5])), 0),
        (member("s", 3, tokens_held=6, held_hash=chain_hash([*ids, 6])), 0),
        (member("s", 4), 0),
    ]
    for command, keep in held:
        assert of(driver.step(command), MemberAdded)[0].keep_tokens == keep


def test_a_rewind_reaches_the_member_before_the_turn_that_needs_it() -> None:
    driver = counting("off")
    driver.run(turn("s", "t", max_tokens=2), member("s", 1))
    events = driver.run(turn("s", "u", (9,), keep_len=2, keep_hash=chain_hash([1, 2]), max_tokens=1))
    told = [e for e in events if isinstance(e, MemberRewound | MemberTurnStarted | MemberContext)]
    assert [type(event) for event in told] == [MemberRewound, MemberTurnStarted, MemberContext]
    assert (told[0].length, told[1].base_len, told[2].start, told[2].token_ids) == (2, 3, 2, (9,))


def test_a_drafter_that_joins_while_a_turn_runs_is_told_where_it_stands() -> None:
    driver = counting("off")
    driver.step(turn("s", "t", max_tokens=20))
    driver.step()
    events = driver.step(member("s", 1))
    assert of(events, MemberTurnStarted)[0].base_len == 5
    assert of(events, MemberContext)[0].token_ids == (1, 2, 3, 4, 5)
    assert verdicts(events)[0].base_len == 5


def test_a_later_drafter_supersedes_the_earlier_one() -> None:
    driver = counting()
    drafted_by(driver)
    driver.step(block(1, 4, (5,)))
    events = driver.step(member("s", 2))
    assert [(e.member_id, e.reason) for e in of(events, MemberRemoved)] == [(1, Reason.SUPERSEDED)]
    assert of(events, MemberTurnStarted)[0].member_id == 2
    assert driver.step(block(1, 6, (7,)))[0] == BlockDropped(1, stale=False)


def test_a_drafter_cannot_join_a_session_that_is_not_there() -> None:
    [removed] = counting().step(member("s", 1))
    assert isinstance(removed, MemberRemoved) and removed.reason == Reason.SESSION_NOT_FOUND


def test_the_end_of_a_session_ends_its_membership() -> None:
    driver = counting()
    drafted_by(driver)
    events = driver.step(EndSession("s"))
    assert [type(event) for event in events] == [TurnOver, MemberTurnEnded, MemberRemoved]


# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_a_block_is_accepted_up_to_its_first_wrong_token() -> None:
    driver = counting("fixed:7", block_wait_us=WAIT_US)
    drafted_by(driver, max_tokens=50)
    [verdict] = verdicts(driver.step(block(1, 4, (5, 6, 9, 8))))
    assert verdict == MemberVerdict(1, 0, 4, 4, 4, 2, 7, 7)
    [commit] = driver.rounds("turn-s")
    done = commit.round
    assert done is not None and commit.token_ids == (5, 6, 7)
    assert (done.drafted_count, done.depth, done.accepted_count, done.block_state) == (
        4,
        4,
        2,
        BlockState.FRESH,
    )
    assert (done.draft_us, done.queue_us, done.drafter_id, done.confidences) == (
        5,
        6,
        "drafter-1",
        (0.9,) * 4,
    )
    assert (done.batch_row_count, done.batch_session_count) == (5, 1)


def test_a_whole_block_brings_one_token_more() -> None:
    driver = counting("fixed:7")
    drafted_by(driver, max_tokens=50)
    [verdict] = verdicts(driver.step(block(1, 4, (5, 6, 7))))
    assert (verdict.accepted_count, verdict.next_token_id) == (3, 8)


def test_a_block_is_cut_after_its_first_stop_id() -> None:
    driver = counting("fixed:7")
    drafted_by(driver, max_tokens=50, stop_ids=frozenset({6}))
    events = driver.step(block(1, 4, (5, 6, 7, 8)))
    [verdict] = verdicts(events)
    assert (verdict.depth, verdict.accepted_count, verdict.next_token_id, verdict.draft_budget) == (
        2,
        2,
        NO_TOKEN,
        0,
    )
    assert of(events, TurnOver)[0].finish_reason == FinishReason.STOP
    assert driver.output("turn-s") == [4, 5, 6]


def test_a_block_reaches_no_further_than_the_turn() -> None:
    driver = counting("fixed:7")
    drafted_by(driver, max_tokens=4)
    [verdict] = verdicts(driver.step(block(1, 4, (5, 6, 7, 8, 9))))
    assert (verdict.depth, verdict.accepted_count, verdict.next_token_id) == (2, 2, 7)


def test_the_requests_depth_overrides_the_policys() -> None:
    for policy, asked, depth in (("off", 3, 3), ("fixed:2", 4, 4), ("fixed:7", 0, 0), ("auto", None, 4)):
        driver = counting(policy)
        drafted_by(driver, max_tokens=50, fixed_depth=asked)
        assert of(driver.events, MemberTurnStarted)[0].draft_budget == depth
        assert verdicts(driver.step(block(1, 4, (5, 6, 7, 8, 9, 10))))[0].depth == depth


def test_what_has_begun_is_told_before_its_prompt_is_read_and_never_twice_in_a_row() -> None:
    driver = counting()
    begun = driver.step_once(turn("s", "t"), member("s", 1))
    assert of(begun, TurnAccepted) and of(begun, MemberTurnStarted) and of(begun, MemberContext)
    assert of(begun, Committed) == [] and driver.due_us == driver.now_us
    read = driver.step_once(turn("r", "u"), block(1, 3, (4, 5)))
    assert of(read, TurnAccepted) and driver.output("t"), "turns that keep coming hold up nobody"


def test_a_block_from_before_the_prompt_was_read_is_rebased() -> None:
    driver = counting("fixed:7")
    driver.step(turn("s", "t", max_tokens=50), member("s", 1), block(1, 3, (4, 5, 6)))
    [verdict] = verdicts(driver.step())
    assert verdict == MemberVerdict(1, 0, 4, 3, 2, 2, 7, 7)
    assert driver.rounds("t")[0].round.block_state == BlockState.REBASED  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "late",
    [(3, (9, 5, 6)), (3, (4,)), (99, (1,)), (-3, (1, 2, 3, 4, 5, 6, 7, 8)), (0, (1,)), (0, (1, 2, 3, 4, 5))],
)
def test_a_block_that_does_not_fit_is_dropped_and_counted(late: tuple[int, tuple[int, ...]]) -> None:
    driver = counting("fixed:7", block_wait_us=0)
    drafted_by(driver, max_tokens=50)
    assert driver.step(block(1, *late))[0] == BlockDropped(1, stale=True)
    done = driver.rounds("turn-s")[-1].round
    assert done is not None and (done.dropped_block_count, done.drafted_count) == (1, 0)


def test_blocks_between_turns_are_dropped() -> None:
    driver = counting()
    drafted_by(driver)
    driver.step(CancelTurn("turn-s"))
    assert driver.step(block(1, 4, (5,))) == [BlockDropped(1, stale=False)]


def test_a_block_that_overlapped_a_cancel_does_not_reach_the_next_turn() -> None:
    """Its base_len fits the new turn by chance; it says which turn it was drafted for."""
    driver = counting()
    drafted_by(driver)
    old = block(1, 4, (5, 6))._replace(turn_id="turn-s")
    events = driver.step(CancelTurn("turn-s"), turn("s", "new", (1, 2, 3, 4), max_tokens=20), old)
    assert BlockDropped(1, stale=False) in events
    assert all(verdict.block_base_len == 0 for verdict in verdicts(events))


# ---- waiting ----------------------------------------------------------------------------------------------------------


def test_the_engine_waits_for_a_block_and_no_longer_than_its_limit() -> None:
    driver = counting(block_wait_us=WAIT_US)
    drafted_by(driver, max_tokens=50)
    assert (driver.step(), driver.due_us) == ([], WAIT_US)
    driver.now_us = WAIT_US - 1
    assert driver.step() == []
    driver.now_us = WAIT_US
    assert verdicts(driver.step())[0].depth == 0
    assert driver.rounds("turn-s")[0].round.block_state == BlockState.LATE  # type: ignore[union-attr]


def test_a_silent_drafter_delays_its_session_once() -> None:
    driver = counting(block_wait_us=WAIT_US)
    drafted_by(driver, max_tokens=50)
    driver.run()
    assert len(driver.output("turn-s")) == 50
    assert driver.now_us == WAIT_US


def test_a_drafter_that_contradicts_what_was_committed_delays_its_session_once() -> None:
    driver = counting(block_wait_us=WAIT_US)
    drafted_by(driver, max_tokens=50)
    while driver.due_us is not None:
        driver.now_us = max(driver.now_us, driver.due_us)
        length = 3 + len(driver.output("turn-s"))
        driver.step(block(1, length - 1, (99, 99, 99)))
    assert len(driver.output("turn-s")) == 50
    assert driver.now_us == WAIT_US


def test_silent_drafters_do_not_delay_the_others_beyond_one_wait() -> None:
    """Three liars and one good drafter: after one wait the good one's sessions go at their own pace."""
    driver = counting("fixed:4", block_wait_us=WAIT_US)
    names = ("s", "liar-1", "liar-2", "liar-3")
    driver.step(
        *(turn(name, f"turn-{name}", max_tokens=41) for name in names),
        *(member(name, number) for number, name in enumerate(names, start=1)),
    )
    for _ in range(200):
        good = 3 + len(driver.output("turn-s"))
        if good == 3 + 41 or driver.due_us is None:
            break
        driver.now_us = max(driver.now_us, driver.due_us)
        driver.step(*[block(1, good, range(good + 1, good + 5))] if good > 3 else [])
    assert len(driver.output("turn-s")) == 41
    assert driver.now_us == WAIT_US


def test_a_block_that_arrives_late_but_right_makes_waiting_worthwhile_again() -> None:
    driver = counting("fixed:4", block_wait_us=WAIT_US)
    drafted_by(driver, max_tokens=50)
    driver.step()
    driver.now_us = WAIT_US
    driver.step()  # without it: 4 tokens and one more
    [verdict] = verdicts(driver.step(block(1, 4, (5, 6, 7))))
    assert (verdict.base_len, verdict.block_base_len, verdict.accepted_count) == (5, 4, 2)
    assert driver.step() == [], "it waits again"


def test_an_empty_block_ends_the_wait_of_its_round_alone() -> None:
    driver = counting("fixed:4", block_wait_us=WAIT_US)
    drafted_by(driver, max_tokens=50)
    assert driver.step() == []
    [verdict] = verdicts(driver.step(block(1, 4, ())))
    assert (verdict.base_len, verdict.block_base_len, verdict.depth) == (4, 0, 0)
    done = driver.rounds("turn-s")[-1].round
    assert done is not None and (done.block_state, done.drafted_count) == (BlockState.FRESH, 0)
    assert driver.step() == [], "the next block is awaited again"
    assert driver.now_us == 0


def test_an_empty_block_of_the_past_changes_nothing() -> None:
    driver = counting("fixed:4", block_wait_us=WAIT_US)
    drafted_by(driver, max_tokens=50)
    driver.run(block(1, 3, ()))
    assert len(driver.output("turn-s")) == 50
    assert driver.now_us == WAIT_US


def test_nobody_waits_for_a_drafter_that_left() -> None:
    driver = counting(block_wait_us=WAIT_US)
    drafted_by(driver, max_tokens=50)
    assert driver.step() == []
    assert of(driver.step(RemoveMember(1)), Committed)[0].round.block_state == BlockState.NO_DRAFTER  # type: ignore[union-attr]
    assert driver.step(RemoveMember(1)) != [], "an unknown membership is no error"


def test_an_invited_drafter_is_awaited_once_and_not_if_none_will_come() -> None:
    driver = counting(block_wait_us=WAIT_US)
    driver.step(turn("s", "t", max_tokens=20, expect_drafter=True))
    assert (driver.step(), driver.due_us) == ([], WAIT_US)
    assert of(driver.step(DrafterUnavailable("s", "t")), Committed)
    driver.run()
    assert driver.now_us == 0
    driver.run(turn("r", "waits", max_tokens=20, expect_drafter=True))
    assert (driver.now_us, len(driver.output("waits"))) == (WAIT_US, 20)


def test_a_drafter_that_is_unavailable_before_its_turn_opens_is_not_awaited() -> None:
    driver = counting(block_wait_us=WAIT_US, block_count=1)
    driver.step(turn("a", "a", max_tokens=3))
    driver.step(turn("b", "b", max_tokens=3, expect_drafter=True))
    driver.run(DrafterUnavailable("b", "b"))
    assert len(driver.output("b")) == 3
    assert driver.now_us == 0


def test_no_drafts_are_awaited_where_none_can_be_used() -> None:
    """Policy off, depth 0 asked for, or one token left."""
    for policy, asked, max_tokens in (("off", None, 9), ("auto", 0, 9), ("auto", None, 2)):
        driver = counting(policy, block_wait_us=WAIT_US)
        drafted_by(driver, max_tokens=max_tokens, fixed_depth=asked)
        driver.run()
        assert len(driver.output("turn-s")) == max_tokens
        assert driver.now_us == 0
        assert driver.rounds("turn-s")[-1].round.block_state == BlockState.NOT_ASKED  # type: ignore[union-attr]
