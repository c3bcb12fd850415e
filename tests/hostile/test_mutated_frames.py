"""Thousands of spoilt messages for every call, as raw bytes: the right status, nothing left behind, and nobody else harmed.

SPARKRELAY_FULL=1 sends ten thousand a call. The seeds are fixed: the same bytes every time.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import MethodDescriptor

from sparkrelay.errors import STATUS_OF, refusal_of
from sparkrelay.outcomes import Reason
from tests.hostile.house import House, house
from tests.hostile.mutations import mutated
from tests.hostile.recorded import recorded, services

COUNT = 10_000 if os.environ.get("SPARKRELAY_FULL") == "1" else 1_000
pytestmark = pytest.mark.timeout(900 if COUNT == 10_000 else 120)
SEED = 20_261_124
AT_ONCE = 8
CALL_S = 20.0
RSS_LIMIT_BYTES = (
    256 << 20
)  # what a run may add: room for torch's and gRPC's own arenas, none for a leak of ten thousand calls

Status = grpc.StatusCode
# What a caller can have done wrong. Never UNKNOWN or INTERNAL, which would be a bug of ours.
BLAMES_THE_CALLER = {
    Status.INVALID_ARGUMENT,
    Status.NOT_FOUND,
    Status.FAILED_PRECONDITION,
    Status.PERMISSION_DENIED,
    Status.RESOURCE_EXHAUSTED,
    Status.UNIMPLEMENTED,
    Status.ALREADY_EXISTS,
    Status.ABORTED,
}


@pytest.fixture
async def standing() -> AsyncIterator[House]:
    async with house() as made:
        await made.converse()  # what is made once is made
        made.task_count = len(asyncio.all_tasks())
        yield made


class Caller:
    """Sends raw bytes to one call, and notes how each was answered."""

    def __init__(self, address: str, method: MethodDescriptor, random: Random) -> None:
        self.outcomes: Counter[str] = Counter()
        self._channel = grpc.aio.insecure_channel(address)
        self._path = f"/{method.containing_service.full_name}/{method.name}"
        self._streams = method.server_streaming
        self._random = random

    async def send(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(CALL_S):
                await (self._listen(data) if self._streams else self._ask(data))
        except TimeoutError:
            raise AssertionError(f"{self._path} never answered {data!r}") from None
        except grpc.aio.AioRpcError as error:
            self._judge(error, data)
        else:
            self.outcomes["OK"] += 1

    async def _ask(self, data: bytes) -> None:
        await self._channel.unary_unary(self._path)(data)

    async def _listen(self, data: bytes) -> None:
        """Some callers leave after the first answer, some later. The second report of a load is a second away."""
        call: Any = self._channel.unary_stream(self._path)(data)
        try:
            if self._path.endswith("WatchRounds"):
                await call.initial_metadata()
                if call.done():
                    await call.read()
                return
            patience = 1 if self._path.endswith("WatchLoad") else self._random.choice((1, 1, 1, 2, 4))
            for _ in range(patience):
                if await call.read() is grpc.aio.EOF:
                    return
        finally:
            call.cancel()

    def _judge(self, error: grpc.aio.AioRpcError, data: bytes) -> None:
        code, refusal = error.code(), refusal_of(error)
        told = f"{self._path}: {code.name} {error.details()!r} for {data!r}"
        assert code in BLAMES_THE_CALLER, told
        assert refusal.reason is not Reason.UNSPECIFIED and STATUS_OF[refusal.reason] is code, told
        self.outcomes[refusal.reason.name] += 1

    async def close(self) -> None:
        await self._channel.close()


def rss_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


UNARY = [method for method in services() if not method.client_streaming]


def address_of(made: House, method: MethodDescriptor) -> str:
    return {
        "GatewayService": made.gateway_address,
        "AdminService": made.gateway_address,
        "VerifierService": made.verifier.address,
        "DrafterService": made.drafter_address,
    }[method.containing_service.name]


async def test_spoilt_requests_of_every_call_are_refused_and_harm_nobody(standing: House) -> None:
    before_bytes = rss_bytes()
    async with standing.undisturbed():
        for index, method in enumerate(UNARY):
            await bombard(standing, method, SEED + index)
    await standing.quiet()
    assert rss_bytes() - before_bytes < RSS_LIMIT_BYTES


async def bombard(made: House, method: MethodDescriptor, seed: int) -> None:
    name = f"{method.containing_service.name}.{method.name}"
    started_s = time.monotonic()
    session = await a_session(made)
    messages = mutated(recorded(session)[name], seed)
    caller = Caller(address_of(made, method), method, Random(seed))
    todo = iter(list(islice(messages, COUNT)))

    async def work() -> None:
        for data in todo:
            await caller.send(data)

    workers = [asyncio.create_task(work()) for _ in range(AT_ONCE)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await caller.close()
    assert sum(caller.outcomes.values()) == COUNT
    assert made.verifier.crashes == [], name
    assert caller.outcomes["INVALID_FIELD"] > 0, (name, caller.outcomes)
    print(f"{name:32} {time.monotonic() - started_s:5.1f} s {dict(caller.outcomes.most_common())}")


async def a_session(made: House) -> str:
    session, ended = made.desk.sessions.open(
        made.desk.new_id("session"), "toy", now_us=made.desk.outside.clock_us(), create_time_s=0.0
    )
    for each in ended:
        made.desk.release(each)
    return session.session_id
