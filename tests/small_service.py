"""A service made of nothing but `sparkrelay.server`, run as a process by the tests: one endless stream, one way to get stuck.

    python -m tests.small_service --listen ... [--behaviour patient|obedient|fails]

patient: on_drain waits for ever. obedient: on_drain ends the streams. fails: the service fails after it was called once.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator

import grpc.aio
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sparkrelay.server import Lifecycle, run_service
from sparkrelay.settings import ServiceSettings, load
from sparkrelay.telemetry import configure_logging


class SmallSettings(ServiceSettings):
    """A service for tests."""

    model_config = SettingsConfigDict(env_prefix="SPARKRELAY_SMALL_")

    listen: str = Field("127.0.0.1:0", description="Address.")
    health_listen: str = Field("127.0.0.1:0", description="Address of health.")
    port_file: str = Field("", description="Where to write the ports.")
    exit_with_stdin: bool = Field(False, description="End with stdin.")
    drain_ms: int = Field(5000, description="Longest drain.")
    insecure: bool = Field(False, description="Plaintext.")
    behaviour: str = Field("obedient", description="patient, obedient or fails.")
    stall_limit_ms: int = Field(10_000, description="When the loop counts as stuck.")


async def main() -> int:
    settings = load(SmallSettings, sys.argv[1:])
    configure_logging("info", "json", "small")
    lifecycle = Lifecycle()
    draining = asyncio.Event()

    async def endless(
        request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        if settings.behaviour == "fails":
            lifecycle.fail("the engine crashed")
        yield b"first"
        await draining.wait()
        yield b"last"

    async def stuck(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        time.sleep(float(request))  # noqa: ASYNC251  the point of this call: it holds up the event loop
        return b"done"

    def add_services(server: grpc.aio.Server) -> None:
        handlers = {
            "Endless": grpc.unary_stream_rpc_method_handler(endless),  # type: ignore[arg-type]
            "Stuck": grpc.unary_unary_rpc_method_handler(stuck),  # type: ignore[arg-type]
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("tests.Small", handlers),))

    async def on_drain(_seconds: float) -> None:
        if settings.behaviour == "patient":
            await asyncio.Event().wait()
        draining.set()

    lifecycle.set_ready()
    return await run_service(
        name="small",
        settings=settings,
        lifecycle=lifecycle,
        add_services=add_services,
        reflection_names=["tests.Small"],
        on_drain=on_drain,
        stall_limit_s=settings.stall_limit_ms / 1000,
    )


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
