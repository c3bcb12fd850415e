"""Where a chat's questions come from: a person at a terminal, with history and editing, or the lines of a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from sparkrelay.cli.conversation import COMMANDS
from sparkrelay.cli.output import utf8

PROMPT = "> "
MORE = ". "
CONTINUED = "\\"


class Interrupted(Exception):
    """Ctrl-C while a question was written."""


def typed_line() -> str | None:
    """One question by a person; None for Ctrl-D. Raises Interrupted for Ctrl-C, after which one may ask again."""
    try:
        line = input(PROMPT)
        while line.endswith(CONTINUED):
            line = line[: -len(CONTINUED)] + "\n" + input(MORE)
    except EOFError:
        return None
    except KeyboardInterrupt:
        raise Interrupted from None
    return line


def piped_lines(source: IO[bytes]) -> Iterator[str]:
    """Each line of a pipe is a question; one that ends in a backslash goes on in the next."""
    held = ""
    for raw in source:
        line = utf8(raw).rstrip("\r\n")
        if line.endswith(CONTINUED):
            held += line[: -len(CONTINUED)] + "\n"
            continue
        yield held + line
        held = ""
    if held:
        yield held.rstrip("\n")


def enable_editing() -> None:
    """History of this chat and completion of commands, where Python has readline. Nothing is written to disk."""
    try:
        import readline
    except ImportError:
        return
    readline.set_completer_delims("")
    readline.set_completer(completed)
    # libedit, which macOS has, spells it in its own way.
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")


def completed(text: str, state: int) -> str | None:
    """The state-th command that begins like this."""
    found = [name for name in COMMANDS if name.startswith(text)] if text.startswith("/") else []
    return found[state] if state < len(found) else None
