"""Every reason that can be reached in this version, reached on the wire: status, details, and whom it names."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc.aio
import pytest

from sparkrelay.errors import STATUS_OF, refusal_of
from sparkrelay.frames import Block, Blocks, Fingerprint, Hello, Join, Leave
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.protocol import chain_hash
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import gateway_service_pb2_grpc as gateway_grpc
from sparkrelay.v1 import generation_pb2 as generation_pb
from sparkrelay.v1 import verifier_service_pb2 as verifier_pb
from sparkrelay.wire import drafter_frame_pb
from tests.gateway.fake_verifier import Stack, running
from tests.verifier_service.servicer_rig import RawDrafter, Rig, SlowToyModel, request, rig

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
METADATA = (("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01"),)
GREEDY = gateway_pb.TokenIds(token_ids=[5, 9, 11])
NEXT_STEP = re.compile(
    r"\b(send|ask|try|open|wait|use|leave|update|give|cancel|shorten|see|choose|dial|join|start|allow|log)",
    re.IGNORECASE,
)

# Not reached here: why, and where it is shown instead.
ELSEWHERE = {
    Reason.UNSPECIFIED: "never sent on purpose",
    Reason.TURN_POISONED: "replay is not built yet",
    Reason.NOT_IMPLEMENTED: "nothing that is defined is missing",
    Reason.UNAUTHENTICATED: "tests/test_tokens.py and its neighbours",
    Reason.INTERNAL: "tests/gateway/test_failures.py, with a verifier that has bugs",
    Reason.CANCELLED: "the caller is gone: nobody is told",
    Reason.RESUME_LOST: "tests of lingering turns",
    Reason.GRAMMAR_REFUSED: "tests of response formats",
    Reason.OUT_OF_MEMORY: "tests/verifier_service/test_engine_turns.py",
    Reason.SLOW: "tests/verifier_service/test_drafter_link.py",
    Reason.SILENT: "tests/verifier_service/test_servicer_drafters.py",
    Reason.SESSION_ENDED: "tests/verifier_service/test_engine_turns.py",
}


# ---- through a gateway ----------------------------------------------------------------------------------------------


def asks(**fields: Any) -> gateway_pb.GenerateRequest:
    return gateway_pb.GenerateRequest(**{"tokens": GREEDY} | fields)


async def ask(stack: Stack, message: gateway_pb.GenerateRequest, **call: Any) -> None:
    async with grpc.aio.insecure_channel(stack.address) as channel:
        stub: Any = gateway_grpc.GatewayServiceStub(channel)
        async for _ in stub.Generate(message, metadata=METADATA, **call):
            pass


async def refused_by_the_gateway(stack: Stack, reason: Reason) -> None:
    match reason:
        case Reason.INVALID_FIELD:
            await ask(stack, asks(sampling=generation_pb.Sampling(temperature=-1.0)))
        case Reason.MODEL_NOT_FOUND:
            await ask(stack, asks(model="other"))
        case Reason.SESSION_NOT_FOUND:
            await ask(stack, asks(session_id="nobody's"))
        case Reason.TURN_NOT_FOUND:
            await ask(
                stack, gateway_pb.GenerateRequest(resume=gateway_pb.Resume(turn_id="nobody's-turn-at-all"))
            )
        case Reason.CONTEXT_EXCEEDED:
            await ask(stack, asks(tokens=gateway_pb.TokenIds(token_ids=[5] * 500)))
        case Reason.TOO_LARGE:
            await ask(stack, gateway_pb.GenerateRequest(text="x" * 1_000_001))
        case Reason.DRAINING:
            stack.desk.draining = True
            await ask(stack, asks())
        case Reason.NO_VERIFIER:
            await stack.verifier.die()
            await stack.until(lambda: not stack.desk.pool.ready)
            await ask(stack, asks())
        case Reason.VERIFIER_LOST:
            await lose_the_verifier(stack)
        case Reason.OVERLOADED:
            await second_of(stack, asks(), asks())
        case Reason.SESSION_BUSY:
            session, _ = stack.desk.sessions.open("session-x", "toy", now_us=0, create_time_s=0.0)
            turn = asks(session_id=session.session_id)
            await second_of(stack, turn, turn)
        case _:
            raise AssertionError(reason)


async def second_of(stack: Stack, first: Any, second: Any) -> None:
    """The second while the first is under way."""
    under_way = asyncio.create_task(ask(stack, first))
    await stack.until(lambda: bool(stack.verifier.requests))
    try:
        await ask(stack, second)
    finally:
        stack.verifier.go_on.set()
        await under_way


async def lose_the_verifier(stack: Stack) -> None:
    turn = asyncio.create_task(ask(stack, asks()))
    await stack.until(lambda: bool(stack.verifier.requests))
    await stack.verifier.die()
    await turn


BY_THE_GATEWAY = [
    Reason.INVALID_FIELD, Reason.MODEL_NOT_FOUND, Reason.SESSION_NOT_FOUND, Reason.TURN_NOT_FOUND, Reason.CONTEXT_EXCEEDED,
    Reason.TOO_LARGE, Reason.DRAINING, Reason.NO_VERIFIER, Reason.VERIFIER_LOST, Reason.OVERLOADED, Reason.SESSION_BUSY,
]  # fmt: skip


@pytest.mark.parametrize("reason", BY_THE_GATEWAY)
async def test_a_caller_is_told_what_where_and_what_next(reason: Reason) -> None:
    turns = 1 if reason is Reason.OVERLOADED else 8
    async with running({"hold_after": 2}, max_turns=turns) as stack:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await refused_by_the_gateway(stack, reason)
    refusal = checked(refused.value, reason)
    assert refusal.trace_id == TRACE_ID
    assert refusal.turn_id
    assert (refusal.retry_after_ms > 0) is (reason is Reason.OVERLOADED)


def checked(error: grpc.aio.AioRpcError, reason: Reason) -> Refusal:
    refusal = refusal_of(error)
    assert (refusal.reason, error.code()) == (reason, STATUS_OF[reason]), refusal.message
    assert NEXT_STEP.search(refusal.message), refusal.message
    for violation in refusal.violations:
        assert refusal.message.startswith(violation.field), refusal.message
    return refusal


# ---- by a verifier, to a gateway or to a drafter --------------------------------------------------------------------


async def exists_already(verifier: Rig) -> None:
    await verifier.generate(request())
    fork = verifier_pb.VerifierServiceForkSessionRequest(
        session_id="s1", fork_session_id="s1", token_count=1, token_hash=chain_hash((1,))
    )
    await verifier.stub.ForkSession(fork, metadata=METADATA)


async def prefix_mismatch(verifier: Rig) -> None:
    await verifier.generate(request())
    await verifier.generate(request("t2", kept=(9, 9), ids=(1,)), metadata=METADATA)


async def first_frame(verifier: Rig, frame: Any) -> None:
    call = verifier.stub.Speculate()
    await call.write(drafter_frame_pb(frame))
    await call.read()


def hello(**fingerprint: Any) -> Hello:
    return Hello(1, 1, "d", "run", Fingerprint(**fingerprint))


BY_THE_VERIFIER: dict[Reason, Callable[[Rig], Awaitable[None]]] = {
    Reason.PREFIX_MISMATCH: prefix_mismatch,
    Reason.SESSION_EXISTS: exists_already,
    Reason.FINGERPRINT_MISMATCH: lambda verifier: first_frame(verifier, hello(vocab_size=3)),
    Reason.PROTOCOL_VERSION: lambda verifier: first_frame(verifier, Hello(7, 9, "d", "run", Fingerprint())),
    Reason.PROTOCOL_VIOLATION: lambda verifier: first_frame(verifier, Leave(1, Reason.UNSPECIFIED)),
}


@pytest.mark.parametrize("reason", BY_THE_VERIFIER)
async def test_a_peer_is_told_what_and_what_next(reason: Reason) -> None:
    async with rig() as verifier:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await BY_THE_VERIFIER[reason](verifier)
    checked(refused.value, reason)


# ---- of a membership alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [Reason.JOIN_REFUSED, Reason.INVALID_TOKEN, Reason.SUPERSEDED])
async def test_a_member_is_told_why_it_is_none_any_more(reason: Reason) -> None:
    async with rig(model=SlowToyModel(), policy="fixed:3") as verifier:
        drafter = await RawDrafter(verifier).connect()
        if reason is Reason.JOIN_REFUSED:
            await drafter.say(Join("s1", b"a guess"))
        else:
            turn = asyncio.create_task(verifier.generate(request(drafters=("d1",), max_tokens=200)))
            handle = await drafter.join()
            if reason is Reason.INVALID_TOKEN:
                await drafter.until(lambda: drafter.side.may_draft(handle))
                block = Block(handle, 0, len(drafter.ids[handle]), (64,), b"\xff")
                await drafter.say(Blocks((block,)), check=False)
            else:
                invite = await drafter.frame("Invite")
                await drafter.say(Join("s1", invite.token), check=False)
        left = await drafter.frame("Left")
        assert left.reason is reason
        await drafter.close()
        if reason is not Reason.JOIN_REFUSED:
            turn.cancel()
            with suppress(asyncio.CancelledError):
                await turn


def test_every_reason_is_reached_here_or_elsewhere() -> None:
    declined = {Reason.DRAFTER_DECLINED}  # tests/drafter_service/test_declining.py
    by_grpc = {Reason.DEADLINE_EXCEEDED}  # its own status, without our details
    members = {Reason.JOIN_REFUSED, Reason.INVALID_TOKEN, Reason.SUPERSEDED}
    reached = {*BY_THE_GATEWAY, *BY_THE_VERIFIER} | members | declined | by_grpc
    assert reached | set(ELSEWHERE) == set(Reason)
    assert not reached & set(ELSEWHERE)
