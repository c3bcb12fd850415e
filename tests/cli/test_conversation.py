"""What a chat remembers, and what its slash commands change."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.cli.conversation import (
    COMMANDS,
    AnswerOptions,
    Conversation,
    Effect,
    Message,
    carry_out,
    is_command,
    message_of,
)
from sparkrelay.client.requests import GenerateOptions, generate_request

talks = st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), max_size=4)
lines = st.one_of(
    st.text(max_size=20).map(lambda text: f"/{text}"),
    st.tuples(st.sampled_from(COMMANDS), st.text(max_size=12)).map(" ".join),
)


def conversation(talk: list[tuple[str, str]], options: AnswerOptions | None = None) -> Conversation:
    result = Conversation(options or AnswerOptions())
    for question, answer in talk:
        result = result.asked(question).answered(answer)
    return result


@given(talks, st.text(min_size=1), st.text(min_size=1))
def test_undo_takes_back_the_last_question_and_its_answer(
    talk: list[tuple[str, str]], q: str, a: str
) -> None:
    before = conversation(talk)
    assert before.asked(q).answered(a).undone() == before
    assert before.asked(q).undone() == before
    assert carry_out(before.asked(q).answered(a), "/undo").conversation == before


@given(talks, lines)
def test_a_command_never_touches_what_was_said_unless_it_says_so(
    talk: list[tuple[str, str]], line: str
) -> None:
    before = conversation(talk)
    after = carry_out(before, line).conversation
    if line.split()[:1] not in (["/undo"], ["/retry"], ["/reset"], ["/clear"]):
        assert after.messages == before.messages
    else:
        assert after.options == before.options


@given(lines)
def test_whatever_a_command_sets_can_be_sent(line: str) -> None:
    after = carry_out(conversation([]), line).conversation.asked("Hello")
    options = after.options
    assert 0 <= options.temperature <= 100 and 0 < options.top_p <= 1
    if not any(0xD800 <= ord(character) < 0xE000 for character in options.system):
        generate_request(GenerateOptions(**after.request()))


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("/system Be brief.", {"system": "Be brief."}),
        ("/temp 0.7", {"temperature": 0.7}),
        ("/temperature 2", {"temperature": 2.0}),
        ("/top-p 0.5", {"top_p": 0.5}),
        ("/seed 18446744073709551615", {"seed": 2**64 - 1}),
        ("/max 7", {"max_tokens": 7}),
        ("/spec fixed:15", {"speculation": "fixed:15"}),
        ("/spec off", {"speculation": "off"}),
    ],
)
def test_an_option_is_set_from_the_next_answer_on(line: str, changed: dict[str, object]) -> None:
    outcome = carry_out(conversation([]), line)
    assert outcome.conversation.options == replace(AnswerOptions(), **changed)
    assert outcome.reply and outcome.effect is Effect.NOTHING


@pytest.mark.parametrize("line", ["/system", "/seed", "/max"])
def test_an_option_without_a_value_goes_back_to_its_default(line: str) -> None:
    before = conversation([], AnswerOptions(system="x", seed=3, max_tokens=4))
    name = {"/system": "system", "/seed": "seed", "/max": "max_tokens"}[line]
    after = carry_out(before, line).conversation.options
    assert getattr(after, name) == getattr(AnswerOptions(), name)


@pytest.mark.parametrize(
    "line",
    [
        *("/temp", "/temp hot", "/temp nan", "/temp 101", "/top-p 0", "/seed -1", "/seed 1e3"),
        *("/seed 18446744073709551616", "/max x", "/spec", "/spec fixed:16", "/spec deep"),
    ],
)
def test_a_wrong_value_changes_nothing_and_says_what_to_write(line: str) -> None:
    before = conversation([("a", "b")])
    outcome = carry_out(before, line)
    assert outcome.conversation == before
    assert "write" in outcome.reply


def test_an_unknown_command_changes_nothing_and_names_the_help() -> None:
    outcome = carry_out(conversation([]), "/frobnicate now")
    assert outcome.conversation == conversation([]) and "/help" in outcome.reply


def test_retry_asks_the_same_question_and_reset_forgets_all_but_the_options() -> None:
    before = conversation([("one", "1"), ("two", "2")], AnswerOptions(system="s"))
    again = carry_out(before, "/retry")
    assert again.effect is Effect.ASK_AGAIN
    assert again.conversation == conversation([("one", "1")], before.options).asked("two")
    fresh = carry_out(before, "/reset")
    assert fresh.effect is Effect.FORGET and fresh.conversation == Conversation(before.options)
    assert carry_out(fresh.conversation, "/retry").effect is Effect.NOTHING


def test_the_request_is_the_system_message_and_then_what_was_said() -> None:
    talk = conversation([("q", "a")], AnswerOptions(system="s")).asked("r")
    assert talk.messages == (Message("user", "q"), Message("assistant", "a"), Message("user", "r"))
    roles = [(each["role"], each["content"]) for each in talk.request()["messages"]]
    assert roles == [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r")]


def test_every_command_of_the_help_is_one_and_two_slashes_are_a_message() -> None:
    for name in COMMANDS:
        assert "no command" not in carry_out(conversation([]), name).reply
    assert is_command("/quit") and not is_command("//quit") and not is_command("quit")
    assert message_of("//usr/bin") == "/usr/bin"
