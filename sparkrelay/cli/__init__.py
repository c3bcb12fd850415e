"""The command `sparkrelay`: the composition root, the one place that may bring services together.

Every file in this folder that has a function `register(app)` is a command (or a group of commands) and stands in COMMANDS. Heavy
imports stand inside the command's own function, so `--help` needs no grpc and a missing extra is one sentence, not a traceback.

Exit codes: 0 done, 1 could not be done (the last lines on stderr say why and what to do), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata

import typer

from sparkrelay.cli.options import examples, paragraphs
from sparkrelay.store import StoreError

HELP = """Lossless speculative decoding: a small model drafts, the big one checks and has the last word.

Exit codes: 0 done, 1 refused or failed (stderr says why and what to do), 2 wrong usage, 130 interrupted.

Completion of commands and options in your shell: sparkrelay --install-completion
"""
EXAMPLES = examples(
    "sparkrelay models pull smollm2-135m     fetch a small chat model",
    "sparkrelay up                           start the three services here",
    "sparkrelay chat                         talk, in another terminal",
    'sparkrelay generate --prompt "Hello"    one answer',
    "sparkrelay doctor                       what is wrong, what to do",
)

# Files of this folder with a function `register(app)`, in the order of `--help`.
COMMANDS = (
    "up",
    "demo",
    "doctor",
    "chat",
    "generate",
    "models",
    "sessions",
    "turns",
    "workers",
    "train",
    "calibrate",
)

# Which extra brings the package that an import did not find.
EXTRA_OF_PACKAGE = {
    "gguf": "verifier",
    "huggingface_hub": "verifier",
    "jinja2": "gateway",
    "llguidance": "verifier",
    "numpy": "verifier",
    "redis": "gateway",
    "safetensors": "verifier",
    "starlette": "openai",
    "tokenizers": "gateway",
    "torch": "verifier",
    "transformers": "verifier",
    "uvicorn": "openai",
}


def main() -> None:
    """The console script: runs the command line of this process and exits with its code."""
    try:
        build_app()()
    except StoreError as error:
        _fail(error.message, error.next_step)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRA_OF_PACKAGE:
            raise
        extra = EXTRA_OF_PACKAGE[package]
        _fail(f"This command needs the package {package}.", f"Install it: pip install 'sparkrelay[{extra}]'")


def build_app() -> typer.Typer:
    """The whole command line: the root options and every command in this folder."""
    app = typer.Typer(
        name="sparkrelay",
        help=paragraphs(HELP),
        epilog=EXAMPLES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback()(_root)
    for command in COMMANDS:
        importlib.import_module(f"{__name__}.{command}").register(app)
    return app


def installed_version() -> str:
    """The version of the installed distribution; a checkout that was never installed has none."""
    try:
        return metadata.version("sparkrelay")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sparkrelay {installed_version()}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def _fail(message: str, next_step: str) -> None:
    print(f"error: {message}\n{next_step}", file=sys.stderr)
    sys.exit(1)
