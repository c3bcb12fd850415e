"""The log of a turn: cut anywhere, nothing is lost and nothing comes twice; and it never outgrows its bound in silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.detokenizer import ByteLevelDetokenizer
from gateway.journal import LOG_BYTES, Journal, TurnLog
from gateway.turn_output import Delta, RoundTotals, Timing, TurnOutput, TurnSummary, Usage
from sparkrelay.outcomes import FinishReason, Reason, Refusal
from tests.gateway.test_turn_output import IDS, STRINGS, VOCABULARY, Report, cut

SUMMARY = TurnSummary(FinishReason.LENGTH, "", Usage(), Timing(), RoundTotals())
SIZES = st.lists(st.integers(1, 4), max_size=8)


def deltas_of(ids: list[int], sizes: list[int], strings: list[str]) -> list[Delta]:
    """A turn's deltas, with halves of characters, text that runs ahead of tokens, and a last delta without tokens."""
    output = TurnOutput(
        hidden_ids=frozenset(),
        detokenizer=ByteLevelDetokenizer(lambda token_id: VOCABULARY[token_id]),
        stop_strings=strings,
        include_rounds=True,
    )
    deltas = []
    for commit in cut(ids, sizes):
        output.add(commit, [f"logprob of {token_id}" for token_id in commit], Report())
        deltas.append(output.take())
    deltas.append(output.take(final=True))
    return [delta for delta in deltas if delta is not None]


def log_of(deltas: list[Delta]) -> TurnLog:
    log = TurnLog("turn", "trace")
    for delta in deltas:
        log.add(delta)
    return log


def resumed(log: TurnLog, next_index: int) -> list[Delta]:
    point = log.resume_point(next_index)
    rest = (point.cut(log.delta(number)) for number in range(point.number, log.delta_count))
    return [delta for delta in rest if delta is not None]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@given(IDS, SIZES, STRINGS, st.data())
def test_a_resume_from_any_token_gives_the_rest_of_tokens_logprobs_and_text(
    ids: list[int], sizes: list[int], strings: list[str], data: st.DataObject
) -> None:
    deltas = deltas_of(ids, sizes, strings)
    tokens, text = tokens_of(deltas), text_of(deltas)
    log = log_of(deltas)
    next_index = data.draw(st.integers(0, len(tokens)))
    rest = resumed(log, next_index)
    assert tokens_of(rest) == tokens[next_index:]
    assert [each for delta in rest for each in delta.logprobs] == [
        f"logprob of {t}" for t in tokens[next_index:]
    ]
    assert text.endswith(text_of(rest))
    if rest:
        assert rest[0].text_index == len(text) - len(text_of(rest))
    assert text[: len(text) - len(text_of(rest))] == text[: log.resume_point(next_index).text_index]


@given(IDS, SIZES, STRINGS, st.data())
def test_what_a_client_has_after_any_number_of_deltas_and_the_rest_make_the_whole(
    ids: list[int], sizes: list[int], strings: list[str], data: st.DataObject
) -> None:
    deltas = deltas_of(ids, sizes, strings)
    seen = deltas[: data.draw(st.integers(0, len(deltas)))]
    rest = resumed(log_of(deltas), len(tokens_of(seen)))
    assert tokens_of(seen) + tokens_of(rest) == tokens_of(deltas)
    known = len(text_of(seen))
    fresh = "".join(delta.text[max(0, known - delta.text_index) :] for delta in rest)
    assert text_of(seen) + fresh == text_of(deltas)
    assert all(delta.text_index <= known for delta in rest[:1]), "no character is left out"
    assert sum(len(delta.rounds) for delta in rest) >= sum(len(delta.rounds) for delta in deltas[len(seen) :])


@given(IDS, SIZES, STRINGS, st.data())
def test_after_the_first_deltas_are_given_up_a_resume_is_right_or_refused(
    ids: list[int], sizes: list[int], strings: list[str], data: st.DataObject
) -> None:
    deltas = deltas_of(ids, sizes, strings)
    whole, log = log_of(deltas), log_of(deltas)
    count = data.draw(st.integers(0, len(deltas)))
    assert all(log.drop_first() for _ in range(count))
    for next_index in range(len(tokens_of(deltas)) + 1):
        if whole.resume_point(next_index).number < count:
            with pytest.raises(Refusal) as lost:
                log.resume_point(next_index)
            assert lost.value.reason is Reason.RESUME_LOST
        else:
            assert resumed(log, next_index) == resumed(whole, next_index)


def test_a_token_that_was_never_made_cannot_be_resumed_from() -> None:
    log = log_of(deltas_of([1, 2, 3], [], []))
    assert resumed(log, 3) == []
    with pytest.raises(Refusal, match="only 3 tokens") as lost:
        log.resume_point(4)
    assert lost.value.reason is Reason.RESUME_LOST


def test_turns_that_are_over_go_first_then_the_growing_turn_loses_its_own_beginning() -> None:
    delta = deltas_of([1], [], [])[0]
    size = log_of([delta]).size_bytes - LOG_BYTES
    journal = Journal(limit_bytes=3 * LOG_BYTES + 3 * size, keep_us=100)
    for name in ("first", "second"):
        log = journal.open(name, "trace")
        journal.add(log, delta)
        journal.end(log, SUMMARY, 0)
    growing = journal.open("growing", "trace")
    journal.add(growing, delta)
    assert len(journal) == 3
    journal.add(growing, delta)
    assert journal.find("first") is None and journal.find("second") is not None
    for _ in range(10):
        journal.add(growing, delta)
    assert journal.find("second") is None
    assert growing.dropped_count > 0
    assert journal.size_bytes <= 3 * LOG_BYTES + 3 * size
    assert journal.size_bytes == sum(log.size_bytes for log in journal.logs())


def test_a_turn_that_is_over_is_kept_for_its_time() -> None:
    journal = Journal(limit_bytes=10**6, keep_us=100)
    log, running = journal.open("over", "trace"), journal.open("running", "trace")
    journal.end(log, SUMMARY, 50)
    journal.expire(150)
    assert journal.find("over") is log
    journal.expire(151)
    assert journal.find("over") is None
    assert journal.find("running") is running
    assert journal.size_bytes == running.size_bytes
