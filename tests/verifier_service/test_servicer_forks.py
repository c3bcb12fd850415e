"""ForkSession and prefix_salt over a real server, with the toy model: two sessions go on as if each were alone."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from sparkrelay.errors import refusal_of
from sparkrelay.outcomes import Reason
from sparkrelay.protocol import chain_hash
from sparkrelay.telemetry import new_trace_context, to_metadata
from sparkrelay.v1 import verifier_service_pb2 as pb2
from tests.verifier_service.servicer_rig import Rig, SlowToyModel, request, rig, token_ids

PROMPT = tuple(1 + i * i % 61 for i in range(40))
ForkRequest = pb2.VerifierServiceForkSessionRequest


def fork(ids: tuple[int, ...], *, source: str = "s1", new: str = "fork", **fields: Any) -> Any:
    return ForkRequest(
        **{
            "session_id": source,
            "fork_session_id": new,
            "token_count": len(ids),
            "token_hash": chain_hash(ids),
            **fields,
        }
    )


async def refused(rig: Rig, message: Any, **call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.stub.ForkSession(message, **call)
    return refusal_of(caught.value)


async def alone(ids: tuple[int, ...], max_tokens: int) -> list[int]:
    """What a fresh session of a fresh verifier says after these tokens."""
    async with rig() as verifier:
        return token_ids(await verifier.generate(request(ids=ids, max_tokens=max_tokens)))


async def test_a_fork_says_what_a_fresh_session_says_and_its_source_is_undisturbed() -> None:
    async with rig() as verifier:
        first = await verifier.generate(request(ids=PROMPT, max_tokens=10))
        ids = (*PROMPT, *token_ids(first))
        answer = await verifier.stub.ForkSession(fork(ids[:45]))
        forked = await verifier.generate(request("t2", session="fork", kept=ids[:45], ids=[7], max_tokens=30))
        again = await verifier.generate(request("t3", kept=ids, ids=[9], max_tokens=30))
    assert answer.cached_token_count == 44
    assert forked[0].started.cached_token_count == forked[-1].finished.usage.cached_token_count == 44
    assert again[-1].finished.usage.cached_token_count == 49
    assert token_ids(forked) == await alone((*ids[:45], 7), 30)
    assert token_ids(again) == await alone((*ids, 9), 30)


async def test_a_session_is_forked_while_its_turn_runs() -> None:
    async with rig(model=SlowToyModel()) as verifier:
        running = verifier.stub.Generate(request(ids=PROMPT, max_tokens=200))
        while not (event := await running.read()).HasField("committed"):
            pass
        ids = (*PROMPT, event.committed.token_ids[0])
        answer = await verifier.stub.ForkSession(fork(ids))
        assert not running.done(), "the source's turn is still under way"
        forked = await verifier.generate(request("t2", session="fork", kept=ids, ids=[7], max_tokens=20))
        source = [event]
        while (event := await running.read()) is not grpc.aio.EOF:
            source.append(event)
    assert answer.cached_token_count == 40
    assert token_ids(forked) == await alone((*ids, 7), 20)
    assert token_ids(source) == await alone(PROMPT, 200)


async def test_what_cannot_be_forked_is_refused_with_its_reason_its_field_and_its_trace() -> None:
    cases = [
        (fork(PROMPT, source="nobody"), Reason.SESSION_NOT_FOUND, "session_id"),
        (fork(PROMPT, new="s1"), Reason.SESSION_EXISTS, "fork_session_id"),
        (fork(PROMPT, new=""), Reason.INVALID_FIELD, "fork_session_id"),
        (fork(PROMPT, source="x" * 129), Reason.INVALID_FIELD, "session_id"),
        (fork(PROMPT, token_count=0), Reason.INVALID_FIELD, "token_count"),
        (fork(PROMPT, token_count=-1), Reason.INVALID_FIELD, "token_count"),
        (fork(PROMPT, token_count=99), Reason.INVALID_FIELD, "token_count"),
        (fork(PROMPT, token_count=39), Reason.PREFIX_MISMATCH, "token_hash"),
        (fork(PROMPT, token_hash=b""), Reason.PREFIX_MISMATCH, "token_hash"),
        (fork(PROMPT, token_hash=b"x" * 65), Reason.INVALID_FIELD, "token_hash"),
    ]
    trace = new_trace_context()
    async with rig() as verifier:
        await verifier.generate(request(ids=PROMPT))
        for message, reason, field in cases:
            refusal = await refused(verifier, message, metadata=to_metadata(trace))
            assert (refusal.reason, [each.field for each in refusal.violations]) == (reason, [field])
            assert refusal.trace_id == trace.trace_id and refusal.message
        await verifier.load_where(lambda load: load.session_count == 1)


async def test_a_caller_that_leaves_before_the_answer_leaves_no_session_behind() -> None:
    async with rig(model=SlowToyModel()) as verifier:
        await verifier.generate(request(ids=PROMPT))
        # A long turn keeps the engine in steps of 2 ms: the call is over before its answer is handled.
        running = verifier.stub.Generate(request("t2", session="s2", max_tokens=4000))
        await running.read()
        forks = verifier.servicer._hub.forks
        caller = asyncio.create_task(forks.ask(command_of(fork(PROMPT))))
        await asyncio.sleep(0)
        assert forks._callers, "it waits for the engine"
        caller.cancel()
        await verifier.load_where(lambda load: load.session_count == 2 and not forks._callers)
        again = await verifier.stub.ForkSession(fork(PROMPT))
        assert again.cached_token_count == 39
        running.cancel()


def command_of(message: Any) -> Any:
    from verifier_service.servicer.forks import fork_command

    return fork_command(message)


async def test_a_draining_verifier_opens_no_forks_and_tells_those_that_wait() -> None:
    async with rig() as verifier:
        await verifier.generate(request(ids=PROMPT))
        await verifier.servicer.drain(0.0)
        assert (await refused(verifier, fork(PROMPT))).reason is Reason.DRAINING


async def cached(verifier: Rig, turn: str, salt: bytes) -> int:
    """Runs a turn in a session of its own: how much of its prompt needed not be read."""
    responses = await verifier.generate(request(turn, session=turn, ids=PROMPT, prefix_salt=salt))
    return int(responses[-1].finished.usage.cached_token_count)


async def test_equal_salts_share_what_was_read_and_others_never_do() -> None:
    async with rig() as verifier:
        assert await cached(verifier, "a1", b"a") == 0
        assert await cached(verifier, "b1", b"b") == 0, "another tenant's prompt"
        assert await cached(verifier, "n1", b"") == 0
        assert await cached(verifier, "a2", b"a") == 39
        assert await cached(verifier, "b2", b"b") == 39


async def test_a_salt_that_is_too_long_is_named() -> None:
    async with rig() as verifier:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await verifier.generate(request(prefix_salt=b"x" * 65))
    assert [each.field for each in refusal_of(caught.value).violations] == ["prefix_salt"]
