"""What a client is shown of a turn: all of it, in order, nothing of a stop string, and no token whose text is not out."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from gateway.detokenizer import ByteLevelDetokenizer
from gateway.turn_output import Delta, TurnOutput

STOP_ID = 0


@dataclass(frozen=True)
class Report:
    drafted_count: int = 4
    depth: int = 3
    accepted_count: int = 2


# Id -> bytes: whole characters, halves of é and of an emoji, several characters, nothing.
VOCABULARY = [
    b"",
    b"a",
    b"b",
    b"ab",
    b"\n",
    "é".encode()[:1],
    "é".encode()[1:],
    "🦊".encode()[:3],
    "🦊".encode()[3:],
    b"",
    b"ba\n",
]
IDS = st.lists(st.integers(1, len(VOCABULARY) - 1), max_size=30)
STRINGS = st.lists(st.text("ab\né", min_size=1, max_size=4), max_size=3)


def output_of(strings: list[str]) -> TurnOutput:
    return TurnOutput(
        hidden_ids=frozenset({STOP_ID}),
        detokenizer=ByteLevelDetokenizer(lambda token_id: VOCABULARY[token_id]),
        stop_strings=strings,
        include_rounds=True,
    )


def text_of(ids: list[int]) -> str:
    return b"".join(VOCABULARY[token_id] for token_id in ids).decode(errors="replace")


def run(output: TurnOutput, commits: list[list[int]]) -> list[Delta]:
    deltas = []
    for commit in commits:
        output.add(commit, [f"logprob of {token_id}" for token_id in commit], Report())
        deltas.append(output.take())
        if output.match:
            break
    deltas.append(output.take(final=True))
    return [delta for delta in deltas if delta is not None]


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    commits, start = [], 0
    for size in sizes:
        commits.append(ids[start : start + size])
        start += size
    return [*commits, ids[start:]]


@given(IDS, st.lists(st.integers(1, 4), max_size=8))
def test_without_stop_strings_every_token_is_shown_at_once_and_all_text_in_the_end(
    ids: list[int], sizes: list[int]
) -> None:
    output = output_of([])
    for commit in cut(ids, sizes):
        output.add(commit, (), None)
        delta = output.take()
        assert (delta.token_ids if delta else ()) == tuple(commit)
    assert output.shown_count == len(ids)
    deltas = run(output_of([]), cut(ids, sizes))
    assert "".join(delta.text for delta in deltas) == text_of(ids)
    assert output.discarded_count == 0


@given(IDS, STRINGS, st.lists(st.integers(1, 4), max_size=8))
def test_with_stop_strings_what_is_shown_ends_wholly_before_the_match(
    ids: list[int], strings: list[str], sizes: list[int]
) -> None:
    output = output_of(strings)
    deltas = run(output, cut(ids, sizes))
    shown = [token_id for delta in deltas for token_id in delta.token_ids]
    text = "".join(delta.text for delta in deltas)
    assert shown == ids[: len(shown)]
    assert [delta.index for delta in deltas] == [
        sum(len(before.token_ids) for before in deltas[:index]) for index in range(len(deltas))
    ]
    assert output.discarded_count == output.committed_count - len(shown)
    if output.match is None:
        assert (shown, text) == (ids, text_of(ids))
        assert not any(string in text for string in strings)
    else:
        assert text == text_of(ids)[: output.match.start]
        assert text.startswith(text_of(shown))
        assert not any(string in text for string in strings)


@given(IDS, STRINGS)
def test_a_delta_never_has_a_token_whose_text_may_yet_be_part_of_a_stop_string(
    ids: list[int], strings: list[str]
) -> None:
    output, shown_ids, shown_text = output_of(strings), [], ""
    for token_id in ids:
        output.add([token_id], (), None)
        delta = output.take()
        shown_ids += delta.token_ids if delta else ()
        shown_text += delta.text if delta else ""
        if strings:
            certain = ByteLevelDetokenizer(lambda token_id: VOCABULARY[token_id])
            assert shown_text.startswith("".join(certain.add(shown) for shown in shown_ids))
        if output.match:
            break


def test_an_id_that_ends_the_turn_is_counted_and_not_shown() -> None:
    output = output_of([])
    deltas = run(output, [[1, 2], [1, STOP_ID]])
    assert [delta.token_ids for delta in deltas] == [(1, 2), (1,)]
    assert "".join(delta.text for delta in deltas) == "aba"
    assert deltas[1].logprobs == ("logprob of 1",)
    assert (output.committed_count, output.shown_count, output.discarded_count) == (4, 3, 0)


def test_tokens_after_a_stop_string_are_discarded_but_their_round_is_reported() -> None:
    output = output_of(["b"])
    deltas = run(output, [[1, 2, 1, 1, STOP_ID]])
    assert [delta.token_ids for delta in deltas] == [(1,)]
    assert deltas[0].text == "a"
    assert output.match is not None
    assert output.match.string == "b"
    assert output.discarded_count == 3
    assert sum(len(delta.rounds) for delta in deltas) == output.totals.round_count == 1


def test_totals_count_rounds_that_are_not_shown() -> None:
    output = TurnOutput(hidden_ids=frozenset(), detokenizer=None, stop_strings=(), include_rounds=False)
    output.add([1], (), None)
    output.add([2, 3], (), Report())
    output.add([4], (), Report(drafted_count=1, depth=1, accepted_count=0))
    delta = output.take()
    assert delta is not None
    assert (delta.token_ids, delta.text, delta.rounds) == ((1, 2, 3, 4), "", ())
    totals = output.totals
    assert (totals.round_count, totals.drafted_count, totals.verified_count, totals.accepted_count) == (
        2,
        5,
        4,
        2,
    )
