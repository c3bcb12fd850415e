"""A grammar's state: the masks it gives, and that no history of steps forward and back leaves a trace in it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sparkrelay.device.filters import NothingAllowed
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.response_format import FormatKind
from tests.verifier_service.random_formats import random_format
from tests.verifier_service.text_toy import OTHER_STOP, STOP, TOKENS, VOCAB_SIZE, encode, grammar
from verifier_service.grammar import GrammarState

STOPS = frozenset({STOP, OTHER_STOP})
JSON, REGEX, LARK = FormatKind.JSON_SCHEMA, FormatKind.REGEX, FormatKind.LARK_GRAMMAR
JUST_A = '{"type":"object","properties":{"a":{"const":1}},"required":["a"],"additionalProperties":false}'
WORDS = ("an", "ana", "anab", "banana", "bé", "b12", "true", "trueé")


def view(state: GrammarState) -> list[int] | None:
    """The allowed ids, None where nothing is."""
    try:
        return [int(token_id) for token_id in np.flatnonzero(state.allowed())]
    except NothingAllowed:
        return None


@pytest.mark.parametrize("prefix", sorted({word[:end] for word in WORDS for end in range(len(word) + 1)}))
def test_a_token_is_allowed_if_and_only_if_some_word_goes_on_with_it(prefix: str) -> None:
    spelled = prefix.encode()
    state = grammar(REGEX, "|".join(WORDS)).begin(encode(prefix), STOPS)
    expected = {
        token_id
        for token_id, token in enumerate(TOKENS)
        if token_id not in STOPS and any(word.encode().startswith(spelled + token) for word in WORDS)
    }
    ends = set(STOPS) if prefix in WORDS else set()
    allowed = set(view(state) or ())
    if ends or len({TOKENS[token_id][0] for token_id in expected}) > 1:
        assert allowed == expected | ends
    else:  # there is one way on, and it is spelled in the tokenizer's own way
        assert allowed and allowed <= expected
    assert state.complete == (prefix in WORDS)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 199), history=st.integers(0, 2**32))
def test_any_history_of_steps_forward_and_back_is_a_straight_run(seed: int, history: int) -> None:
    asked, rng = random_format(seed), random.Random(history)
    compiled = grammar(asked.kind, asked.text)
    state, output = compiled.begin((), STOPS), list[int]()
    backward = 0
    for _ in range(40):
        allowed = view(state)
        if output and (allowed is None or rng.random() < 0.3):
            count = rng.randint(0, len(output))
            backward += count < len(output)
            del output[count:]
            state.truncate(count)
        else:
            fitting = allowed is not None and rng.random() < 0.9
            token_id = rng.choice(allowed) if fitting and allowed else rng.randrange(VOCAB_SIZE)
            output.append(token_id)
            state.append(token_id)
        straight = compiled.begin(output, STOPS)
        assert view(state) == view(straight)
        assert state.complete == straight.complete
    event(f"went back: {backward > 0}")


def test_states_of_one_grammar_know_nothing_of_each_other() -> None:
    compiled = grammar(REGEX, "a{1,5}|b{1,5}")
    first, second = compiled.begin((), STOPS), compiled.begin((), STOPS)
    first.append(encode("a")[0])
    second.append(encode("b")[0])
    assert view(first) == [STOP, OTHER_STOP, *encode("a")]
    assert view(second) == [STOP, OTHER_STOP, *encode("b")]


def test_a_stop_id_is_no_text_even_where_the_grammar_has_its_letters() -> None:
    letter = encode("a")[0]
    state = grammar(REGEX, "a?b").begin((), {letter})
    assert letter not in (view(state) or ()) and encode("b")[0] in (view(state) or ())
    state.append(encode("b")[0])
    assert view(state) == [letter]


def test_the_tokenizers_own_end_is_allowed_only_to_turns_that_end_with_it() -> None:
    compiled = grammar(REGEX, "a?")
    assert view(compiled.begin((), {OTHER_STOP})) == [OTHER_STOP, *encode("a")]
    assert view(compiled.begin((), {STOP})) == [STOP, *encode("a")]


def test_ids_behind_the_tokenizers_last_are_never_allowed() -> None:
    mask = grammar(REGEX, "(?s:.*)").begin((), STOPS).allowed()
    assert mask.shape == (VOCAB_SIZE,) and mask.dtype == np.bool_
    assert mask[: len(TOKENS)].sum() > 90 and not mask[len(TOKENS) :].any()


@pytest.mark.parametrize("text", ['{"a":1}', '{"a": 1}', '{\n  "a": 1\n}'])
def test_json_may_be_on_one_line_or_indented(text: str) -> None:
    assert grammar(JSON, JUST_A).begin(encode(text), STOPS).complete


def test_a_schema_may_forbid_all_white_space() -> None:
    strict = f'{JUST_A[:-1]},"x-guidance":{{"whitespace_pattern":null,"whitespace_flexible":false}}}}'
    assert grammar(JSON, strict).begin(encode('{"a":1}'), STOPS).complete
    assert not grammar(JSON, strict).begin(encode('{"a": 1}'), STOPS).complete


@pytest.mark.parametrize("text", [' {"a":1}', '{"a":  1}', '{"a":1} ', '{"b":1}', '{"a":1', '{\n\n"a":1}'])
def test_json_has_no_white_space_around_it_and_little_in_it(text: str) -> None:
    assert not grammar(JSON, JUST_A).begin(encode(text), STOPS).complete


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (JSON, '{"enum":[]}', "Unsatisfiable"),
        (JSON, '{"allOf":[{"type":"string"},{"type":"integer"}]}', "Unsatisfiable"),
        (JSON, '{"type":"integer","minimum":3,"maximum":2}', "minimum"),
        (JSON, '{"type":"array","items":{},"uniqueItems":true}', "uniqueItems"),
        (JSON, '{"$ref":"https://example.org/schema.json"}', "example.org"),
        (JSON, '{"$ref":"#/$defs/none"}', r"/\$defs/none"),
        (JSON, '{"$ref":"#"}', "no text"),
        (JSON, '{"type":"strin"}', "strin"),
        (JSON, '{"type":', "line 1 column 9"),
        (JSON, '{"const":NaN}', "NaN"),
        (JSON, "[1]", "no JSON object"),
        (JSON, "[" * 30_000, "deep"),
        (JSON, '{"items":' * 7000 + "{}" + "}" * 7000, "deep|recursion"),
        (REGEX, r"[^\s\S]", "no text"),
        (REGEX, r"a[^\s\S]b", "no text"),
        (REGEX, "ß", "no text"),
        (REGEX, "(a", "unclosed group"),
        (REGEX, "(?=a)b", "look-around"),
        (REGEX, r"(a)\1", "backreferences"),
        (REGEX, "(" * 3000 + "a" + ")" * 3000, "nest|regex"),
        (LARK, "begin: /a/", "start"),
        (LARK, "start: other", "other"),
        (LARK, "start: start", "no text"),
        (LARK, "%%%", "lexer"),
        (LARK, "start: " + "(" * 30_000, "nest|deep"),
    ],
)
def test_what_no_text_can_meet_or_nobody_can_read_is_refused_with_its_place(
    kind: FormatKind, text: str, says: str
) -> None:
    with pytest.raises(Refusal, match=f"(?s){kind.value}.*(?:{says})") as refused:
        grammar(kind, text)
    assert refused.value.reason is Reason.GRAMMAR_REFUSED
    assert refused.value.violations[0].field == f"response_format.{kind.value}"
    assert len(refused.value.message) < 1000


def test_the_empty_text_can_be_all_there_is() -> None:
    assert view(grammar(REGEX, "()").begin((), STOPS)) == [STOP, OTHER_STOP]


def test_an_ambiguous_grammar_ends_at_a_limit_and_not_in_minutes() -> None:
    state, length = grammar(LARK, 'start: s\ns: s s s | s s | "a" | ').begin((), STOPS), 0
    while length < 200 and view(state) is not None:
        state.append(encode("a")[0])
        length += 1
    assert 5 < length < 200
    with pytest.raises(NothingAllowed, match="items"):
        state.allowed()
    state.truncate(2)
    assert view(state) == view(
        grammar(LARK, 'start: s\ns: s s s | s s | "a" | ').begin(encode("a") * 2, STOPS)
    )
