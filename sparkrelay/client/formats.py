"""What shape an answer must have: the argument `response_format`, as people write it and as the gateway reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sparkrelay.client.errors import InvalidRequest
from sparkrelay.outcomes import FieldViolation, Reason
from sparkrelay.v1 import generation_pb2 as generation_pb

_FORMS = (
    '{"type": "json_schema", "schema": ...}, {"type": "json_object"}, {"type": "regex", "pattern": "..."} '
    'or {"type": "lark", "grammar": "..."}'
)


def json_schema(schema: Mapping[str, Any] | str | type) -> dict[str, Any]:
    """The answer is one JSON value that meets the schema: a mapping, JSON text, or a pydantic model class."""
    return {"type": "json_schema", "schema": schema}


def regex(pattern: str) -> dict[str, Any]:
    """The whole answer matches a regular expression (Rust syntax, without look-around and back references)."""
    return {"type": "regex", "pattern": pattern}


def lark(grammar: str) -> dict[str, Any]:
    """The whole answer matches the rule `start` of a context-free grammar in Lark syntax."""
    return {"type": "lark", "grammar": grammar}


def response_format_pb(value: object) -> generation_pb.ResponseFormat | None:
    """The message, None for None. Raises InvalidRequest for what is no response format.

    value  what one of the helpers above returns, {"type": "json_object"} for any JSON object, or a pydantic model class
    """
    if value is None:
        return None
    if isinstance(value, type):
        return generation_pb.ResponseFormat(json_schema=_schema_text(value))
    given = dict(value) if isinstance(value, Mapping) else {}
    match given:
        case {"type": "json_schema", "schema": schema, **others} if not others:
            return generation_pb.ResponseFormat(json_schema=_schema_text(schema))
        case {"type": "json_object", **others} if not others:
            return generation_pb.ResponseFormat(json_schema='{"type":"object"}')
        case {"type": "regex", "pattern": str(pattern), **others} if not others:
            return generation_pb.ResponseFormat(regex=pattern)
        case {"type": "lark", "grammar": str(grammar), **others} if not others:
            return generation_pb.ResponseFormat(lark_grammar=grammar)
    raise _invalid(f"has the keys {sorted(map(str, given))} and type {given.get('type')!r}; send {_FORMS}")


def _schema_text(schema: Any) -> str:
    """JSON text of a schema in any of its forms; pydantic is not imported, only its classes' own method is called."""
    if isinstance(schema, str):
        return schema
    if isinstance(schema, type):
        describe = getattr(schema, "model_json_schema", None)
        if describe is None:
            raise _invalid(f"has the class {schema.__name__}, which is no pydantic model; send a schema")
        schema = describe()
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid(f"has a schema that is no JSON: {error}") from error


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(
        f"response_format: {message}",
        reason=Reason.INVALID_FIELD.name,
        violations=(FieldViolation("response_format", message),),
    )
