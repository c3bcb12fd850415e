"""Starts a gateway: `python -m gateway --verifiers 127.0.0.1:7071`."""

from __future__ import annotations

import asyncio
import datetime
import os
import sys
import time

import grpc.aio
import structlog

from gateway.servicer import AdminServicer, FrontDesk, GatewayServicer, Outside
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
        desk = FrontDesk(settings, outside, on_ready=lifecycle.set_ready, dialling=dialling(settings))
    except InsecureSettings as error:
        log.error("cannot start", name="gateway", reason=str(error))
        return 1
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


if __name__ == "__main__":
    sys.exit(main())
