"""Where a chat's answers appear: a terminal with a live status line, a pipe, or nowhere (`--json`).

The status line stands on the line below the text. Before more text is written it is erased, and the cursor never leaves the
text's end for longer than one write: whatever kills this process leaves an ordinary terminal behind.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

from sparkrelay.cli.answer_meter import BARS, DIGITS, AnswerMeter, reading_line
from sparkrelay.cli.output import for_terminal, tell
from sparkrelay.cli.stream_wrap import StreamWrap

if TYPE_CHECKING:
    from sparkrelay.client.results import Delta, TurnStarted

ERASE_BELOW = "\x1b[J"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"

Columns = Callable[[], int]


class ChatView(Protocol):
    """What the chat shows; all of it may be called at any time between two answers."""

    def say(self, text: str) -> None:
        """Something by the chat itself."""
        ...

    def started(self, turn: TurnStarted) -> None: ...

    def delta(self, delta: Delta, now: float) -> None: ...

    def ended(self, summary: str) -> None:
        """The answer is over, however it ended; `summary` may be empty."""
        ...


class PipeView:
    """Answers to stdout as they are, all else to stderr."""

    def __init__(self, output: TextIO, say: Callable[[str], None] = tell) -> None:
        self._output = output
        self.say = say

    def started(self, turn: TurnStarted) -> None:
        pass

    def delta(self, delta: Delta, now: float) -> None:
        self._output.write(delta.text)
        self._output.flush()

    def ended(self, summary: str) -> None:
        self._output.write("\n")
        self._output.flush()
        if summary:
            self.say(summary)


class SilentView:
    """Shows messages only: the answers are printed as one JSON value at the end."""

    def say(self, text: str) -> None:
        tell(text)

    def started(self, turn: TurnStarted) -> None:
        pass

    def delta(self, delta: Delta, now: float) -> None:
        pass

    def ended(self, summary: str) -> None:
        pass


class TerminalView:
    """Answers broken between words, and below them how fast they come and what each round accepted."""

    def __init__(self, output: TextIO, columns: Columns, *, colours: bool) -> None:
        self._output = output
        self._columns = columns
        self._dim, self._plain = (DIM, PLAIN) if colours else ("", "")
        self._bars = BARS if can_write(output, BARS) else DIGITS
        self._wrap = StreamWrap(columns() - 1)
        self._meter = AnswerMeter(self._bars)

    def say(self, text: str) -> None:
        wrap = StreamWrap(self._columns() - 1)
        broken = wrap.feed(for_terminal(text)) + wrap.flush()
        self._write(f"{self._dim}{broken}{self._plain}\n")

    def started(self, turn: TurnStarted) -> None:
        self._wrap = StreamWrap(self._columns() - 1)
        self._meter = AnswerMeter(self._bars)
        self._write(self._status(reading_line(turn, self._columns() - 1)))

    def delta(self, delta: Delta, now: float) -> None:
        width = self._columns() - 1
        self._wrap.resize(width)
        self._meter.add(delta, now)
        text = self._wrap.feed(for_terminal(delta.text))
        self._write(ERASE_BELOW + text + self._status(self._meter.line(width)))

    def ended(self, summary: str) -> None:
        self._write(ERASE_BELOW + self._wrap.flush() + "\n")
        if summary:
            self.say(summary)

    def _status(self, line: str) -> str:
        """Writes below the text and comes back to its end. The newline makes room where there is none."""
        forward = f"\x1b[{self._wrap.column}C" if self._wrap.column else ""
        return f"\n{self._dim}{line}{self._plain}\x1b[1A\r{forward}"

    def _write(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()


def can_write(output: TextIO, text: str) -> bool:
    """Whether the output's encoding has these characters."""
    try:
        text.encode(output.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def terminal_columns() -> int:
    """How wide the terminal is now."""
    return shutil.get_terminal_size().columns


def view_for(*, as_json: bool, colours: bool, is_live: bool) -> ChatView:
    """is_live: stdout is a terminal that understands cursor movements."""
    if as_json:
        return SilentView()
    if is_live:
        return TerminalView(sys.stdout, terminal_columns, colours=colours)
    return PipeView(sys.stdout)
