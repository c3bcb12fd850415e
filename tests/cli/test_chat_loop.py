"""A chat without a gateway: what is asked, what is remembered, and what an error or Ctrl-C leaves."""

from __future__ import annotations

from typing import Any

import pytest

from sparkrelay.cli.chat_lines import Interrupted
from sparkrelay.cli.chat_loop import BUSY_PAUSES_S, Chat
from sparkrelay.cli.conversation import Conversation, Message
from sparkrelay.client.errors import InvalidRequest, NotFound, SessionBusy, Unavailable
from tests.cli.chat_fakes import FakeClient, FakeStream, FakeView, typed


def chat(client: FakeClient, *lines: str | BaseException, by_hand: bool = True) -> tuple[Chat, FakeView, Any]:
    """The chat, its view and the pauses it makes."""
    view, pauses = FakeView(), []
    talk = Chat(
        client,  # type: ignore[arg-type]
        "tiny",
        Conversation(),
        view,
        typed(*lines),
        by_hand=by_hand,
        now=lambda: 0.0,
        pause=pauses.append,
    )
    return talk, view, pauses


def contents(request: tuple[str, dict[str, Any]]) -> list[str]:
    return [message["content"] for message in request[1]["messages"]]


def test_every_turn_sends_the_whole_conversation_in_one_session() -> None:
    client = FakeClient(FakeStream("Hello", " there"), FakeStream("Fine."))
    talk, view, _ = chat(client, "Hi", "  ", "How are you?")
    assert talk.run() == 0
    talk.end()
    assert [contents(each) for each in client.requests] == [["Hi"], ["Hi", "Hello there", "How are you?"]]
    assert {session for session, _ in client.requests} == {"session-1"} == set(client.ended)
    assert view.shown == "<Hello there><Fine.>"
    assert [each["role"] for each in talk.to_dict()["messages"]] == ["user", "assistant"] * 2
    assert len(talk.to_dict()["turns"]) == 2


def test_ctrl_c_stops_the_answer_keeps_its_part_and_not_the_program() -> None:
    stopped = FakeStream("Once upon", " a time", KeyboardInterrupt())
    client = FakeClient(stopped, FakeStream("The end."))
    talk, view, _ = chat(client, "Tell me a story", "Go on")
    assert talk.run() == 0
    assert stopped.cancelled and "[stopped]" in view.said
    assert contents(client.requests[1]) == ["Tell me a story", "Once upon a time", "Go on"]


def test_ctrl_c_before_the_first_word_takes_the_question_back() -> None:
    for nothing_yet in (FakeStream(KeyboardInterrupt()), KeyboardInterrupt()):
        client = FakeClient(nothing_yet, FakeStream("Yes."))
        talk, view, _ = chat(client, "one", "two")
        assert talk.run() == 0
        assert contents(client.requests[1]) == ["two"] and "[stopped]" in view.said


def test_in_a_pipe_ctrl_c_ends_the_program() -> None:
    talk, _, _ = chat(FakeClient(FakeStream("a", KeyboardInterrupt())), "one", by_hand=False)
    with pytest.raises(KeyboardInterrupt):
        talk.run()


def test_ctrl_c_at_the_prompt_warns_once_and_ends_the_second_time_in_a_row() -> None:
    talk, view, _ = chat(FakeClient(FakeStream("x")), Interrupted(), "hi", Interrupted(), Interrupted())
    assert talk.run() == 130
    assert sum("Ctrl-C again" in said for said in view.said) == 2


def test_a_refusal_takes_the_question_back_and_a_person_goes_on() -> None:
    refusal = InvalidRequest("temperature: is 7; send less", reason="INVALID_FIELD", turn_id="turn-9")
    client = FakeClient(refusal, FakeStream("Yes."))
    talk, view, _ = chat(client, "one", "two")
    assert talk.run() == 0
    assert "send less" in view.said[0] and "turn-9" in view.said[0]
    assert contents(client.requests[1]) == ["two"]


def test_a_refusal_ends_a_pipe_with_code_1() -> None:
    client = FakeClient(Unavailable("No gateway answers.", reason="UNSPECIFIED"), FakeStream("Yes."))
    talk, _, _ = chat(client, "one", "two", by_hand=False)
    assert talk.run() == 1
    assert len(client.requests) == 1


def test_an_answer_that_breaks_off_stays_as_far_as_it_came() -> None:
    lost = Unavailable("The verifier was lost.", reason="VERIFIER_LOST", turn_id="turn-9")
    client = FakeClient(FakeStream("Half an", lost), FakeStream("answer."))
    talk, view, _ = chat(client, "one", "go on")
    assert talk.run() == 0
    assert "VERIFIER_LOST" in view.said[0]
    assert contents(client.requests[1]) == ["one", "Half an", "go on"]


def test_a_forgotten_session_is_opened_anew_once() -> None:
    gone = NotFound("No session is open here.", reason="SESSION_NOT_FOUND")
    client = FakeClient(FakeStream("1"), gone, FakeStream("2"), gone, gone)
    talk, view, _ = chat(client, "one", "two", "three")
    assert talk.run() == 0
    assert [session for session, _ in client.requests[:3]] == ["session-1", "session-1", "session-2"]
    assert contents(client.requests[2]) == ["one", "1", "two"]
    assert len(client.requests) == 5 and "SESSION_NOT_FOUND" in view.said[-1]


def test_a_session_that_is_still_busy_is_waited_for_but_not_for_ever() -> None:
    busy = SessionBusy("has a turn under way", reason="SESSION_BUSY")
    client = FakeClient(busy, busy, FakeStream("ok"))
    talk, view, pauses = chat(client, "one")
    assert talk.run() == 0
    assert pauses == list(BUSY_PAUSES_S[:2]) and view.shown == "<ok>"
    client = FakeClient(*[busy] * (len(BUSY_PAUSES_S) + 1))
    talk, view, pauses = chat(client, "one")
    assert talk.run() == 0
    assert len(pauses) == len(BUSY_PAUSES_S) and "SESSION_BUSY" in view.said[0]


def test_commands_are_not_sent_and_do_what_they_say() -> None:
    client = FakeClient(FakeStream("a"), FakeStream("b"), FakeStream("c"))
    talk, view, _ = chat(
        client,
        "/rounds",
        "/session",
        "one",
        "/rounds",
        "/session",
        "/retry",
        "/reset",
        "two",
        "/quit",
        "three",
    )
    assert talk.run() == 0
    assert [contents(each) for each in client.requests] == [["one"], ["one"], ["two"]]
    assert [session for session, _ in client.requests] == ["session-1", "session-1", "session-2"]
    assert client.ended == ["session-1"]
    assert view.said[0] == "No answer is complete yet." and "No session is open" in view.said[1]
    assert "turn turn-1, seed 7" in view.said[2] and "fresh" in view.said[2]
    assert "session-1" in view.said[3]


def test_an_end_without_a_gateway_is_told_and_no_error() -> None:
    client = FakeClient(FakeStream("a"))
    talk, view, _ = chat(client, "one")
    talk.run()

    def fail(_session: str) -> None:
        raise Unavailable("No gateway answers.", reason="UNSPECIFIED")

    client.ended = type("Gone", (), {"append": staticmethod(fail)})()  # type: ignore[assignment]
    talk.end()
    talk.end()
    assert view.said == ["error: No gateway answers."]


def test_what_was_said_can_be_read_back() -> None:
    talk, _, _ = chat(FakeClient(FakeStream("a")), "one")
    talk.run()
    assert talk.conversation.messages == (Message("user", "one"), Message("assistant", "a"))
