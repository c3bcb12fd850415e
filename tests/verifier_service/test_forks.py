"""A fork has its source's tokens and a life of its own."""

from __future__ import annotations

import pytest

from sparkrelay.outcomes import Reason
from sparkrelay.protocol import chain_hash
from tests.verifier_service.driver import Driver, member, of, turn
from tests.verifier_service.plain_decoder import decode
from verifier_service.events import (
    Event,
    ForkRefused,
    ForkSession,
    MemberContext,
    SessionForked,
    StartTurn,
    TurnAccepted,
    TurnOver,
    TurnRefused,
)
from verifier_service.models.toy import SnapshotToyModel, ToyModel

PROMPT = tuple(1 + i * i % 61 for i in range(40))
LIMIT = 4096


def after(session_id: str, turn_id: str, ids: list[int], **asked: int) -> StartTurn:
    """A turn that keeps all these tokens of the session and adds two."""
    return turn(session_id, turn_id, (8, 9), keep_len=len(ids), keep_hash=chain_hash(ids), **asked)  # type: ignore[arg-type]


def started(driver: Driver) -> list[int]:
    """Runs a first turn in session s; its tokens."""
    driver.run(turn("s", "t", PROMPT, max_tokens=10))
    return [*PROMPT, *driver.output("t")]


def test_both_go_on_as_if_alone() -> None:
    driver = Driver()
    ids = started(driver)
    assert driver.step(ForkSession("s", "fork", 50)) == [SessionForked("s", "fork", 50, 49)]
    one, other = after("s", "one", ids, max_tokens=20), after("fork", "other", ids, max_tokens=25)
    accepted = of(driver.run(one, other), TurnAccepted)
    assert [event.cached_token_count for event in accepted] == [49, 49]
    for command in (one, other):
        assert driver.output(command.turn_id) == decode(ToyModel(), [*ids, 8, 9], command, LIMIT)


@pytest.mark.parametrize("at_len", [1, 17, 44])
def test_a_fork_may_begin_anywhere(at_len: int) -> None:
    driver = Driver()
    ids = started(driver)[:at_len]
    assert driver.step(ForkSession("s", "fork", at_len)) == [SessionForked("s", "fork", at_len, at_len - 1)]
    command = after("fork", "other", ids)
    driver.run(command)
    assert driver.output("other") == decode(ToyModel(), [*ids, 8, 9], command, LIMIT)


def test_a_session_is_forked_while_its_turn_runs() -> None:
    driver = Driver()
    driver.step(turn("s", "t", PROMPT, max_tokens=40))
    driver.step()
    [forked] = of(driver.step(ForkSession("s", "fork", 41)), SessionForked)
    assert (forked.token_count, forked.state_len) == (41, 40)
    driver.run()
    ids = [*PROMPT, driver.output("t")[0]]
    command = after("fork", "other", ids, max_tokens=20)
    driver.run(command)
    assert driver.output("other") == decode(ToyModel(), [*ids, 8, 9], command, LIMIT)
    assert len(driver.output("t")) == 40


def test_without_free_room_a_fork_has_the_tokens_and_takes_nobody_s_state() -> None:
    driver = Driver(block_count=7)
    ids = started(driver)
    assert driver.step(ForkSession("s", "fork", 50)) == [SessionForked("s", "fork", 50, 0)]
    load = driver.engine.load()
    assert (load.used_block_count, load.evicted_count) == (4, 0)
    command = after("fork", "other", ids)
    driver.run(command)
    assert driver.output("other") == decode(ToyModel(), [*ids, 8, 9], command, LIMIT)


def test_a_model_that_can_begin_only_at_snapshots_copies_up_to_one() -> None:
    driver = Driver(SnapshotToyModel())
    ids = started(driver)[:30]
    assert driver.step(ForkSession("s", "fork", 30)) == [SessionForked("s", "fork", 30, 24)]
    command = after("fork", "other", ids)
    driver.run(command)
    assert driver.output("other") == decode(ToyModel(), [*ids, 8, 9], command, LIMIT)


def test_a_fork_has_no_member_until_one_joins_it() -> None:
    driver = Driver()
    ids = started(driver)
    driver.step(member("s", 1), ForkSession("s", "fork", 50))
    assert driver.engine.load().member_count == 1
    events = driver.run(member("fork", 2), after("fork", "other", ids))
    [context] = of(events, MemberContext)
    assert context == MemberContext(2, 0, (*ids, 8, 9))


def test_a_fork_belongs_to_its_source_s_tenant() -> None:
    driver = Driver()
    driver.run(turn("s", "t", PROMPT, tenant_salt=b"one"))
    driver.step(ForkSession("s", "fork", 40))
    keep_hash = chain_hash(PROMPT)
    stranger = turn("fork", "a", (8,), keep_len=40, keep_hash=keep_hash, tenant_salt=b"two")
    assert of(driver.run(stranger), TurnRefused)[0].reason == Reason.SESSION_NOT_FOUND
    owner = turn("fork", "b", (8,), keep_len=40, keep_hash=keep_hash, tenant_salt=b"one")
    assert of(driver.run(owner), TurnOver)[0].cached_token_count == 39


def test_the_source_is_not_forgotten_for_its_fork() -> None:
    driver = Driver(max_sessions=2)
    driver.run(turn("s", "1"))
    driver.run(turn("other", "2"))
    driver.step(ForkSession("s", "fork", 3))
    [refused] = of(driver.step(after("other", "3", [1, 2, 3])), TurnRefused)
    assert refused.reason == Reason.SESSION_NOT_FOUND, "the idle one that was used later had to go"


REFUSALS: list[tuple[ForkSession, Reason, str, int]] = [
    (ForkSession("nobody", "fork", 3), Reason.SESSION_NOT_FOUND, "session_id", 0),
    (ForkSession("s", "other", 3), Reason.SESSION_EXISTS, "fork_session_id", 0),
    (ForkSession("s", "s", 3), Reason.SESSION_EXISTS, "fork_session_id", 0),
    (ForkSession("s", "fork", 0), Reason.INVALID_FIELD, "token_count", 0),
    (ForkSession("s", "fork", 12), Reason.INVALID_FIELD, "token_count", 0),
    (ForkSession("s", "fork", 3, chain_hash((1, 2, 4))), Reason.PREFIX_MISMATCH, "token_hash", 0),
    (ForkSession("s", "fork", 3, b""), Reason.PREFIX_MISMATCH, "token_hash", 0),
    (ForkSession("s", "fork", 3), Reason.OVERLOADED, "", 700),
]


@pytest.mark.parametrize(("command", "reason", "field", "retry_after_ms"), REFUSALS)
def test_what_cannot_be_forked_is_refused_by_name(
    command: ForkSession, reason: Reason, field: str, retry_after_ms: int
) -> None:
    driver = Driver(max_sessions=2, retry_after_ms=700)
    driver.run(turn("s", "t"))
    driver.step(turn("other", "runs", max_tokens=100))
    [refused] = of(driver.step(command), ForkRefused)
    assert (refused.session_id, refused.new_session_id) == (command.session_id, command.new_session_id)
    assert (refused.reason, refused.field, refused.retry_after_ms) == (reason, field, retry_after_ms)
    assert refused.message


def test_forking_says_the_same_every_time() -> None:
    def story() -> list[Event]:
        driver = Driver()
        ids = started(driver)
        driver.run(ForkSession("s", "f", 20), ForkSession("f", "g", 10), after("g", "u", ids[:10]))
        return driver.events

    assert story() == story()
