"""What a terminal shows of an answer, on a terminal that only exists here."""

from __future__ import annotations

import io

import pyte
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkrelay.cli.answer_meter import BARS, DIGITS, AnswerMeter, reading_line
from sparkrelay.cli.chat_view import PipeView, TerminalView, can_write
from sparkrelay.cli.stream_wrap import StreamWrap
from sparkrelay.client.results import Delta
from tests.cli.chat_fakes import report, started

pieces = st.lists(st.text(alphabet="abc d\n日", max_size=12), min_size=1, max_size=40)


def terminal(columns: int, rows: int) -> tuple[io.StringIO, TerminalView]:
    output = io.StringIO()
    return output, TerminalView(output, lambda: columns, colours=False)


def screen_of(written: str, columns: int, rows: int) -> pyte.Screen:
    screen = pyte.Screen(columns, rows)
    screen.set_mode(pyte.modes.LNM)  # a terminal's driver makes CR LF of LF
    pyte.Stream(screen).feed(written)
    return screen


def lines_of(screen: pyte.Screen) -> list[str]:
    # pyte puts an empty cell after each wide character.
    return [line.rstrip() for line in screen.display]


@settings(max_examples=60)
@given(pieces, st.integers(24, 50), st.integers(3, 8))
def test_the_text_is_whole_however_often_the_status_was_drawn_over_the_line_below(
    texts: list[str], columns: int, rows: int
) -> None:
    output, view = terminal(columns, rows)
    view.started(started())
    for index, text in enumerate(texts):
        view.delta(Delta(index, (1,), text, rounds=(report(index),)), float(index))
        shown = lines_of(screen_of(output.getvalue(), columns, rows))
        assert sum("tokens/s" in line for line in shown) == 1, "the status stands exactly once"
    view.ended("[over]")
    wrap = StreamWrap(columns - 1)
    expected = (wrap.feed("".join(texts)) + wrap.flush()).split("\n")
    shown = lines_of(screen_of(output.getvalue(), columns, rows))
    assert not any("tokens/s" in line for line in shown)
    wanted = [line.rstrip() for line in [*expected, "[over]", ""]][-rows:]
    assert shown[: len(wanted)] == wanted


def test_the_status_is_on_the_line_below_the_text() -> None:
    output, view = terminal(60, 10)
    view.started(started(prompt=12, cached=5))
    assert lines_of(screen_of(output.getvalue(), 60, 10))[1] == "reading 7 tokens, 5 kept ..."
    view.delta(Delta(0, (1,), "one ", rounds=(report(0, 4, 4),)), 1.0)
    view.delta(Delta(1, (2, 3), "two ", rounds=(report(1, 4, 0), report(2, 0, 0))), 2.0)
    assert lines_of(screen_of(output.getvalue(), 60, 10))[:2] == [
        "one two",
        "3 tokens  2.0 tokens/s  2.33 a round  70.",
    ]


def test_escape_sequences_of_a_model_do_not_reach_the_terminal() -> None:
    output, view = terminal(60, 5)
    view.started(started())
    view.delta(Delta(0, (1,), "a\x1b[2J\x07\u009b31m\tb "), 1.0)
    view.ended("")
    assert "\x1b[2J" not in output.getvalue() and "\x07" not in output.getvalue()
    assert lines_of(screen_of(output.getvalue(), 60, 5))[0] == r"a\x1b[2J\x07\x9b31m    b"


def test_a_pipe_gets_the_text_as_it_is_and_the_rest_elsewhere() -> None:
    output, said = io.StringIO(), []
    view = PipeView(output, said.append)
    view.started(started())
    view.delta(Delta(0, (1,), "a\x1b b\n"), 0.0)
    view.ended("[over]")
    assert (output.getvalue(), said) == ("a\x1b b\n\n", ["[over]"])


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60), st.integers(1, 90))
def test_the_status_line_fits_and_shows_the_latest_rounds(rounds: list[tuple[int, int]], width: int) -> None:
    meter = AnswerMeter(BARS)
    for index, (depth, accepted) in enumerate(rounds):
        meter.add(Delta(index, (1,), "", rounds=(report(index, depth, min(depth, accepted)),)), index / 10)
    line = meter.line(width)
    assert len(line) <= width
    if rounds and width == 90:
        depth, accepted = rounds[-1]
        assert line[-1] == ("." if depth == 0 else BARS[min(depth, accepted) * 7 // depth])


def test_a_full_round_is_the_highest_bar_an_empty_one_the_lowest() -> None:
    meter = AnswerMeter(BARS)
    meter.add(Delta(0, (1,), "", rounds=(report(0, 5, 5), report(1, 5, 0), report(2, 0, 0))), 0.0)
    assert meter.line(80).endswith("█▁.")
    assert len(reading_line(started(), 10)) == 10


def test_an_output_without_these_characters_gets_digits() -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert not can_write(ascii_only, BARS) and can_write(ascii_only, DIGITS)
