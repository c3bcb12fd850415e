"""`chat`, `sessions`, `turns`, `workers` and `doctor` against real stacks, as a person and as a pipe would use them."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from sparkrelay import cli
from sparkrelay.cli.stack import Stack
from sparkrelay.client.blocking import connect
from tests.system.conftest import TOY, RunDrafter, StartStack, drafter_state
from tools.pty_screen import CTRL_C, CTRL_D, PtyScreen

pytestmark = pytest.mark.system


def sparkrelay(stack: Stack, *words: str, stdin: str = "") -> Any:
    """A command asked of this stack, in this process: what a subprocess adds is tested elsewhere."""
    return CliRunner().invoke(cli.build_app(), [*words, "--gateway", stack.gateway], input=stdin)


def json_of(stack: Stack, *words: str, stdin: str = "") -> Any:
    result = sparkrelay(stack, *words, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_sessions_are_listed_shown_and_ended(toy_stack: Stack) -> None:
    with connect(toy_stack.gateway) as client:
        session = client.create_session()
        session.generate(token_ids=[1, 2, 3], max_tokens=4)
    (listed,) = [s for s in json_of(toy_stack, "sessions", "list") if s["session_id"] == session.session_id]
    assert (listed["turn_count"], listed["token_count"]) == (1, 7)
    assert json_of(toy_stack, "sessions", "show", session.session_id) == listed
    assert session.session_id in sparkrelay(toy_stack, "sessions", "list").stdout
    assert json_of(toy_stack, "sessions", "end", session.session_id) == {"ended": [session.session_id]}
    gone = sparkrelay(toy_stack, "sessions", "show", session.session_id)
    assert gone.exit_code == 1 and "SESSION_NOT_FOUND" in gone.stderr
    with connect(toy_stack.gateway) as client:
        opened = {client.create_session().session_id for _ in range(3)}
    assert opened <= set(json_of(toy_stack, "sessions", "end", "--all")["ended"])
    assert json_of(toy_stack, "sessions", "list") == []


def test_a_turn_can_be_looked_at_afterwards(toy_stack: Stack, run_drafter: RunDrafter) -> None:
    with run_drafter(toy_stack, "ngram"):
        answer = json_of(toy_stack, "generate", "--token-ids", "7,3,9,7,3,9", "--max-tokens", "40")
        turn = json_of(toy_stack, "turns", "show", answer["turn_id"])
        assert turn["rounds"] == answer["rounds"] and turn["totals"]["drafted"] > 0
        assert json_of(toy_stack, "turns", "list", "--limit", "1")[0]["turn_id"] == answer["turn_id"]
        text = sparkrelay(toy_stack, "turns", "show", answer["turn_id"]).stdout
        assert f"of {turn['totals']['drafted']} drafted right" in text
        listed = sparkrelay(toy_stack, "workers", "list").stdout
        assert "drafter-1  connected" in listed and "plain decoding" not in listed


def test_without_a_drafter_workers_and_doctor_say_so(toy_stack: Stack) -> None:
    assert "plain decoding: no drafter" in sparkrelay(toy_stack, "workers", "list").stdout
    findings = json_of(toy_stack, "doctor", "--model", "toy")["findings"]
    assert any(each["subject"] == "verifier" and "decodes plainly" in each["what"] for each in findings)
    assert any(each["subject"] == "gateway" and each["level"] == "ok" for each in findings)


def test_a_model_without_a_chat_template_is_not_chatted_with(toy_stack: Stack) -> None:
    result = sparkrelay(toy_stack, "chat", stdin="Hello\n")
    assert result.exit_code == 1 and "generate --raw" in result.stderr


def test_a_drained_verifier_is_shown_as_draining(own_stack: StartStack) -> None:
    stack = own_stack(TOY)
    refused = sparkrelay(stack, "workers", "drain", "127.0.0.1:1")
    assert refused.exit_code == 1 and stack.verifier in refused.stderr
    assert json_of(stack, "workers", "drain", stack.verifier)["state"] == "draining"
    assert "draining" in sparkrelay(stack, "workers", "list").stdout
    findings = json_of(stack, "doctor", "--model", "toy")["findings"]
    assert any(each["level"] == "warn" and "draining" in each["what"] for each in findings)


def test_a_pipe_of_questions_is_one_conversation(demo_stack: Stack) -> None:
    options = ("--max-tokens", "8", "--system", "Answer in one word.")
    script = "What is the capital of France?\n/temp 2000\n/spec off\nAnd of Italy?\n"
    talk = json_of(demo_stack, "chat", *options, stdin=script)
    assert [each["role"] for each in talk["messages"]] == ["user", "assistant"] * 2
    assert "Paris" in talk["messages"][1]["content"]
    first, second = talk["turns"]
    assert first["session_id"] == second["session_id"]
    assert second["usage"]["cached"] > first["usage"]["prompt"] // 2
    told = sparkrelay(demo_stack, "chat", *options, stdin="What is the capital of France?\n")
    assert told.stdout == f"{talk['messages'][1]['content']}\n"
    assert json_of(demo_stack, "sessions", "list") == []


def test_a_person_chats_stops_an_answer_looks_at_rounds_and_leaves(
    demo_stack: Stack, run_drafter: RunDrafter
) -> None:
    command = [
        sys.executable,
        "-m",
        "sparkrelay",
        "chat",
        "--gateway",
        demo_stack.gateway,
        "--max-tokens",
        "400",
    ]
    with run_drafter(demo_stack, "ngram"), PtyScreen(command, columns=72, rows=30) as person:
        person.expect("drafted by drafter-1 (ngram)")
        person.expect(">")
        person.type("Count from 1 to 400, one number a line.\n")
        person.wait_until(lambda: "tokens/s" in person.text and "a round" in person.text, "status line")
        assert "Count from" in person.text.splitlines()[-3] or len(person.text.splitlines()) > 5
        person.type(CTRL_C)
        person.expect("[stopped]")
        person.type("/max 6\n")
        person.expect("max is 6 from now on")
        person.type("Say hello.\n")
        person.expect("[6 tokens, length")
        person.type("/rounds\n")
        person.expect("seed ")
        person.type("/session\n")
        person.expect("turns     2")
        with connect(demo_stack.gateway) as client:
            assert drafter_state(client) == "connected"
            assert [each.turn_count for each in client.list_sessions()] == [2]
        person.type(CTRL_D)
        assert person.wait_for_exit() == 0
        assert b"\x1b[2J" not in person.written
    with connect(demo_stack.gateway) as client:
        assert client.list_sessions() == []
        assert "cancelled" in {turn.finish_reason for turn in client.list_turns(5)}


def test_ctrl_c_twice_at_the_prompt_ends_with_code_130(demo_stack: Stack) -> None:
    command = [sys.executable, "-m", "sparkrelay", "chat", "--gateway", demo_stack.gateway]
    with PtyScreen(command) as person:
        # Python notices a signal that comes while readline is at work with the end of the line: so one follows each.
        person.expect(">")
        person.type("not sent")
        person.expect("not sent")
        person.type(CTRL_C + "\n")
        person.expect("Ctrl-C again")
        person.type(CTRL_C + "\n")
        assert person.wait_for_exit() == 130
