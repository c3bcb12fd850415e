"""Sessions: what a turn keeps, who may run, who goes first when there is no room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sessions import Binding, Session, SessionTable, common_prefix_len
from sparkrelay.outcomes import Reason, Refusal

IDS = st.lists(st.integers(0, 2), max_size=30)
HOME = Binding("127.0.0.1:1", "verifier", "epoch-1")


def table(limit: int = 3, idle_limit_us: int = 1000) -> SessionTable:
    return SessionTable(limit, idle_limit_us)


def opened(sessions: SessionTable, session_id: str, now_us: int = 0) -> Session:
    return sessions.open(session_id, "model", now_us=now_us, create_time_s=0.0)[0]


@given(IDS, IDS)
def test_the_common_prefix_is_that_of_a_loop(left: list[int], right: list[int]) -> None:
    expected = 0
    while expected < min(len(left), len(right)) and left[expected] == right[expected]:
        expected += 1
    assert common_prefix_len(left, right) == expected


@given(st.lists(st.tuples(IDS.filter(bool), IDS), min_size=1, max_size=5))
def test_what_is_kept_and_appended_is_the_conversation_turn_after_turn(
    turns: list[tuple[list[int], list[int]]],
) -> None:
    session = opened(table(), "s")
    at_the_verifier: list[int] = []
    for wanted, output in turns:
        plan = session.plan_turn(tuple(wanted), HOME)
        assert at_the_verifier[: plan.keep_len] == wanted[: plan.keep_len]
        at_the_verifier = at_the_verifier[: plan.keep_len] + list(plan.append_ids)
        assert at_the_verifier == wanted
        assert plan.keep_len + len(plan.append_ids) > 0
        session.turn_accepted(wanted)
        session.committed(output)
        at_the_verifier += output
        assert session.tokens == at_the_verifier


def test_a_conversation_that_is_a_prefix_of_the_tokens_appends_nothing() -> None:
    session = opened(table(), "s")
    session.plan_turn((1, 2, 3, 4), HOME)
    session.turn_accepted((1, 2, 3, 4))
    plan = session.plan_turn((1, 2, 3), HOME)
    assert (plan.keep_len, plan.append_ids) == (3, ())


def test_a_turn_that_was_never_accepted_counts_only_on_what_is_common() -> None:
    session = opened(table(), "s")
    session.plan_turn((1, 2, 3), HOME)
    session.turn_accepted((1, 2, 3))
    session.plan_turn((1, 9, 9), HOME)
    assert session.tokens == [1]


def test_another_incarnation_of_the_verifier_keeps_nothing() -> None:
    session = opened(table(), "s")
    session.plan_turn((1, 2, 3), HOME)
    session.turn_accepted((1, 2, 3))
    plan = session.plan_turn((1, 2, 3, 4), Binding(HOME.address, HOME.verifier_id, "epoch-2"))
    assert plan.keep_len == 0


def test_a_lost_verifier_takes_along_only_what_it_held() -> None:
    sessions = table()
    here, elsewhere = opened(sessions, "here"), opened(sessions, "elsewhere")
    other = Binding("127.0.0.1:2", "other", "epoch-1")
    for session, home in ((here, HOME), (elsewhere, other)):
        session.plan_turn((1, 2), home)
        session.turn_accepted((1, 2))
    sessions.verifier_lost(HOME.address, HOME.epoch)
    assert (here.tokens, here.binding) == ([], None)
    assert (elsewhere.tokens, elsewhere.binding) == ([1, 2], other)


def test_a_session_runs_one_turn_at_a_time() -> None:
    sessions = table()
    opened(sessions, "s")
    session = sessions.begin_turn("s", "turn-1", 0)
    with pytest.raises(Refusal, match="turn-1 under way") as refused:
        sessions.begin_turn("s", "turn-2", 0)
    assert refused.value.reason is Reason.SESSION_BUSY
    sessions.end_turn(session, 1)
    assert sessions.begin_turn("s", "turn-2", 2).turn_count == 2


def test_without_room_the_longest_unused_idle_session_goes() -> None:
    sessions = table(limit=3)
    for session_id in "abc":
        opened(sessions, session_id)
    sessions.begin_turn("a", "turn", 1)
    sessions.end_turn(sessions.begin_turn("b", "turn", 2), 3)
    _, ended = sessions.open("d", "model", now_us=4, create_time_s=0.0)
    assert [session.session_id for session in ended] == ["c"]
    assert len(sessions) == 3


def test_when_all_sessions_are_busy_a_new_one_is_refused() -> None:
    sessions = table(limit=1)
    opened(sessions, "a")
    sessions.begin_turn("a", "turn", 0)
    with pytest.raises(Refusal) as refused:
        opened(sessions, "b")
    assert refused.value.reason is Reason.OVERLOADED


def test_idle_sessions_expire_and_busy_ones_do_not() -> None:
    sessions = table(idle_limit_us=1000)
    opened(sessions, "idle")
    opened(sessions, "busy")
    sessions.begin_turn("busy", "turn", 0)
    assert sessions.expire(1000) == []
    assert [session.session_id for session in sessions.expire(1001)] == ["idle"]
    with pytest.raises(Refusal) as refused:
        sessions.get("idle")
    assert refused.value.reason is Reason.SESSION_NOT_FOUND


def test_pages_list_every_session_once_newest_first() -> None:
    sessions = table(limit=10)
    for session_id in "abcdefg":
        opened(sessions, session_id)
    listed, token = [], ""
    while True:
        page, token = sessions.page(3, token)
        listed += [session.session_id for session in page]
        if not token:
            break
    assert listed == list("gfedcba")


@pytest.mark.parametrize(
    ("size", "token", "field"), [(-1, "", "page_size"), (1001, "", "page_size"), (1, "x", "page_token")]
)
def test_a_bad_page_is_refused_by_its_field(size: int, token: str, field: str) -> None:
    with pytest.raises(Refusal) as refused:
        table().page(size, token)
    assert refused.value.violations[0].field == field
