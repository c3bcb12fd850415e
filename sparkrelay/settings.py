"""One loader for every service's settings: a TOML file, then the environment, then the command line; the later one wins.

A service's settings are one frozen class whose fields have a default, a unit in their name and a description; flags, environment
names and `--help` follow from these alone. Values that were not given anywhere are the class's defaults.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

Settings = TypeVar("Settings", bound=BaseSettings)

HELP = """{about}

Every setting may also come from the environment ({prefix}NAME_IN_CAPITALS)
or from the file of --config (TOML: name_with_underscores = value)."""


class ServiceSettings(BaseSettings):
    """What the services' settings classes are made of. Making one in code reads no environment and no file: only `load` does.

    A subclass sets `model_config = SettingsConfigDict(env_prefix="SPARKRELAY_...")`.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    tls_cert: str = Field(
        "",
        description="PEM file with this service's certificate: it then speaks TLS alone. Also shown to services it dials.",
    )
    tls_key: str = Field("", description="PEM file with the key of tls_cert.")
    tls_client_ca: str = Field(
        "",
        description="PEM file with the CA that signs callers' certificates: callers without one are refused (mTLS).",
    )
    tls_ca: str = Field(
        "",
        description="PEM file with the CA that signs the verifiers' certificates: they are then dialled over TLS.",
    )
    token_file: str = Field(
        "",
        description="File with lines name:token, the bearer tokens that callers may show; empty asks for none.",
    )
    verifier_token_file: str = Field(
        "", description="File with a line name:token, the bearer token to show to verifiers; empty for none."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


class InvalidSettings(ValueError):
    """Settings that cannot be used; the message has one line a field: its name, what is wrong, and where the value came from."""


def load(
    settings_class: type[Settings],
    argv: Sequence[str],
    *,
    prog: str = "",
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of this process. `--help` prints them all and exits; a mistake prints what is wrong and exits with 2.

    argv     without the program's name: usually sys.argv[1:]
    prog     how the program is started, for the usage line
    environ  usually left out: the process's own
    """
    parser = _parser(prog)
    try:
        return read(settings_class, argv, os.environ if environ is None else environ, parser)
    except InvalidSettings as error:
        parser.exit(2, f"{parser.prog}: error: {error}\nSee {parser.prog} --help\n")


def read(
    settings_class: type[Settings],
    argv: Sequence[str],
    environ: Mapping[str, str],
    parser: argparse.ArgumentParser | None = None,
) -> Settings:
    """As `load`, but a wrong value raises InvalidSettings. An unknown flag is still argparse's usage error."""
    prefix = str(settings_class.model_config.get("env_prefix", ""))
    parser = _parser("") if parser is None else parser
    parser.description = HELP.format(about=(settings_class.__doc__ or "").strip(), prefix=prefix)
    flags = CliSettingsSource[Any](
        settings_class,
        root_parser=parser,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_prefix="",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    config_file = parser.parse_args(list(argv)).config
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    for source, found in (
        (f"file {config_file}", _file_values(config_file)),
        ("environment", _environment_values(settings_class, prefix, environ)),
        ("command line", dict(flags(args=list(argv))())),
    ):
        values |= found
        origins |= dict.fromkeys(found, source)
    try:
        return settings_class(**values)
    except ValidationError as error:
        raise InvalidSettings(_explain(error, origins)) from None


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or Path(sys.argv[0]).name,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", default="", help="a TOML file with settings")
    return parser


def _file_values(config_file: str) -> dict[str, Any]:
    if not config_file:
        return {}
    try:
        return tomllib.loads(Path(config_file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidSettings(f"config: cannot read {config_file}: {error}") from None


def _environment_values(
    settings_class: type[BaseSettings], prefix: str, environ: Mapping[str, str]
) -> dict[str, str]:
    """Known fields only: a cluster puts names of its own with the same prefix there (a Service's host and port)."""
    names = {name: f"{prefix}{name}".upper() for name in settings_class.model_fields}
    return {name: environ[variable] for name, variable in names.items() if variable in environ}


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"]) or "settings"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "there is no such setting"
        origin = f" (from {origins[name]}: {problem['input']!r})" if name in origins else ""
        lines.append(f"{name}: {message}{origin}")
    return "\n  ".join(lines)
