"""What commands print: results on stdout, everything else on stderr, errors in one form with one exit code.

With `--json` stdout is exactly one JSON value. Colours only on a terminal, and not with NO_COLOR.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sparkrelay.client.errors import SparkRelayError

REFUSED = 1
INTERRUPTED = 130

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_SAFE = str.maketrans({**_CONTROL, ord("\n"): "\n", ord("\t"): "    ", ord("\r"): ""})


@contextmanager
def reported() -> Iterator[None]:
    """Turns what the gateway refuses into a text on stderr and exit code 1, and Ctrl-C into exit code 130."""
    from sparkrelay.client.errors import SparkRelayError

    try:
        yield
    except SparkRelayError as error:
        tell(explain(error))
        raise typer.Exit(REFUSED) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def explain(error: SparkRelayError) -> str:
    """What happened, each field at fault with its limit, when to try again, and how to find it in logs and traces."""
    lines = [f"error: {error.message}"]
    lines += [
        f"  {each.field}: {each.message}"
        for each in error.violations
        if each.message not in error.message or each.field not in error.message
    ]
    if error.retry_after:
        lines.append(f"  Try again in {error.retry_after:.1f} s.")
    where = [("reason", error.reason), ("turn", error.turn_id), ("trace", error.trace_id)]
    known = [f"{name} {value}" for name, value in where if value and value != "UNSPECIFIED"]
    if known:
        lines.append(f"  ({', '.join(known)})")
    return "\n".join(lines)


def print_json(value: Any) -> None:
    """The one value on stdout."""
    print(json.dumps(value))


def tell(line: str) -> None:
    """A message that is no result."""
    print(line, file=sys.stderr, flush=True)


def console() -> Console:
    """Where tables and coloured words go: stdout, plain when it is no terminal. Numbers get no colours of their own."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def utf8(content: bytes) -> str:
    """What was piped in. Raises typer.BadParameter if it is no text."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"stdin is not UTF-8 text: {error.reason} at byte {error.start}") from None


def show(markup: str) -> None:
    """Lines with rich's markup, broken between words on a terminal and whole in a pipe."""
    target = console()
    target.print(markup, soft_wrap=not target.is_terminal)


def has_colours(environment: Mapping[str, str], *, is_terminal: bool) -> bool:
    """Whether escape sequences for colours are welcome (no-color.org; a dumb terminal knows none)."""
    return is_terminal and not environment.get("NO_COLOR") and environment.get("TERM", "") != "dumb"


def for_terminal(text: str) -> str:
    """Generated text without what would move the cursor or change the terminal: control characters become visible."""
    return text.translate(_SAFE)


def count(number: int, word: str) -> str:
    """3 tokens, 1 token."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
