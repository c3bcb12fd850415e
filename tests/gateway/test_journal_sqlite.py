"""The journal on disk: what one process wrote the next one gives again, whole or refused; a bad disk stops no answer."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparkrelay
from gateway.journal import Journal
from gateway.journal_sqlite import SqliteJournal
from gateway.servicer.journal_codec import EventCodec
from gateway.turn_output import Delta, RoundTotals, Timing, TurnSummary, Usage
from sparkrelay.client import NotFound, Overloaded
from sparkrelay.outcomes import FinishReason, Reason, Refusal
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import generation_pb2 as generation_pb
from tests.gateway.fake_verifier import continuation, running
from tests.gateway.test_journal import resumed

PROMPT = (5, 9, 11)

ACCEPTED = gateway_pb.TurnAccepted(turn_id="turn", model="toy", seed=2**64 - 1)
SUMMARY = TurnSummary(FinishReason.STOP, "\n", Usage(3, 1, 9, 2), Timing(5, 7, 1), RoundTotals(3, 12, 9, 5))
COMMITS = st.lists(
    st.tuples(st.lists(st.integers(0, 2**31 - 1), max_size=4), st.text(max_size=4)), max_size=12
)


def deltas_of(commits: list[tuple[list[int], str]]) -> list[Delta]:
    deltas, index, text_index = [], 0, 0
    for ids, text in commits:
        report = generation_pb.RoundReport(index=len(deltas), confidences=bytes(ids[:1] and [7]))
        logprobs = tuple(generation_pb.TokenLogprob(token_id=each, logprob=-0.5) for each in ids)
        ends = (text_index + len(text),) * len(ids)
        deltas.append(Delta(index, tuple(ids), text, logprobs, (report,), text_index, ends))
        index, text_index = index + len(ids), text_index + len(text)
    return deltas


def opened(folder: Path, keep_s: float = 100.0) -> SqliteJournal:
    return SqliteJournal(folder / "journal.db", EventCodec(), keep_s, time.time)


def written(store: SqliteJournal, deltas: list[Delta], end: TurnSummary | Refusal | None) -> None:
    journal = Journal(10**9, 10**9, store)
    turn = journal.open("turn", "trace")
    journal.accept(turn, ACCEPTED)
    for delta in deltas:
        journal.add(turn, delta)
    if end is not None:
        journal.end(turn, end, 0)


@given(commits=COMMITS)
@settings(max_examples=30, deadline=None)
def test_what_one_process_wrote_another_gives_again(
    commits: list[tuple[list[int], str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, deltas = tmp_path_factory.mktemp("journal"), deltas_of(commits)
    first = opened(folder)
    written(first, deltas, SUMMARY)
    first.close()
    second = opened(folder)
    found = second.load("turn")
    assert found is not None
    assert (found.trace_id, found.accepted, found.end) == ("trace", ACCEPTED, SUMMARY)
    assert [found.delta(number) for number in range(found.delta_count)] == deltas
    assert resumed(found, found.token_count // 2) is not None
    assert second.load("another") is None
    second.close()


def test_a_turn_that_the_restart_cut_off_says_so_after_what_was_written(tmp_path: Path) -> None:
    first, deltas = opened(tmp_path), deltas_of([([1, 2], "ab"), ([3], "c")])
    written(first, deltas, None)
    first.flush()  # and then it is killed
    found = opened(tmp_path).load("turn")
    assert found is not None and found.token_count == 3
    assert isinstance(found.end, Refusal)
    assert (found.end.reason, found.end.turn_id, found.end.trace_id) == (Reason.RESUME_LOST, "turn", "trace")
    first.close()


def test_a_turn_that_failed_is_kept_with_its_reason(tmp_path: Path) -> None:
    store = opened(tmp_path)
    written(store, [], Refusal(Reason.VERIFIER_LOST, "it was lost"))
    store.flush()
    found = store.load("turn")
    assert found is not None and isinstance(found.end, Refusal)
    assert (found.end.reason, found.end.message) == (Reason.VERIFIER_LOST, "it was lost")
    store.close()


def test_a_row_that_is_missing_makes_the_rest_lost_and_never_skipped(tmp_path: Path) -> None:
    store = opened(tmp_path)
    written(store, deltas_of([([1], "a"), ([2], "b"), ([3], "c")]), SUMMARY)
    store.close()
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        connection.execute("DELETE FROM deltas WHERE number = 1")
    connection.close()
    found = opened(tmp_path).load("turn")
    assert found is not None and isinstance(found.end, Refusal)
    assert (found.end.reason, found.token_count) == (Reason.RESUME_LOST, 0)


def test_what_is_old_is_forgotten(tmp_path: Path) -> None:
    store = opened(tmp_path, keep_s=-1.0)
    written(store, deltas_of([([1], "a")]), SUMMARY)
    store.flush()
    store.close()
    again = opened(tmp_path, keep_s=-1.0)
    written(again, [], None)  # any row: the thread looks around when it has something to do
    again.flush()
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        assert connection.execute("SELECT count(*) FROM deltas").fetchone() == (0,)
    connection.close()
    again.close()


def test_a_disk_that_cannot_be_written_is_said_and_stops_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        connection.execute("DROP TABLE deltas")
    connection.close()
    written(store, deltas_of([([1], "a")]), SUMMARY)
    store.flush()
    assert "deltas" in store.broken
    written(store, deltas_of([([1], "a")]), SUMMARY)
    store.close()


async def test_a_turn_is_resumed_at_the_gateway_that_comes_after(tmp_path: Path) -> None:
    store = opened(tmp_path)
    async with running(store=store) as stack, sparkrelay.aio.connect(stack.address) as client:
        whole = await client.generate(token_ids=PROMPT, max_tokens=9, include_rounds=True, logprobs=0)
    async with (
        running({"hold_after": 4}, store=store) as stack,
        sparkrelay.aio.connect(stack.address) as client,
    ):
        broken = client.generate_stream(token_ids=PROMPT, max_tokens=9)
        async with broken:
            turn_id = broken.started.turn_id
            await anext(aiter(broken))
            store.flush()
            seen = await asyncio.to_thread(store.load, turn_id)
            assert seen is not None and seen.token_count > 0
    store.close()
    later = opened(tmp_path)
    async with running(store=later) as stack, sparkrelay.aio.connect(stack.address) as client:
        again = await client.resume(whole.turn_id).result()
        assert again == whole
        assert (await client.resume(whole.turn_id, 7).result()).token_ids == whole.token_ids[7:]
        with pytest.raises(NotFound, match="same seed"):
            await client.resume("a turn that never was").result()
    later.close()


async def test_a_gateway_that_must_write_takes_no_resumable_turns_while_it_cannot(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store._break(OSError("the disk is full"))
    async with (
        running(store=store, journal_required=True) as stack,
        sparkrelay.aio.connect(stack.address) as client,
    ):
        with pytest.raises(Overloaded, match="the disk is full") as refused:
            await client.generate(token_ids=PROMPT, max_tokens=3)
        assert refused.value.retry_after > 0
        whole = await client.generate(token_ids=PROMPT, max_tokens=3, resume=False)
        assert whole.token_ids == continuation(PROMPT, 3)
    async with running(store=store) as stack, sparkrelay.aio.connect(stack.address) as client:
        assert (await client.generate(token_ids=PROMPT, max_tokens=3)).token_ids == continuation(PROMPT, 3)
    store.close()
