"""Starts a gateway: `python -m gateway --verifiers 127.0.0.1:7071`."""

from __future__ import annotations

import asyncio
import datetime
import os
import sqlite3
import sys
import time
from pathlib import Path

import grpc.aio
import structlog

from gateway.journal_sqlite import SqliteJournal
from gateway.servicer import AdminServicer, FrontDesk, GatewayServicer, Outside
from gateway.servicer.journal_codec import EventCodec
from gateway.settings import GatewaySettings
from sparkrelay.interpreter import spare_rounds
from sparkrelay.security import InsecureSettings, dialling
from sparkrelay.server import Lifecycle, run_service
from sparkrelay.settings import load
from sparkrelay.telemetry import configure_logging
from sparkrelay.v1 import admin_service_pb2 as admin_pb
from sparkrelay.v1 import admin_service_pb2_grpc as admin_grpc
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import gateway_service_pb2_grpc as gateway_grpc

log = structlog.get_logger(__name__)

REFLECTION_NAMES = (
    gateway_pb.DESCRIPTOR.services_by_name["GatewayService"].full_name,
    admin_pb.DESCRIPTOR.services_by_name["AdminService"].full_name,
)


def main() -> int:
    """Runs until told to end; returns the exit code."""
    settings = load(GatewaySettings, sys.argv[1:], prog="python -m gateway")
    configure_logging(settings.log_level, settings.log_format, "gateway")
    return asyncio.run(serve(settings))


async def serve(settings: GatewaySettings) -> int:
    """The gateway with this process's clocks and randomness."""
    lifecycle = Lifecycle()
    outside = Outside(
        clock_us=lambda: time.monotonic_ns() // 1000,
        wall_s=time.time,
        now=lambda: datetime.datetime.now().astimezone(),
        random_bytes=os.urandom,
    )
    try:
        dials, store = dialling(settings), open_journal(settings, outside)
    except (InsecureSettings, sqlite3.Error, OSError) as error:
        log.error("cannot start", name="gateway", reason=str(error))
        return 1
    desk = FrontDesk(settings, outside, on_ready=lifecycle.set_ready, dialling=dials, store=store)
    spare_rounds()

    def add_services(server: grpc.aio.Server) -> None:
        gateway_grpc.add_GatewayServiceServicer_to_server(GatewayServicer(desk), server)
        admin_grpc.add_AdminServiceServicer_to_server(AdminServicer(desk), server)
        desk.start()

    try:
        return await run_service(
            name="gateway",
            settings=settings,
            lifecycle=lifecycle,
            add_services=add_services,
            reflection_names=REFLECTION_NAMES,
            on_drain=desk.drain,
        )
    finally:
        await desk.close()
        if store is not None:
            store.close()


def open_journal(settings: GatewaySettings, outside: Outside) -> SqliteJournal | None:
    """The file that turns are written to, None for memory alone. Raises sqlite3.Error or OSError if it is required."""
    if not settings.journal_path:
        return None
    try:
        path = Path(settings.journal_path)
        return SqliteJournal(path, EventCodec(), settings.resume_keep_ms / 1000, outside.wall_s)
    except (sqlite3.Error, OSError) as error:
        if settings.journal_required:
            raise type(error)(
                f"journal: cannot open {settings.journal_path}: {error}; name another file"
            ) from None
        log.error(
            "no journal: turns cannot be resumed after a restart",
            path=settings.journal_path,
            reason=str(error),
        )
        return None


if __name__ == "__main__":
    sys.exit(main())
