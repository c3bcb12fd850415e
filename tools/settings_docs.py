"""Writes docs/settings.md and docs/settings.schema.json: every setting of the three services, from their settings classes.

The classes are the source of `--help`, of these two files and of what the Helm chart accepts. Run without arguments to rewrite
the files; with --check to only say whether they are up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, Python would only see tools/

from drafter_service.settings import DrafterSettings  # noqa: E402
from gateway.settings import GatewaySettings  # noqa: E402
from sparkrelay.settings import ServiceSettings  # noqa: E402
from verifier_service.settings import VerifierSettings  # noqa: E402

DOC = ROOT / "docs" / "settings.md"
SCHEMA = ROOT / "docs" / "settings.schema.json"

# service -> its class and how it is started
SERVICES: dict[str, tuple[type[ServiceSettings], str]] = {
    "gateway": (GatewaySettings, "python -m gateway"),
    "verifier": (VerifierSettings, "python -m verifier_service"),
    "drafter": (DrafterSettings, "python -m drafter_service"),
}
COMMON = frozenset(ServiceSettings.model_fields)
BOUNDS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
}
HEAD = """# Settings

<!-- tools/settings_docs.py writes this file from the settings classes; `make format` runs it. -->

The three services are told everything by settings, flat and with their unit in the name. A setting may come from four
places; a later one wins: its default, a TOML file (`--config FILE`, lines `name = value`), the environment, the command line.

| place | how `{example}` of the {service} is spelled |
|---|---|
| file | `{example} = {value}` |
| environment | `{variable}={value}` |
| command line | `{command} {flag} {value}` |

A switch (`false` by default) is turned on with `--its-name` and off with `--no-its-name`. `--help` of each service prints the
same tables. What does not fit is refused with the setting's name, what is wrong, and the place that the value came from. For
machines the same is in [settings.schema.json](settings.schema.json) (JSON Schema, one definition a service), which the Helm
chart's `values.schema.json` is made of.
"""


def fields_of(settings_class: type[ServiceSettings]) -> dict[str, dict[str, Any]]:
    """Name to JSON schema, in the order of the class."""
    properties: dict[str, dict[str, Any]] = settings_class.model_json_schema()["properties"]
    return {name: without_title(schema) for name, schema in properties.items()}


def without_title(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "title"}


def variable_of(settings_class: type[ServiceSettings], name: str) -> str:
    """The environment variable of a setting."""
    return f"{settings_class.model_config.get('env_prefix', '')}{name}".upper()


def schema_document() -> dict[str, Any]:
    """All services' settings as JSON Schema: `$defs` by service, nothing else allowed in each."""
    definitions = {
        service: {
            "type": "object",
            "description": (settings_class.__doc__ or "").strip(),
            "additionalProperties": False,
            "properties": fields_of(settings_class),
        }
        for service, (settings_class, _) in SERVICES.items()
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": definitions}


def document() -> str:
    """The whole of docs/settings.md."""
    verifier, command = SERVICES["verifier"]
    name = "block_wait_ms"
    value = fields_of(verifier)[name]["default"]
    parts = [
        HEAD.format(
            service="verifier",
            example=name,
            value=value,
            variable=variable_of(verifier, name),
            command=command,
            flag=_flag(name),
        ),
        "## All three\n"
        "Certificates and tokens: [sdk.md](sdk.md) shows them at work.\n\n" + _table(ServiceSettings, COMMON),
    ]
    for service, (settings_class, start) in SERVICES.items():
        own = frozenset(settings_class.model_fields) - COMMON
        about = (settings_class.__doc__ or "").strip()
        prefix = settings_class.model_config.get("env_prefix", "")
        parts.append(
            f"## {service.capitalize()}\n{about} Started by `{start}`; environment `{prefix}…`.\n\n"
            + _table(settings_class, own)
        )
    return "\n".join(parts)


def _table(settings_class: type[ServiceSettings], names: frozenset[str]) -> str:
    rows = [_row(name, schema) for name, schema in fields_of(settings_class).items() if name in names]
    return "\n".join(["| setting | default | allowed | meaning |", "|---|---|---|---|", *rows, ""])


def _row(name: str, schema: dict[str, Any]) -> str:
    default = json.dumps(schema.get("default")) if schema.get("default") != "" else "empty"
    meaning = schema["description"].replace("|", "\\|")
    return f"| `{name}` | {default} | {_allowed(schema)} | {meaning} |"


def _allowed(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    kind = {"boolean": "true, false", "integer": "integer", "number": "number", "string": "text"}
    limits = [words.format(f"{schema[key]:,}") for key, words in BOUNDS.items() if key in schema]
    return "; ".join([kind.get(schema.get("type", ""), "see meaning"), *limits])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def files() -> dict[Path, str]:
    """What the two files should hold today."""
    return {DOC: document(), SCHEMA: json.dumps(schema_document(), indent=1, ensure_ascii=False) + "\n"}


def main() -> int:
    return write_or_check(files(), __doc__ or "")


def write_or_check(wanted: dict[Path, str], about: str) -> int:
    """The command line of a tool that generates files: rewrites them, or with --check says which are old (exit code 1)."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a file is out of date"
    )
    check = parser.parse_args().check
    old = [
        file
        for file, text in wanted.items()
        if not file.is_file() or file.read_text(encoding="utf-8") != text
    ]
    for file in old:
        if check:
            sys.stderr.write(f"{file.relative_to(ROOT)} is out of date; run `make format`\n")
        else:
            file.write_text(wanted[file], encoding="utf-8")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
