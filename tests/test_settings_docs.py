"""docs/settings.md and docs/settings.schema.json: as fresh as the settings classes, whole, and true."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from sparkrelay.settings import InvalidSettings, read
from tools.settings_docs import DOC, SCHEMA, SERVICES, fields_of, files, variable_of

SETTINGS = [(service, name) for service, (its, _) in SERVICES.items() for name in its.model_fields]


def test_the_pages_are_what_the_classes_say_today() -> None:
    old = [file.name for file, text in files().items() if file.read_text(encoding="utf-8") != text]
    assert not old, "run `python tools/settings_docs.py`"


def test_every_setting_has_a_row_and_every_row_a_meaning() -> None:
    rows = [line.split(" | ") for line in DOC.read_text().splitlines() if line.startswith("| `")]
    names = {row[0].strip("| `") for row in rows}
    assert {name for _, name in SETTINGS} <= names
    assert not [row for row in rows if len(row) != 4 or len(row[3]) < 12]


def test_every_setting_of_every_service_is_described() -> None:
    assert len(SETTINGS) > 60
    for service, name in SETTINGS:
        assert len(fields_of(SERVICES[service][0])[name].get("description", "")) > 10, (service, name)


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_every_setting_is_read_from_the_variable_that_the_page_names(service: str) -> None:
    settings_class = SERVICES[service][0]
    for name, schema in fields_of(settings_class).items():
        if schema.get("type") == "integer":
            wrong = {variable_of(settings_class, name): "not a number"}
            with pytest.raises(InvalidSettings, match=f"{name}: .*environment"):
                read(settings_class, [], wrong)


@pytest.mark.parametrize(
    ("service", "values", "complaint"),
    [
        ("gateway", {"max_turns": 0}, "less than the minimum"),
        ("gateway", {"no_such_setting": 1}, "no_such_setting"),
        ("verifier", {"dtype": "float16"}, "float16"),
        ("drafter", {"block_size": 16}, "greater than the maximum"),
    ],
)
def test_the_schema_refuses_what_the_class_refuses(
    service: str, values: dict[str, Any], complaint: str
) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    checker = jsonschema.Draft202012Validator({**schema, "$ref": f"#/$defs/{service}"})
    assert not list(checker.iter_errors({}))
    assert [error for error in checker.iter_errors(values) if complaint in error.message]
    with pytest.raises(ValueError, match=next(iter(values))):
        SERVICES[service][0](**values)
