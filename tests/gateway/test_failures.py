"""When something goes away: the caller is told what and what to do, the others go on, and nothing stays behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import sparkrelay
from sparkrelay.client import DeadlineExceeded, InternalError, InvalidRequest, Unavailable
from sparkrelay.outcomes import Reason, Refusal
from tests.gateway.fake_verifier import Stack, continuation, running

PROMPT = (5, 9, 11)


def lost(stack: Stack) -> bool:
    return stack.desk.pool.views[0].state.name == "LOST"


def ready(stack: Stack) -> bool:
    return stack.desk.pool.ready


async def test_a_client_that_leaves_cancels_its_turn_at_the_verifier() -> None:
    async with running({"hold_after": 3}) as stack, sparkrelay.aio.connect(stack.address) as client:
        async with client.generate_stream(token_ids=PROMPT) as stream:
            turn_id = stream.started.turn_id
        await stack.until(lambda: stack.verifier.cancelled == [turn_id])
        await stack.until(lambda: len(stack.verifier.ended_sessions) == 1)
        turn = await client.get_turn(turn_id)
        assert turn.finish_reason == "cancelled"


async def test_a_cancelled_turn_leaves_its_session_usable_and_only_known_tokens_are_kept() -> None:
    async with running({"hold_after": 4}) as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session()
        async with session.generate_stream(token_ids=PROMPT, max_tokens=20) as stream:
            seen: tuple[int, ...] = ()
            async for delta in stream:
                seen += delta.token_ids
                if len(seen) == 4:
                    break
        await stack.until(lambda: len(stack.verifier.cancelled) == 1)
        stack.verifier.hold_after = None
        whole = await session.generate(token_ids=(*PROMPT, *seen), max_tokens=4)
        assert whole.token_ids == continuation((*PROMPT, *seen), 4)
        assert stack.verifier.requests[1].keep_len == 7


async def test_the_deadline_is_passed_on_and_ends_the_turn_everywhere() -> None:
    async with (
        running({"hold_after": 1}) as stack,
        sparkrelay.aio.connect(stack.address, timeout=0.4) as client,
    ):
        with pytest.raises(DeadlineExceeded):
            await client.generate(token_ids=PROMPT)
        await stack.until(lambda: len(stack.verifier.cancelled) == 1)
        (time_left,) = stack.verifier.times_left
        assert time_left is not None
        assert 0 < time_left < 0.5, "gRPC rounds up to whole milliseconds"


async def test_a_verifier_lost_mid_turn_fails_the_turn_and_its_session_starts_afresh_on_its_return() -> None:
    async with running({"hold_after": 4}) as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session()
        async with session.generate_stream(token_ids=PROMPT, max_tokens=20) as stream:
            deltas = aiter(stream)
            assert (await anext(deltas)).token_ids == continuation(PROMPT, 1)
            await stack.verifier.die()
            with pytest.raises(Unavailable) as refused:
                _ = [delta async for delta in deltas]
        assert refused.value.reason == "VERIFIER_LOST"
        assert "Ask again" in refused.value.message
        assert (refused.value.turn_id, refused.value.trace_id) == (
            stream.started.turn_id,
            stream.started.trace_id,
        )
        assert (await client.get_turn(refused.value.turn_id)).finish_reason == "failed"
        await stack.until(lambda: lost(stack))
        (worker,) = await client.workers()
        assert (worker.state, bool(worker.message), worker.turn_count) == ("lost", True, 0)
        info = await session.info()
        assert (info.verifier_id, info.token_count, info.busy) == ("", 0, False)
        with pytest.raises(Unavailable) as nowhere:
            await session.generate(token_ids=PROMPT)
        assert nowhere.value.reason == "NO_VERIFIER"
        await stack.verifier.restart()
        await stack.until(lambda: ready(stack))
        whole = await session.generate(token_ids=PROMPT, max_tokens=3)
        assert whole.token_ids == continuation(PROMPT, 3)
        assert stack.verifier.requests[-1].keep_len == 0


async def test_a_verifier_that_refuses_before_the_turn_began_is_passed_over_once() -> None:
    async with running({}, {}) as stack, sparkrelay.aio.connect(stack.address) as client:
        for verifier in stack.verifiers:
            verifier.refusals = [Refusal(Reason.DRAINING, "leaving")]
        first = min(stack.verifiers, key=lambda verifier: verifier.address)
        second = max(stack.verifiers, key=lambda verifier: verifier.address)
        second.refusals = []
        whole = await client.generate(token_ids=PROMPT, max_tokens=3)
        assert whole.token_ids == continuation(PROMPT, 3)
        assert (len(first.requests), len(second.requests)) == (1, 1)


async def test_a_verifier_that_falls_silent_is_lost_and_its_turns_fail() -> None:
    async with (
        running({"hold_after": 4}, silence_limit_ms=300) as stack,
        sparkrelay.aio.connect(stack.address) as client,
    ):
        async with client.generate_stream(token_ids=PROMPT) as stream:
            stack.verifier.silent = True
            with pytest.raises(Unavailable, match="no load report") as refused:
                await stream.result()
        assert refused.value.reason == "VERIFIER_LOST"


async def test_no_verifier_is_a_clear_refusal_and_the_gateway_finds_it_when_it_comes() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        await stack.verifier.die()
        await stack.until(lambda: lost(stack))
        with pytest.raises(Unavailable, match=stack.verifier.address) as refused:
            await client.generate(token_ids=PROMPT)
        assert refused.value.reason == "NO_VERIFIER"
        assert await client.list_models() == []
        await stack.verifier.restart()
        await stack.until(lambda: ready(stack))
        assert [model.name for model in await client.list_models()] == ["toy"]


async def test_a_drained_worker_keeps_its_sessions_and_gets_no_new_ones() -> None:
    async with running({}, {}) as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session()
        await session.generate(token_ids=PROMPT, max_tokens=2)
        home = next(verifier for verifier in stack.verifiers if verifier.requests)
        other = next(verifier for verifier in stack.verifiers if not verifier.requests)
        assert (await client.drain_worker(home.address)).state == "draining"
        await session.generate(token_ids=PROMPT, max_tokens=2)
        await client.generate(token_ids=PROMPT, max_tokens=2)
        assert (len(home.requests), len(other.requests)) == (2, 1)
        with pytest.raises(InvalidRequest, match="the workers are"):
            await client.drain_worker("127.0.0.1:1")


async def test_a_session_that_moves_leaves_nothing_behind_at_its_old_verifier() -> None:
    async with running({}, {}) as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session()
        await session.generate(token_ids=PROMPT, max_tokens=2)
        home = next(verifier for verifier in stack.verifiers if verifier.requests)
        other = next(verifier for verifier in stack.verifiers if not verifier.requests)
        home.refusals = [Refusal(Reason.OVERLOADED, "full")]
        whole = await session.generate(token_ids=PROMPT, max_tokens=2)
        assert whole.token_ids == continuation(PROMPT, 2)
        await stack.until(lambda: home.ended_sessions == [session.session_id])
        assert (other.requests[0].keep_len, other.ended_sessions) == (0, [])


async def test_a_leaving_gateway_takes_no_turns_and_cuts_off_what_does_not_end() -> None:
    async with running({"hold_after": 4}) as stack, sparkrelay.aio.connect(stack.address) as client:
        async with client.generate_stream(token_ids=PROMPT) as stream:
            draining = asyncio.create_task(stack.desk.drain(0.6))
            with pytest.raises(Unavailable) as cut:
                await stream.result()
            assert cut.value.reason == "DRAINING"
            await draining
        with pytest.raises(Unavailable) as refused:
            await client.generate(token_ids=PROMPT)
        assert refused.value.reason == "DRAINING"


async def test_a_leaving_gateway_lets_turns_end() -> None:
    async with (
        running({"hold_after": 4}) as stack,
        sparkrelay.aio.connect(stack.address) as client,
        client.generate_stream(token_ids=PROMPT, max_tokens=6) as stream,
    ):
        draining = asyncio.create_task(stack.desk.drain(60.0))
        stack.verifier.go_on.set()
        assert (await stream.result()).token_ids == continuation(PROMPT, 6)
        await draining


async def test_a_bug_is_internal_logged_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("secret detail")

    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        monkeypatch.setattr(stack.desk, "limits_of", broken)
        with pytest.raises(InternalError) as failed:
            await client.generate(token_ids=PROMPT)
        assert "secret" not in failed.value.message
        assert failed.value.turn_id
        with pytest.raises(InternalError):
            await client.list_models()


async def test_a_session_that_is_ended_during_its_turn_is_freed_once_more_after_it() -> None:
    async with running({"hold_after": 4}) as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session()
        async with session.generate_stream(token_ids=PROMPT, max_tokens=6) as stream:
            await session.end()
            await stack.until(lambda: stack.verifier.ended_sessions == [session.session_id])
            stack.verifier.go_on.set()
            assert (await stream.result()).finish_reason == "length"
        await stack.until(lambda: stack.verifier.ended_sessions == [session.session_id] * 2)


async def test_a_verifier_that_commits_out_of_order_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        committed = stack.verifier._committed
        monkeypatch.setattr(
            stack.verifier,
            "_committed",
            lambda request, start, ids: committed(request, start + (start > 4), ids),
        )
        with pytest.raises(InternalError, match="out of order"):
            await client.generate(token_ids=PROMPT, max_tokens=9)


async def test_hundreds_of_turns_leave_nothing_behind() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        turns = [client.generate(token_ids=PROMPT, max_tokens=6) for _ in range(200)]
        wholes = await asyncio.gather(*turns)
        assert {whole.token_ids for whole in wholes} == {continuation(PROMPT, 6)}
        await stack.until(lambda: len(stack.verifier.ended_sessions) == 200)
        assert (len(stack.desk.sessions), stack.desk.pool.workers[0].turn_count) == (0, 0)
        assert len(await client.list_turns(1000)) == 200
