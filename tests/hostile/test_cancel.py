"""Callers that leave: the verifier's room and the drafter's state are free again within a bound."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import gateway_service_pb2_grpc as gateway_grpc
from sparkrelay.v1 import generation_pb2 as generation_pb
from tests.hostile.house import House, house, until

TURNS = 24
LONG = generation_pb.StopConditions(max_token_count=3000, ignore_default_stop_ids=True)


async def begin(stub: Any, index: int) -> Any:
    """A long turn that has brought its first tokens."""
    tokens = gateway_pb.TokenIds(token_ids=[40, 41, 42, 40, 41, index % 60])
    call = stub.Generate(gateway_pb.GenerateRequest(tokens=tokens, stop=LONG), timeout=60)
    while (await call.read()).WhichOneof("event") != "delta":
        continue
    return call


def state_left(made: House) -> dict[str, int]:
    load = made.verifier.engine.load()
    drafter = made.drafter.engine
    return {
        "sessions": load.session_count,
        "members": load.member_count,
        "state that somebody holds": load.used_block_count,
        "sessions of the drafter": sum(drafter.totals.sessions_by_link.values()),
        "sessions it has taken": drafter._taken_count,
    }


async def test_cancelled_turns_free_the_verifiers_room_and_the_drafters_state() -> None:
    async with house() as made, grpc.aio.insecure_channel(made.gateway_address) as channel:
        stub: Any = gateway_grpc.GatewayServiceStub(channel)
        calls = await asyncio.gather(*(begin(stub, index) for index in range(TURNS)))
        await until(lambda: sum(made.drafter.engine.totals.sessions_by_link.values()) == TURNS)
        held = state_left(made)
        assert held["sessions"] == held["members"] == TURNS
        assert held["state that somebody holds"] > 0
        for call in calls:
            call.cancel()
        await made.quiet()
        await until(lambda: not any(state_left(made).values()), limit_s=60)


async def test_a_deadline_that_passes_frees_the_same() -> None:
    async with house() as made, grpc.aio.insecure_channel(made.gateway_address) as channel:
        stub: Any = gateway_grpc.GatewayServiceStub(channel)
        tokens = gateway_pb.TokenIds(token_ids=[40, 41, 42, 40])
        call = stub.Generate(gateway_pb.GenerateRequest(tokens=tokens, stop=LONG), timeout=0.5)
        read = 0
        try:
            while await call.read() is not grpc.aio.EOF:
                read += 1
            raise AssertionError("3,000 tokens take longer than the deadline")
        except grpc.aio.AioRpcError as error:
            code = error.code()
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert read > 1
        await made.quiet()
        await until(lambda: not any(state_left(made).values()), limit_s=60)
