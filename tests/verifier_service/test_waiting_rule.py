"""Who enters a step, and when it waits."""

from __future__ import annotations

from tests.verifier_service.driver import turn as turn_command
from verifier_service.events import StartTurn
from verifier_service.sequence import Member, Sequence, Turn, Wait
from verifier_service.waiting_rule import at_boundary, is_pending

WAIT_US = 50


def session(*, has_drafter: bool = True, join_expected: bool = False) -> Sequence:
    command: StartTurn = turn_command("s", "t")
    turn = Turn(command, 3, 11, 0, 0, None, Wait(join_expected), 0, reading=False)
    member = Member(1, "drafter", 15, 3) if has_drafter else None
    return Sequence("s", 0, [1, 2, 3], turn=turn, member=member)


def pending(sequence: Sequence, now_us: int) -> bool:
    assert sequence.turn is not None
    return is_pending(sequence, sequence.turn, now_us, WAIT_US)


def wait_of(sequence: Sequence) -> Wait:
    assert sequence.turn is not None
    return sequence.turn.wait


def test_a_session_without_a_drafter_is_bare() -> None:
    assert not pending(session(has_drafter=False), 0)


def test_a_wait_lasts_from_the_first_boundary_to_its_deadline() -> None:
    waiting = session()
    assert pending(waiting, 100)
    assert pending(waiting, 149)
    assert not pending(waiting, 150)


def test_after_one_wait_in_vain_nobody_waits_until_something_arrives() -> None:
    waiting = session()
    assert pending(waiting, 0)
    assert not pending(waiting, 50)
    assert not pending(waiting, 51)
    wait_of(waiting).renew()
    assert pending(waiting, 52)


def test_a_join_is_awaited_once() -> None:
    joining = session(has_drafter=False, join_expected=True)
    assert pending(joining, 0)
    assert not pending(joining, 50)
    assert not pending(joining, 51)


def test_without_pending_sessions_a_step_starts_at_once() -> None:
    able = [session(), session()]
    assert at_boundary(able, [], overdue=False, prompts_to_read=False).entering == able


def test_a_step_starts_when_half_of_the_sessions_can_enter() -> None:
    able, late = [session()], session()
    assert pending(late, 0)
    boundary = at_boundary(able, [late], overdue=False, prompts_to_read=False)
    assert boundary.entering == able
    assert wait_of(late).skipped


def test_a_step_that_fewer_than_half_could_enter_waits_for_the_earliest_deadline() -> None:
    first, second = session(), session()
    assert pending(first, 0)
    assert pending(second, 20)
    boundary = at_boundary([session()], [second, first], overdue=False, prompts_to_read=False)
    assert (boundary.entering, boundary.due_us) == ([], 50)
    assert not wait_of(first).skipped


def test_the_end_of_a_wait_starts_the_step_that_waited() -> None:
    given_up, other, another = session(), session(), session()
    assert pending(other, 0)
    assert pending(another, 0)
    assert at_boundary([given_up], [other, another], overdue=True, prompts_to_read=False).entering == [
        given_up
    ]


def test_reading_a_prompt_never_waits() -> None:
    late = session()
    assert pending(late, 0)
    boundary = at_boundary([], [late], overdue=False, prompts_to_read=True)
    assert (boundary.entering, boundary.due_us) == ([], None)


def test_a_session_that_was_skipped_enters_the_next_step_without_its_block() -> None:
    able, late = [session()], session()
    assert pending(late, 0)
    at_boundary(able, [late], overdue=False, prompts_to_read=False)
    assert pending(late, 10)
    assert at_boundary(able, [late], overdue=False, prompts_to_read=False).entering == [*able, late]
    wait_of(late).skipped = False  # as its commit does
    assert pending(late, WAIT_US - 1), "it may be waited for again, as long as its one wait lasts"
    assert not pending(late, WAIT_US)


def test_two_cohorts_take_turns() -> None:
    """While one session's block is checked the other's is drafted: each step serves one, and neither loses its block."""
    first, second = session(), session()
    for now_us in range(0, 40, 10):
        assert pending(second, now_us)
        assert at_boundary([first], [second], overdue=False, prompts_to_read=False).entering == [first]
        wait_of(first).deadline_us, wait_of(first).skipped = None, False  # it has committed
        assert pending(first, now_us + 1)
        assert at_boundary([], [first, second], overdue=False, prompts_to_read=False).entering == []
        first, second = second, first  # the other's block arrives
