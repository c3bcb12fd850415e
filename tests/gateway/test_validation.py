"""Requests: what is refused, by which field, and what a good one becomes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gateway.chat import ChatTemplate, Message
from gateway.texts import ModelText, load_text
from gateway.tokenizer import Tokenizer
from gateway.validation import ModelLimits, RawTurn, parse_turn
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.store import ModelFiles
from tests.gateway.test_chat import now

LIMITS = ModelLimits(
    context_limit=100, vocab_size=50, default_stop_ids=(2,), default_max_tokens=30, prompt_limit_chars=200
)
NO_TEXT = ModelText(reason="toy has no text", chat_reason="toy has no text")
GOOD = RawTurn(token_ids=(1, 2, 3))


def refusal_of(**changes: Any) -> Refusal:
    with pytest.raises(Refusal) as refused:
        parse_turn(dataclasses.replace(GOOD, **changes), LIMITS, NO_TEXT, draw_seed=9)
    return refused.value


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("input", {"token_ids": None}),
        ("tokens.token_ids", {"token_ids": ()}),
        ("tokens.token_ids", {"token_ids": (1, 50)}),
        ("tokens.token_ids", {"token_ids": (-1,)}),
        ("text", {"token_ids": None, "text": "hello"}),
        ("text", {"token_ids": None, "text": "x" * 201}),
        ("chat", {"token_ids": None, "messages": (Message("user", "x"),)}),
        ("chat.messages", {"token_ids": None, "messages": ()}),
        ("chat.messages", {"token_ids": None, "messages": (Message("user", "x" * 201),)}),
        ("chat.messages[1].role", {"token_ids": None, "messages": (Message("user", ""), Message("a b", ""))}),
        ("sampling.temperature", {"temperature": -0.1}),
        ("sampling.temperature", {"temperature": float("nan")}),
        ("sampling.top_p", {"top_p": 0.0}),
        ("sampling.min_p", {"min_p": 1.5}),
        ("sampling.repetition_penalty", {"repetition_penalty": 0.0}),
        ("sampling.min_token_count", {"min_tokens": -1}),
        ("sampling.logit_bias", {"logit_bias": {50: 1.0}}),
        ("sampling.logit_bias", {"logit_bias": dict.fromkeys(range(1025), 1.0)}),
        ("stop.stop_token_ids", {"stop_ids": (50,)}),
        ("stop.stop_token_ids", {"stop_ids": (1,) * 257}),
        ("stop.stop_strings", {"stop_strings": ("x",) * 17}),
        ("stop.stop_strings", {"stop_strings": ("",)}),
        ("stop.stop_strings", {"stop_strings": ("x" * 257,)}),
        ("stop.stop_strings", {"stop_strings": ("x",)}),
        ("stop.max_token_count", {"max_tokens": -1}),
        ("stop.max_token_count", {"max_tokens": 98}),
        ("logprob_count", {"logprob_count": 21}),
        ("speculation.fixed_depth", {"fixed_depth": 16}),
        ("input", {"token_ids": (1,) * 100}),
        ("input", {"token_ids": (1,) * 101}),
    ],
)
def test_each_refusal_names_its_field_and_says_what_to_send(field: str, changes: dict[str, Any]) -> None:
    refusal = refusal_of(**changes)
    assert refusal.violations[0].field == field
    assert refusal.message.startswith(f"{field}: ")


def test_what_does_not_fit_the_context_has_its_own_reason() -> None:
    assert refusal_of(max_tokens=98).reason is Reason.CONTEXT_EXCEEDED
    assert refusal_of(token_ids=(1,) * 100).reason is Reason.CONTEXT_EXCEEDED
    assert "at most 97" in refusal_of(max_tokens=98).message


def test_a_seed_is_drawn_only_if_none_was_given() -> None:
    assert parse_turn(GOOD, LIMITS, NO_TEXT, draw_seed=9).sampling.seed == 9
    assert parse_turn(dataclasses.replace(GOOD, seed=0), LIMITS, NO_TEXT, draw_seed=9).sampling.seed == 0


@pytest.mark.parametrize(
    ("prompt_count", "asked", "expected", "by_context"),
    [(3, 0, 30, False), (3, 97, 97, False), (70, 0, 30, True), (90, 0, 10, True), (69, 0, 30, False)],
)
def test_the_output_limit_is_what_was_asked_or_the_default_or_what_the_context_leaves(
    prompt_count: int, asked: int, expected: int, by_context: bool
) -> None:
    raw = RawTurn(token_ids=(1,) * prompt_count, max_tokens=asked)
    turn = parse_turn(raw, LIMITS, NO_TEXT, draw_seed=0)
    assert (turn.max_tokens, turn.ends_with_context) == (expected, by_context)


def test_the_models_own_stop_ids_are_hidden_unless_they_are_ignored() -> None:
    raw = dataclasses.replace(GOOD, stop_ids=(7,))
    assert parse_turn(raw, LIMITS, NO_TEXT, draw_seed=0).hidden_ids == {2, 7}
    raw = dataclasses.replace(raw, ignore_default_stop_ids=True)
    assert parse_turn(raw, LIMITS, NO_TEXT, draw_seed=0).hidden_ids == {7}


def test_speculation_off_is_depth_zero_whatever_else_was_said() -> None:
    turn = parse_turn(
        dataclasses.replace(GOOD, speculation_off=True, fixed_depth=5), LIMITS, NO_TEXT, draw_seed=0
    )
    assert turn.fixed_depth == 0


def test_text_and_messages_become_ids(demo_model: ModelFiles) -> None:
    tokenizer = Tokenizer.from_folder(demo_model.path)
    template = ChatTemplate("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", {}, now)
    limits = dataclasses.replace(LIMITS, vocab_size=49152)
    text = ModelText(tokenizer, template)
    plain = parse_turn(RawTurn(text="Hello there"), limits, text, 0)
    assert tokenizer.decode(plain.prompt_ids) == "Hello there"
    spoken = parse_turn(RawTurn(messages=(Message("user", "Hello there"),)), limits, text, 0)
    assert spoken.prompt_ids == (1, *plain.prompt_ids)


def test_a_tokenizer_that_is_not_the_verifiers_is_not_used(demo_model: ModelFiles) -> None:
    good_hash = Tokenizer.from_folder(demo_model.path).content_hash
    good = load_text("name", str(demo_model.path), good_hash, now)
    assert (good.tokenizer is not None, good.chat is not None, good.reason) == (True, True, "")
    other = load_text("name", str(demo_model.path), "0" * 64, now)
    assert other.tokenizer is None
    assert "is not the one of the verifier" in other.reason
    assert "no text" in load_text("toy", "", "", now).reason
    assert "cannot read the tokenizer of toy" in load_text("toy", "", good_hash, now).reason
