"""The drafter's front door: tells people and tools what it is and does. No work comes in here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc.aio

from drafter_service.engine import Totals
from drafter_service.links import LinkStatus
from sparkrelay.frames import Hello
from sparkrelay.v1 import drafter_service_pb2 as pb2
from sparkrelay.v1 import drafter_service_pb2_grpc as pb2_grpc
from sparkrelay.wire import fingerprint_pb

REPORT_EVERY_S = 1.0

_Context = grpc.aio.ServicerContext[Any, Any]


class DrafterServicer(pb2_grpc.DrafterServiceServicer):
    """See the module.

    statuses  asks for the state of every link, with the number of its connection
    """

    def __init__(
        self, hello: Hello, totals: Totals, statuses: Callable[[], Sequence[tuple[LinkStatus, int]]]
    ) -> None:
        self._hello = hello
        self._totals = totals
        self._statuses = statuses
        self._ended = asyncio.Event()

    def end_watches(self) -> None:
        """The service will end: open reports do too."""
        self._ended.set()

    async def Describe(
        self, request: pb2.DrafterServiceDescribeRequest, context: _Context
    ) -> pb2.DrafterServiceDescribeResponse:
        return pb2.DrafterServiceDescribeResponse(
            drafter_id=self._hello.drafter_id,
            incarnation=self._hello.incarnation,
            fingerprint=fingerprint_pb(self._hello.fingerprint),
        )

    async def WatchLoad(
        self, request: pb2.DrafterServiceWatchLoadRequest, context: _Context
    ) -> AsyncIterator[pb2.DrafterServiceWatchLoadResponse]:
        while not self._ended.is_set():
            yield self._report()
            try:
                async with asyncio.timeout(REPORT_EVERY_S):
                    await self._ended.wait()
            except TimeoutError:
                continue

    def _report(self) -> pb2.DrafterServiceWatchLoadResponse:
        totals = self._totals
        return pb2.DrafterServiceWatchLoadResponse(
            links=[
                pb2.LinkStatus(
                    address=status.address,
                    state=pb2.LinkStatus.State.ValueType(status.state),
                    message=status.message,
                    verifier_id=status.verifier_id,
                    session_count=totals.sessions_by_link.get(link_id, 0),
                )
                for status, link_id in self._statuses()
            ],
            session_count=sum(totals.sessions_by_link.values()),
            block_count=totals.block_count,
            token_count=totals.token_count,
            step_us=totals.step_us,
        )
