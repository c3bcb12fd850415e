"""Forking through a real gateway: the new session is pinned where the old one is, and a fork that fails leaves nothing behind."""

from __future__ import annotations

import asyncio

import pytest

import sparkrelay
from sparkrelay.client import DeadlineExceeded, InvalidRequest, NotFound, Overloaded, SparkRelayError
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.protocol import chain_hash
from tests.gateway.fake_verifier import continuation, running

PROMPT = (5, 9, 11)


async def test_a_fork_has_the_tokens_and_goes_on_where_they_are() -> None:
    async with running({}, {}) as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session(idle_limit_ms=60_000)
        first = await session.generate(token_ids=PROMPT, max_tokens=4)
        fork = await session.fork()
        ids = (*PROMPT, *first.token_ids)
        [host] = [each for each in stack.verifiers if each.forks]
        [asked] = host.forks
        assert (asked.session_id, asked.fork_session_id) == (session.session_id, fork.session_id)
        assert (asked.token_count, asked.token_hash) == (7, chain_hash(ids))
        info, source = await fork.info(), await session.info()
        assert (info.token_count, info.turn_count, info.busy) == (7, 0, False)
        assert info.verifier_id == source.verifier_id
        assert stack.desk.sessions.get(fork.session_id).idle_limit_us == 60_000_000
        answer = await fork.generate(token_ids=(*ids, 40), max_tokens=4)
        assert host.requests[-1].keep_len == 7 and answer.token_ids == continuation((*ids, 40), 4)
        assert (await session.generate(token_ids=(*ids, 41), max_tokens=2)).usage.cached == 7, "undisturbed"
        await session.end()
        again = await fork.generate(token_ids=(*ids, 40), max_tokens=4)
        assert again.token_ids == answer.token_ids, "it outlives its source"


async def test_a_fork_takes_as_many_tokens_as_it_is_told_and_the_blocking_client_forks_alike() -> None:
    def fork_of(address: str, session_id: str) -> tuple[str, int]:
        with sparkrelay.connect(address) as client:
            fork = client.session(session_id).fork(5)
            return fork.session_id, fork.info().token_count

    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session()
        await session.generate(token_ids=PROMPT, max_tokens=4)
        session_id, count = await asyncio.to_thread(fork_of, stack.address, session.session_id)
        assert count == 5 and len(stack.verifier.sessions[session_id]) == 5


async def test_a_session_with_a_turn_under_way_is_forked_up_to_what_is_committed() -> None:
    async with running({"hold_after": 4}) as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session()
        async with session.generate_stream(token_ids=PROMPT, max_tokens=9) as stream:
            deltas, shown = aiter(stream), 0  # one iterator to the end: leaving it would cancel the turn
            while shown < 4:
                shown += len((await anext(deltas)).token_ids)
            fork = await session.fork()
            assert (await session.info()).busy
            assert stack.verifier.sessions[fork.session_id] == [*PROMPT, *continuation(PROMPT, 4)]


async def test_a_session_without_tokens_forks_into_another_one_without() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        fork = await (await client.create_session()).fork()
        assert (await fork.info()).token_count == 0 and not stack.verifier.forks
        assert (await fork.generate(token_ids=PROMPT, max_tokens=2)).token_ids == continuation(PROMPT, 2)


async def test_what_cannot_be_forked_is_refused_and_nothing_is_left() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        with pytest.raises(NotFound):
            await client.fork_session("nobody")
        session = await client.create_session()
        await session.generate(token_ids=PROMPT, max_tokens=4)
        for count in (-1, 8):
            with pytest.raises(InvalidRequest) as refused:
                await session.fork(count)
            assert [each.field for each in refused.value.violations] == ["token_count"]
        stack.verifier.refusals = [Refusal(Reason.OVERLOADED, "all are busy", retry_after_ms=70)]
        with pytest.raises(Overloaded):
            await session.fork()
        await stack.until(lambda: len(stack.verifier.ended_sessions) == 1)
        assert [each.session_id for each in await client.list_sessions()] == [session.session_id]
        stack.desk.draining = True
        with pytest.raises(SparkRelayError) as draining:
            await session.fork()
        assert draining.value.reason == "DRAINING"


async def test_a_caller_that_does_not_wait_leaves_no_fork_behind() -> None:
    async with running({"hold_forks": True}) as stack:
        async with sparkrelay.aio.connect(stack.address) as client:
            session = await client.create_session()
            await session.generate(token_ids=PROMPT, max_tokens=4)
        async with sparkrelay.aio.connect(stack.address, timeout=0.2) as hasty:
            with pytest.raises(DeadlineExceeded):
                await hasty.fork_session(session.session_id)
            await stack.until(lambda: len(stack.verifier.ended_sessions) == 1)
            assert stack.verifier.ended_sessions == [stack.verifier.forks[0].fork_session_id]
            assert [each.session_id for each in await hasty.list_sessions()] == [session.session_id]
            assert stack.verifier.times_left[-1] < 0.5, (
                "the caller's deadline is passed on (gRPC rounds it up)"
            )


async def test_a_fork_that_was_ended_before_it_was_open_is_given_up() -> None:
    async with running({"hold_forks": True}) as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session()
        await session.generate(token_ids=PROMPT, max_tokens=4)
        forking = asyncio.create_task(session.fork())
        await stack.until(lambda: bool(stack.verifier.forks))
        fork_id = stack.verifier.forks[0].fork_session_id
        await client.end_session(fork_id)
        stack.verifier.go_on.set()
        with pytest.raises(NotFound):
            await forking
        await stack.until(lambda: fork_id not in stack.verifier.sessions)


async def test_a_session_that_its_verifier_has_forgotten_forks_without_state() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session()
        await session.generate(token_ids=PROMPT, max_tokens=4)
        stack.verifier.sessions.clear()
        fork = await session.fork()
        assert (await fork.info()).token_count == 0
        for each in (fork, session):
            answer = await each.generate(token_ids=(*PROMPT, 7), max_tokens=4)
            assert answer.token_ids == continuation((*PROMPT, 7), 4)
        assert [request.keep_len for request in stack.verifier.requests] == [0, 0, 3, 0]
