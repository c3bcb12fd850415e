"""Structured output of the demo model through real processes: valid, and plain decoding's token for token."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from sparkrelay.cli import build_app
from sparkrelay.cli.stack import Stack
from sparkrelay.client import InvalidRequest, json_schema, lark, regex
from sparkrelay.client.blocking import connect
from tests.system.conftest import RunDrafter
from tests.system.test_exactness import counts

pytestmark = pytest.mark.system

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "rat", "mat"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
SENTENCE = r"(The|A) (cat|rat|mat) sat on (the|a) (cat|rat|mat), (the|a) (cat|rat) ate (the|a) (rat|mat)\."
SUM = 'start: NUMBER ("+" NUMBER)~1..3 "=" NUMBER\nNUMBER: /[1-9][0-9]?/'
MESSAGES = [
    {"role": "user", "content": 'Repeat: The cat sat on the mat, the cat ate the rat. {"name": "cat"} 1+2=3'}
]
GREEDY: dict[str, Any] = {}
WARM: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 12}


def is_person(text: str) -> bool:
    return bool(Draft202012Validator(PERSON).is_valid(json.loads(text)))


def is_sentence(text: str) -> bool:
    return re.fullmatch(SENTENCE, text) is not None


def is_sum(text: str) -> bool:
    return re.fullmatch(r"[1-9]\d?(\+[1-9]\d?){1,3}=[1-9]\d?", text) is not None


@pytest.mark.timeout(300)
def test_the_demo_models_text_has_the_shape_that_was_asked_for_whatever_drafts(
    demo_stack: Stack, run_drafter: RunDrafter
) -> None:
    formats: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
        (json_schema(PERSON), is_person),
        (regex(SENTENCE), is_sentence),
        (lark(SUM), is_sum),
    ]
    total: Counter[str] = Counter()
    for kind in ("ngram", "adversarial"):
        with run_drafter(demo_stack, kind), connect(demo_stack.gateway) as client:
            for response_format, meets in formats:
                for sampling in (GREEDY, WARM):
                    turn = {
                        "messages": MESSAGES,
                        "max_tokens": 80,
                        "response_format": response_format,
                        **sampling,
                    }
                    plain = client.generate(**turn, speculation="off")
                    run = client.generate(**turn, speculation="fixed:4", include_rounds=True)
                    assert run.token_ids == plain.token_ids
                    assert run.finish_reason == plain.finish_reason == "stop"
                    assert meets(run.text), run.text
                    total += counts([run])
    assert min(total[name] for name in ("drafted", "verified", "accepted", "rejected")) > 0, total


def test_a_schema_that_nothing_meets_is_refused_by_its_name_and_its_turn(demo_stack: Stack) -> None:
    with connect(demo_stack.gateway) as client:
        assert [model.has_response_format for model in client.list_models()] == [True]
        with pytest.raises(InvalidRequest, match="Unsatisfiable") as refused:
            client.generate("x", response_format=json_schema({"enum": []}))
    assert refused.value.reason == "GRAMMAR_REFUSED" and refused.value.turn_id
    assert refused.value.violations[0].field == "response_format.json_schema"


def test_the_toy_has_no_text_and_refuses_formats(toy_stack: Stack) -> None:
    with connect(toy_stack.gateway) as client:
        assert [model.has_response_format for model in client.list_models()] == [False]
        with pytest.raises(InvalidRequest, match="response_format"):
            client.generate(token_ids=[1, 2], response_format=regex("a"))


def test_the_command_takes_a_schema_file_or_a_pattern(demo_stack: Stack, tmp_path: Path) -> None:
    schema = tmp_path / "person.json"
    schema.write_text(json.dumps(PERSON))
    ask = ["generate", "--gateway", demo_stack.gateway, "--prompt", "A cat:", "--max-tokens", "80", "--json"]
    for flags, meets in ((["--json-schema", str(schema)], is_person), (["--regex", SENTENCE], is_sentence)):
        run = CliRunner().invoke(build_app(), [*ask, *flags])
        assert run.exit_code == 0, run.output
        answer = json.loads(run.stdout)
        assert answer["finish_reason"] == "stop" and meets(answer["text"])
    both = CliRunner().invoke(build_app(), [*ask, "--json-schema", str(schema), "--regex", "a"])
    missing = CliRunner().invoke(build_app(), [*ask, "--json-schema", str(tmp_path / "none.json")])
    assert both.exit_code == missing.exit_code == 2
