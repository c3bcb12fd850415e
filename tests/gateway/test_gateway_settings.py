"""The gateway's settings: their neutral start and what they refuse."""

from __future__ import annotations

import pytest

from gateway.settings import GatewaySettings
from sparkrelay.settings import InvalidSettings, read


def test_flags_environment_and_defaults_make_one_object() -> None:
    environ = {"SPARKRELAY_GATEWAY_MAX_TURNS": "7"}
    settings = read(GatewaySettings, ["--verifiers", "a:1, b:2"], environ)
    assert settings.verifier_addresses == ("a:1", "b:2")
    assert (settings.max_turns, settings.listen) == (7, "127.0.0.1:7070")


@pytest.mark.parametrize(
    ("field", "argv"),
    [
        ("verifiers", ["--verifiers", "nowhere"]),
        ("verifiers", ["--verifiers", "a:1,a:1"]),
        ("max_turns", ["--max-turns", "0"]),
        ("log_format", ["--log-format", "xml"]),
    ],
)
def test_a_bad_value_is_refused_by_its_field(field: str, argv: list[str]) -> None:
    with pytest.raises(InvalidSettings, match=field):
        read(GatewaySettings, argv, {})


def test_every_field_is_described() -> None:
    assert [name for name, field in GatewaySettings.model_fields.items() if not field.description] == []
