"""Breaking text that comes in pieces: nothing lost, nothing too wide, and the pieces do not matter."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from sparkrelay.cli.stream_wrap import NARROWEST, StreamWrap

ALPHABET = "ab .\n é日😀"
texts = st.text(alphabet=ALPHABET, max_size=120)
widths = st.integers(NARROWEST, 30)


def wrapped(text: str, width: int) -> str:
    wrap = StreamWrap(width)
    return wrap.feed(text) + wrap.flush()


@given(texts, widths, st.lists(st.integers(0, 120), max_size=8))
def test_how_the_text_is_cut_into_pieces_does_not_matter(text: str, width: int, cuts: list[int]) -> None:
    wrap = StreamWrap(width)
    borders = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(borders)]
    assert "".join(wrap.feed(piece) for piece in pieces) + wrap.flush() == wrapped(text, width)


@given(texts, widths)
def test_no_line_is_wider_than_asked_and_the_column_is_known(text: str, width: int) -> None:
    wrap = StreamWrap(width)
    shown = ""
    for character in text:
        shown += wrap.feed(character)
        assert wrap.column == cell_len(shown.rpartition("\n")[2])
    shown += wrap.flush()
    assert all(cell_len(line) <= width for line in shown.split("\n"))


@given(texts, widths)
def test_only_blanks_and_line_breaks_differ_from_the_text(text: str, width: int) -> None:
    assert "".join(wrapped(text, width).split()) == "".join(text.split())


def test_words_are_kept_whole_and_long_ones_are_broken() -> None:
    assert wrapped("one two three four", 10) == "one two\nthree four"
    assert wrapped("abcdefghijklmnop", 10) == "abcdefghij\nklmnop"
    assert wrapped("a\n\n  b", 10) == "a\n\n  b"
    assert wrapped("日本語日本語", 10) == "日本語日本\n語"


def test_at_most_one_word_is_held_back() -> None:
    wrap = StreamWrap(40)
    assert wrap.feed("one tw") == "one"
    assert wrap.feed("o ") == " two"
    assert wrap.flush() == ""
