"""Random JSON schemas and regular expressions, each with what judges a text by it: jsonschema, and Python's own `re`."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator

from sparkrelay.response_format import FormatKind

Schema = dict[str, Any]


@dataclass(frozen=True)
class RandomFormat:
    """kind, text: what is asked for. meets: the judge; it knows nothing of how the text was made."""

    kind: FormatKind
    text: str
    meets: Callable[[str], bool]


def random_format(seed: int) -> RandomFormat:
    """Every text that meets it is short enough for a turn of a toy that writes at random."""
    rng = random.Random(seed)
    if seed % 2:
        pattern = _regex(rng, 3)
        return RandomFormat(FormatKind.REGEX, pattern, lambda text: re.fullmatch(pattern, text) is not None)
    definitions = {name: _schema(rng, 1, {}) for name in ("first", "second")}
    schema = {**_schema(rng, 3, definitions), "$defs": definitions}
    judge = Draft202012Validator(schema)
    return RandomFormat(
        FormatKind.JSON_SCHEMA, json.dumps(schema), lambda text: judge.is_valid(json.loads(text))
    )


def _schema(rng: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    leaves = [_enum, _const, _string, _pattern, _integer, _number, _boolean, _nullable]
    if depth == 0:
        return rng.choice(leaves)(rng)
    kind = rng.choice(["leaf", "object", "object", "array", "tuple", "any", "all", "ref"])
    match kind:
        case "object":
            return _object(rng, depth, definitions)
        case "array":
            items = _schema(rng, depth - 1, definitions)
            return {
                "type": "array",
                "items": items,
                "minItems": rng.randint(0, 2),
                "maxItems": rng.randint(2, 3),
            }
        case "tuple":
            parts = [_schema(rng, depth - 1, definitions) for _ in range(rng.randint(1, 3))]
            return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
        case "any":
            return {"anyOf": [_schema(rng, depth - 1, definitions) for _ in range(rng.randint(1, 3))]}
        case "all":
            low = rng.randint(-50, 50)
            return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + rng.randint(0, 300)}]}
        case "ref" if definitions:
            return {"$ref": f"#/$defs/{rng.choice(list(definitions))}"}
    return rng.choice(leaves)(rng)


def _object(rng: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    names = rng.sample(["a", "name", "é", "with space", 'q"uote', "count", "x1"], rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: _schema(rng, depth - 1, definitions) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _enum(rng: random.Random) -> Schema:
    return {
        "enum": rng.sample(["red", "green", 7, -1.5, True, None, [1, 2], {"a": 1}, ""], rng.randint(1, 4))
    }


def _const(rng: random.Random) -> Schema:
    return {"const": rng.choice(["fixed", 12, False, None, ["a"], {"k": "é"}])}


def _string(rng: random.Random) -> Schema:
    low = rng.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 6)}


def _pattern(rng: random.Random) -> Schema:
    return {"type": "string", "pattern": f"^{_regex(rng, 2)}$"}


def _integer(rng: random.Random) -> Schema:
    low = rng.randint(-2000, 2000)
    return {"type": "integer", "minimum": low, "exclusiveMaximum": low + rng.randint(1, 3000)}


def _number(rng: random.Random) -> Schema:
    return {
        "type": "number",
        "minimum": 0,
        "maximum": rng.choice([1, 9.5, 1000]),
        "multipleOf": rng.choice([0.5, 5]),
    }


def _boolean(rng: random.Random) -> Schema:
    return {"type": "boolean"}


def _nullable(rng: random.Random) -> Schema:
    return {"type": ["integer", "null", "boolean"], "minimum": 0, "maximum": rng.randint(0, 99)}


def _regex(rng: random.Random, depth: int) -> str:
    if depth == 0:
        return rng.choice(["a", "b", "é", "0", "[a-f]", "[^a-z\\n]", "\\d", "[xyz ]", "no", "\\.", "-"])
    match rng.choice(["both", "both", "either", "some", "leaf"]):
        case "both":
            return _regex(rng, depth - 1) + _regex(rng, depth - 1)
        case "either":
            return f"({_regex(rng, depth - 1)}|{_regex(rng, depth - 1)})"
        case "some":
            low = rng.randint(0, 2)
            count = rng.choice([f"{{{low},{low + 4}}}", f"{{{low + 1}}}", "?"])
            return f"({_regex(rng, depth - 1)}){count}"
    return _regex(rng, 0)
