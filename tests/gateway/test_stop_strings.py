"""Stop strings against a dumb second implementation that looks at one character at a time."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.stop_strings import StopMatch, StopStrings

SMALL_TEXT = st.text(alphabet="abé\n", max_size=40)
STRINGS = st.lists(st.text(alphabet="abé\n", min_size=1, max_size=5), max_size=4)


def brute_force(text: str, strings: list[str]) -> StopMatch | None:
    for end in range(1, len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return StopMatch(longest, end - len(longest))
    return None


def pieces(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(borders)]


@given(SMALL_TEXT, STRINGS, st.lists(st.integers(0, 40), max_size=10))
def test_the_match_and_the_shown_text_are_those_of_brute_force_however_the_text_is_cut(
    text: str, strings: list[str], cuts: list[int]
) -> None:
    stops = StopStrings(strings)
    shown = "".join(stops.feed(piece) for piece in pieces(text, cuts)) + stops.finish()
    expected = brute_force(text, strings)
    assert stops.match == expected
    assert shown == (text if expected is None else text[: expected.start])


@given(SMALL_TEXT, STRINGS)
def test_text_is_held_back_only_while_a_stop_string_may_begin_with_it(text: str, strings: list[str]) -> None:
    stops = StopStrings(strings)
    shown = ""
    for count, char in enumerate(text, start=1):
        shown += stops.feed(char)
        if stops.match is not None:
            return
        held = text[len(shown) : count]
        assert stops.safe_len == len(shown)
        assert not held or any(string.startswith(held) for string in strings)


def test_after_a_match_nothing_more_is_let_through() -> None:
    stops = StopStrings(["\n\n"])
    assert stops.feed("one\n") == "one"
    assert stops.feed("\ntwo") == ""
    assert stops.feed("three") == ""
    assert stops.finish() == ""
    assert stops.match == StopMatch("\n\n", 3)
