"""Records docs/chat.svg: `sparkrelay chat` on a terminal, against a real stack, while an answer comes.

    python tools/record_chat.py

Starts the demo model with a prompt-lookup drafter on free ports, types, and draws the screen from the bytes that the program
wrote. The figures in the picture are those of the machine that recorded it. Needs the extra `dev` and the demo model.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

from sparkrelay.cli.demo import TEXT
from sparkrelay.cli.stack import Stack
from sparkrelay.cli.stack_plan import StackOptions, any_free_port, plan_stack
from sparkrelay.cli.up import core_count
from tools.pty_screen import CTRL_D, PtyScreen

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "chat.svg"
COLUMNS, ROWS = 84, 40
# A rewrite: prompt lookup drafts from what was read, so it helps here.
FIRST = f"Rewrite this text in the past tense: {TEXT}"
SECOND = "Good. Now add what the keeper does when a ship comes."
# Rounds of the second answer after which the picture is taken: some bars, and not all of the text.
ROUNDS = 12
# pyte knows no dim letters; grey ones look alike.
DIM, GREY = b"\x1b[2m", b"\x1b[90m"
COLOURS = {"brightblack": "#9a9a92", "brown": "yellow"}
FONT_FILES = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def main() -> None:
    """Starts the stack, talks, writes the picture."""
    options = StackOptions(model="smollm2-135m", drafter="ngram")
    plan = plan_stack(options, core_count(), any_free_port)
    with tempfile.TemporaryDirectory(prefix="sparkrelay-chat-") as folder, Stack(plan, Path(folder)) as stack:
        stack.wait_until_ready(print)
        written = talk(stack.gateway)
    PICTURE.write_text(picture(written), encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1000:.0f} kB")


def talk(gateway: str) -> bytes:
    """What the program had written in the middle of the second answer."""
    command = [sys.executable, "-m", "sparkrelay", "chat", "--gateway", gateway, "--max-tokens", "90"]
    with PtyScreen(command, columns=COLUMNS, rows=ROWS) as person:
        person.expect(">")
        # An answer that is not in the picture: the first one on a machine is slow.
        person.type(f"{FIRST}\n")
        answered(person, 1)
        person.type("/reset\n")
        person.expect("A new conversation begins.")
        person.wait_until(lambda: person.text.endswith(">"), "prompt")
        unseen = len(person.written)
        person.type(f"{FIRST}\n")
        answered(person, 2)
        person.type(f"{SECOND}\n")
        seen = watched(person, 3)
        person.type(CTRL_D)
        assert person.wait_for_exit() == 0
    introduction = seen[: seen.index(b"> ")]
    return introduction + b"> " + seen[unseen:]


def answered(person: PtyScreen, count: int) -> None:
    """So many answers are complete."""
    person.wait_until(lambda: answers(person.text) >= count, f"{count} answers", 120)


def watched(person: PtyScreen, count: int) -> bytes:
    """The same; returns what was written when the last of them had ROUNDS rounds, or as many as it came to."""
    by_rounds: dict[int, bytes] = {}

    def look() -> bool:
        by_rounds[bars(person.text)] = person.written
        return answers(person.text) >= count

    person.wait_until(look, f"{count} answers", 120)
    return by_rounds[max(shown for shown in by_rounds if shown <= ROUNDS)]


def answers(text: str) -> int:
    return len(re.findall(r"\[\d+ tokens", text))


def bars(text: str) -> int:
    """Rounds in the status line."""
    return max((len(found) for found in re.findall(r"a round  ([▁▂▃▄▅▆▇█.]+)", text)), default=0)


def picture(written: bytes) -> str:
    """The screen after these bytes, as an SVG that loads nothing."""
    screen = pyte.Screen(COLUMNS, ROWS)
    pyte.ByteStream(screen).feed(written.replace(DIM, GREY))
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), legacy_windows=False)
    rows = [row_text(screen.buffer[number], COLUMNS) for number in range(ROWS)]
    while rows and not rows[-1].plain.strip():
        rows.pop()
    for row in rows:
        console.print(row, no_wrap=True, highlight=False, crop=True)
    svg = console.export_svg(title="sparkrelay chat", theme=MONOKAI)
    return FONT_FILES.sub("", svg)


def row_text(row: Mapping[int, pyte.screens.Char], columns: int) -> Text:
    """One line of the screen with its styles."""
    text = Text()
    for column in range(columns):
        cell = row[column]
        colour = COLOURS.get(cell.fg, cell.fg)
        text.append(cell.data, Style(color=None if colour == "default" else colour, bold=cell.bold or None))
    text.rstrip()
    return text


if __name__ == "__main__":
    main()
