"""The whole house in one process, on real sockets: a gateway, a toy verifier and an n-gram drafter.

A healthy session lives in it: it speaks all the while, and its ids must be those of the undisturbed run. When the noise is over,
`quiet` waits until nothing is left of it.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

import sparkrelay
from drafter_service.backoff import Backoff
from drafter_service.engine import DraftEngine
from drafter_service.events import Command, Event
from drafter_service.links import Links, LinkState
from drafter_service.models import DraftModel, ModelOptions, load_model
from drafter_service.servicer import DrafterServicer
from drafter_service.verifier_link import LinkTimes, VerifierLink
from gateway.servicer import AdminServicer, FrontDesk, GatewayServicer, Outside
from gateway.settings import GatewaySettings
from sparkrelay.client import Generation
from sparkrelay.device.thread import DeviceThread
from sparkrelay.frames import Hello
from sparkrelay.server import SERVER_INTERCEPTORS, SERVER_OPTIONS
from sparkrelay.v1 import admin_service_pb2_grpc as admin_grpc
from sparkrelay.v1 import drafter_service_pb2_grpc as drafter_grpc
from sparkrelay.v1 import gateway_service_pb2_grpc as gateway_grpc
from tests.verifier_service.servicer_rig import Rig, rig

WAIT_S = 30.0
PROMPT = (40, 41, 42, 40, 41, 42)
FOLLOW_UP = (7, 1, 2, 3)
POLL_S = 0.02
BREATH_S = 0.1  # between two conversations of the healthy session: the noise needs the processor too


def clock_us() -> int:
    return time.monotonic_ns() // 1000


class Drafter:
    """A drafter of ours, whole but for its process."""

    def __init__(
        self,
        addresses: list[str],
        name: str,
        times: LinkTimes | None = None,
        backoff_ms: tuple[int, int] = (20, 100),
        model: DraftModel | None = None,
    ) -> None:
        model = model or load_model("ngram", ModelOptions(block_size=7)).model
        hello = Hello(1, 1, name, "run", model.fingerprint)
        self.engine = DraftEngine(model, hello, clock_us)
        self.crashes: list[BaseException] = []
        self._thread: DeviceThread[Command, Event] = DeviceThread(
            lambda: self.engine, lambda events: self._links.deliver(events), self.crashes.append, clock_us
        )
        self._links = Links(asyncio.get_running_loop(), self._thread.post)
        backoff = Backoff(*backoff_ms, random.Random(1))
        self.dialled = [
            VerifierLink(each, self._links, backoff, clock_us=clock_us, times=times) for each in addresses
        ]
        self.servicer = DrafterServicer(
            hello, self.engine.totals, lambda: [(link.status, link.link_id) for link in self.dialled]
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Drafter]:
        self._thread.start()
        talking = asyncio.create_task(self._links.run(self.dialled))
        try:
            yield self
            assert not talking.done(), "the links crashed"
        finally:
            talking.cancel()
            await asyncio.wait({talking})
            assert self._thread.stop(WAIT_S)
        assert self.crashes == []

    @property
    def connected(self) -> bool:
        return any(link.status.state is LinkState.CONNECTED for link in self.dialled)


@dataclass
class Healthy:
    """What the session that nobody may harm has done. ids: of its turns, a conversation each."""

    conversations: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    def note(self, turn: Generation) -> tuple[int, ...]:
        self.drafted += turn.totals.drafted
        self.accepted += turn.totals.accepted
        return turn.token_ids


@dataclass
class House:
    desk: FrontDesk
    verifier: Rig
    drafter: Drafter
    gateway_address: str
    drafter_address: str
    healthy: Healthy = field(default_factory=Healthy)
    task_count: int = 0

    async def converse(self) -> None:
        """One conversation in a session of its own: two turns, of which the second goes on with the first, greedy and sampled."""
        async with sparkrelay.aio.connect(self.gateway_address) as client:
            async with await client.create_session() as session:
                first = await session.generate(token_ids=PROMPT, max_tokens=60, speculation="fixed:5")
                wanted = (*PROMPT, *first.token_ids, *FOLLOW_UP)
                second = await session.generate(
                    token_ids=wanted, max_tokens=40, temperature=0.7, seed=5, speculation="fixed:5"
                )
            self.healthy.conversations.append((self.healthy.note(first), self.healthy.note(second)))

    @asynccontextmanager
    async def undisturbed(self, *, at_least: int = 3) -> AsyncIterator[None]:
        """Meanwhile the healthy session speaks; at the end its ids are those of before, and it was truly drafted for."""
        await self.converse()
        (expected,) = set(self.healthy.conversations)
        self.healthy = Healthy()
        enough, over = asyncio.Event(), asyncio.Event()

        async def speak() -> None:
            while not over.is_set() or not enough.is_set():
                await self.converse()
                await asyncio.sleep(BREATH_S)
                if len(self.healthy.conversations) >= at_least:
                    enough.set()

        speaking = asyncio.create_task(speak())
        try:
            yield
        finally:
            over.set()
            async with asyncio.timeout(WAIT_S):
                await speaking
        assert set(self.healthy.conversations) == {expected}, "another session was harmed"
        assert self.healthy.drafted > self.healthy.accepted > 0

    async def quiet(self) -> None:
        """Waits until nothing is left but the house itself; says what is if that takes too long."""
        left: list[str] = ["not looked yet"]
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                while left := self._left():  # noqa: ASYNC110  threads and gRPC change it, and ring no bell
                    await asyncio.sleep(POLL_S)
        assert not left, f"left behind: {left}"
        self.verifier.engine.check_integrity()

    def _left(self) -> list[str]:
        hub, load = self.verifier.servicer._hub, self.verifier.engine.load()
        tasks = len(asyncio.all_tasks())
        counts: dict[str, int] = {
            "turn permits": len(self.desk._running),
            "busy sessions": sum(each.busy for each in self.desk.sessions._by_id.values()),
            "watchers": len(self.desk.board._watchers),
            "turns placed": sum(worker.turn_count for worker in self.desk.pool.workers),
            "calls": sum(len(worker._calls) for worker in self.desk.pool.workers),
            "turns at the hub": len(hub.turns),
            "turns that end": len(hub._ending),
            "wishes": len(hub.drafters._wishes),
            "turns in the engine": load.active_turn_count + load.queued_turn_count,
            "foreign links": len(hub._links) - 1,
            "members nobody has": len(hub._link_of) - load.member_count,
            "load watchers": len(hub._watchers) - 1,
            "sessions of the gateway": max(0, len(self.desk.sessions) - self.desk.settings.max_sessions),
            "tasks": max(0, tasks - self.task_count) if self.task_count else 0,
        }
        return [f"{name}: {count}" for name, count in counts.items() if count]


@asynccontextmanager
async def house(*, max_sessions: int = 64, **settings: Any) -> AsyncIterator[House]:
    """A running house whose drafter is connected."""
    async with rig() as verifier:
        outside = Outside(
            clock_us=clock_us,
            wall_s=time.time,
            now=lambda: datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC),
            random_bytes=os.urandom,
        )
        values = {"verifiers": verifier.address, "max_sessions": max_sessions} | settings
        desk = FrontDesk(GatewaySettings(**values), outside)
        drafter = Drafter([verifier.address], "healthy")
        gateway_server, gateway_address = await _serve(
            (gateway_grpc.add_GatewayServiceServicer_to_server, GatewayServicer(desk)),
            (admin_grpc.add_AdminServiceServicer_to_server, AdminServicer(desk)),
        )
        drafter_server, drafter_address = await _serve(
            (drafter_grpc.add_DrafterServiceServicer_to_server, drafter.servicer)
        )
        desk.start()
        try:
            async with drafter.running():
                made = House(desk, verifier, drafter, gateway_address, drafter_address)
                await until(lambda: desk.pool.ready and drafter.connected)
                await until(lambda: any(each.connected for each in desk.pool.views[0].drafters))
                yield made
        finally:
            await gateway_server.stop(0)
            await drafter_server.stop(0)
            await desk.close()


async def _serve(*servicers: tuple[Callable[[Any, Any], None], Any]) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=SERVER_INTERCEPTORS)
    for add, servicer in servicers:
        add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def until(holds: Callable[[], bool], *, limit_s: float = WAIT_S) -> None:
    async with asyncio.timeout(limit_s):
        while not holds():  # noqa: ASYNC110  as above
            await asyncio.sleep(POLL_S)
