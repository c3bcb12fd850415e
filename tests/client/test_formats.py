"""The argument response_format, as people write it."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from sparkrelay.client import InvalidRequest, json_schema, lark, regex
from sparkrelay.client.requests import GenerateOptions, generate_request
from sparkrelay.v1 import generation_pb2 as generation_pb

SCHEMA = {"type": "object", "properties": {"naïve": {"const": 1}}}


class Person(pydantic.BaseModel):
    name: str
    age: int


def sent(response_format: Any) -> generation_pb.ResponseFormat:
    request = generate_request(GenerateOptions(prompt="x", response_format=response_format))
    assert request.HasField("response_format")
    return request.response_format


def test_every_way_to_write_a_format_is_its_message() -> None:
    assert json.loads(sent(json_schema(SCHEMA)).json_schema) == SCHEMA
    assert sent({"type": "json_schema", "schema": '{"const": 1}'}).json_schema == '{"const": 1}'
    assert json.loads(sent({"type": "json_object"}).json_schema) == {"type": "object"}
    assert sent(regex("a|b")).regex == "a|b"
    assert sent(lark("start: /a/")).lark_grammar == "start: /a/"


def test_a_pydantic_model_is_its_schema() -> None:
    for asked in (Person, json_schema(Person)):
        assert json.loads(sent(asked).json_schema)["required"] == ["name", "age"]


def test_without_a_format_the_field_is_absent() -> None:
    assert not generate_request(GenerateOptions(prompt="x")).HasField("response_format")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        "json",
        {"type": "xml"},
        {"type": "regex"},
        {"type": "regex", "pattern": 3},
        {"type": "regex", "pattern": "\ud800"},
        {"type": "lark", "grammar": "start: /a/", "strict": True},
        {"type": "json_schema", "schema": {"const": float("nan")}},
        {"type": "json_schema", "schema": {"const": object()}},
        int,
    ],
)
def test_what_is_no_format_is_refused_by_its_field(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="response_format") as refused:
        generate_request(GenerateOptions(prompt="x", response_format=wrong))
    assert refused.value.violations[0].field == "response_format"
