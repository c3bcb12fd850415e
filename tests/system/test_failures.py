"""Any one process killed at any moment: the others stay healthy and say so; started again, everything works as before."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from sparkrelay.cli.stack import Stack, health_of
from sparkrelay.client.blocking import Client, GenerationStream, connect
from sparkrelay.client.errors import ResumeLost, Unavailable
from sparkrelay.client.results import Delta
from sparkrelay.server import CHANNEL_OPTIONS
from sparkrelay.v1 import verifier_service_pb2, verifier_service_pb2_grpc
from tests.system.conftest import TOY, StartStack, drafter_state, wait_until, worker_state

pytestmark = pytest.mark.system

WITH_DRAFTER = replace(TOY, drafter="ngram")
LONG_TURN: dict[str, Any] = {
    "token_ids": [7, 3, 9, 7, 3, 9, 7, 3],
    "max_tokens": 3500,
    "ignore_default_stop_ids": True,
    "include_rounds": True,
}
SHORT_TURN = {**LONG_TURN, "max_tokens": 64}
MOMENTS = (0, 1, 5, 20)  # deltas that have come when the process is killed; 0: the turn was just accepted


def healthy(stack: Stack, *names: str) -> bool:
    return all(health_of(stack.children[name].plan.health_listen, "liveness") for name in names)


def after_deltas(stream: GenerationStream, count: int) -> Iterator[Delta]:
    """Reads so many deltas. Keep the iterator that it returns: leaving it would cancel the turn."""
    deltas = iter(stream)
    for _ in range(count):
        next(deltas)
    return deltas


def works_with_drafts(client: Client) -> None:
    """A short turn is plain decoding's, and drafted."""
    plain = client.generate(**SHORT_TURN, speculation="off")
    drafted = client.generate(**SHORT_TURN)
    assert drafted.token_ids == plain.token_ids
    assert drafted.totals.drafted > 0


def ready_again(stack: Stack) -> Callable[[], bool]:
    """True when all services are ready and the drafter is connected."""
    return lambda: healthy(stack, *stack.children) and stack.drafters_are_connected()


def test_a_verifier_killed_at_any_moment_is_told_to_the_client_and_comes_back(own_stack: StartStack) -> None:
    stack = own_stack(WITH_DRAFTER)
    with connect(stack.gateway) as client:
        for moment in MOMENTS:
            with client.generate_stream(**LONG_TURN) as stream:
                _deltas = after_deltas(stream, moment)
                stack.kill("verifier")
                with pytest.raises(Unavailable) as error:
                    _ = stream.result
            assert error.value.reason == "VERIFIER_LOST"
            assert error.value.turn_id == stream.started.turn_id
            assert error.value.trace_id == stream.started.trace_id
            wait_until(lambda: worker_state(client) == "lost")
            assert healthy(stack, "gateway", "drafter-1")
            with pytest.raises(Unavailable) as refused:
                client.generate(**SHORT_TURN)
            assert refused.value.reason == "NO_VERIFIER"
            stack.start_again("verifier")
            wait_until(ready_again(stack))
            works_with_drafts(client)


def test_a_drafter_killed_at_any_moment_is_listed_as_lost_and_comes_back(own_stack: StartStack) -> None:
    stack = own_stack(WITH_DRAFTER)
    with connect(stack.gateway) as client:
        plain = client.generate(**LONG_TURN, speculation="off")
        for moment in MOMENTS:
            with client.generate_stream(**LONG_TURN) as stream:
                _deltas = after_deltas(stream, moment)
                stack.kill("drafter-1")
                assert stream.result.token_ids == plain.token_ids
            wait_until(lambda: drafter_state(client) == "lost")
            assert healthy(stack, "gateway", "verifier")
            alone = client.generate(**SHORT_TURN)
            assert alone.token_ids == plain.token_ids[:64]
            assert alone.totals.drafted == 0 and alone.no_drafter_reason
            stack.start_again("drafter-1")
            wait_until(ready_again(stack))
            works_with_drafts(client)


def test_a_gateway_killed_at_any_moment_leaves_a_verifier_without_its_turns(own_stack: StartStack) -> None:
    stack = own_stack(WITH_DRAFTER)
    for moment in MOMENTS:
        turn = {**LONG_TURN, "resume": False}  # nothing would come of waiting for this gateway's return
        with connect(stack.gateway) as client, client.generate_stream(**turn) as stream:
            _deltas = after_deltas(stream, moment)
            stack.kill("gateway")
            with pytest.raises(Unavailable):
                _ = stream.result
            with pytest.raises(Unavailable, match="sparkrelay up"):
                client.generate(**SHORT_TURN)
        wait_until(lambda: turns_under_way(stack) == 0)
        assert healthy(stack, "verifier", "drafter-1")
        stack.start_again("gateway")
        wait_until(ready_again(stack))
        with connect(stack.gateway) as client:
            works_with_drafts(client)


def test_with_a_journal_on_disk_turns_are_resumed_at_the_gateway_that_is_started_again(
    own_stack: StartStack, tmp_path: Path
) -> None:
    file = tmp_path / "journal.db"
    flags = {**TOY.flags, "gateway": ("--journal", f"sqlite:{file}")}
    stack = own_stack(replace(TOY, flags=flags))
    with connect(stack.gateway) as client:
        whole = client.generate(**LONG_TURN)
        with client.generate_stream(**LONG_TURN) as stream:
            deltas = after_deltas(stream, 5)
            wait_until(lambda: written_deltas(file, stream.started.turn_id) > 0)
            stack.kill("gateway")
            stack.start_again("gateway")
            with pytest.raises(ResumeLost, match="same seed") as cut:
                _ = list(deltas)
        assert cut.value.turn_id == stream.started.turn_id
        assert stream.next_index > 0
        rest = client.resume(whole.turn_id, 1000).result
        assert rest.token_ids == whole.token_ids[1000:]
        assert rest.rounds[-1] == whole.rounds[-1] and rest.usage == whole.usage


def written_deltas(file: Path, turn_id: str) -> int:
    """How many deltas of a turn are on disk."""
    with closing(sqlite3.connect(file, timeout=30)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM deltas WHERE turn_id = ?", (turn_id,)).fetchone()
    return int(count)


def turns_under_way(stack: Stack) -> int:
    """What the verifier itself says."""
    with grpc.insecure_channel(stack.verifier, options=CHANNEL_OPTIONS) as channel:
        stub = verifier_service_pb2_grpc.VerifierServiceStub(channel)
        reports = stub.WatchLoad(verifier_service_pb2.VerifierServiceWatchLoadRequest(), timeout=10)
        report = next(reports)
        reports.cancel()
        return int(report.active_turn_count + report.queued_turn_count)
