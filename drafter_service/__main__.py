"""`python -m drafter_service`: settings, model, engine on its thread, links, and the small front door."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from typing import NamedTuple

import grpc.aio
import structlog

from drafter_service.backoff import Backoff
from drafter_service.engine import DraftEngine
from drafter_service.events import Command, Event
from drafter_service.kept_sessions import KeepLimits
from drafter_service.links import Links
from drafter_service.models import CannotLoad, LoadedModel, ModelOptions, load_model
from drafter_service.servicer import DrafterServicer
from drafter_service.settings import DrafterSettings
from drafter_service.verifier_link import LinkTimes, VerifierLink
from sparkrelay.device.thread import DeviceThread
from sparkrelay.frames import Hello
from sparkrelay.host.cores import plan_threads, read_cores
from sparkrelay.interpreter import spare_rounds
from sparkrelay.protocol import PROTOCOL_MAX, PROTOCOL_MIN
from sparkrelay.security import InsecureSettings, dialling
from sparkrelay.server import Lifecycle, run_service
from sparkrelay.settings import load
from sparkrelay.telemetry import configure_logging
from sparkrelay.v1 import drafter_service_pb2, drafter_service_pb2_grpc

log = structlog.get_logger(__name__)

NAME = "drafter"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a drafter until it is told to end; returns the exit code."""
    settings = load(DrafterSettings, sys.argv[1:] if argv is None else argv, prog="python -m drafter_service")
    configure_logging(settings.log_level, settings.log_format, NAME)
    threads = plan_threads(read_cores().compute_count)
    for name, value in threads.environment.items():
        os.environ.setdefault(name, value)  # read when torch is imported, which is later
    try:
        return asyncio.run(serve(settings, settings.threads or threads.drafter))
    except (CannotLoad, InsecureSettings) as error:
        log.error("cannot start", name=NAME, reason=str(error))
        return 1


class _Running(NamedTuple):
    """What the device thread has made."""

    loaded: LoadedModel
    engine: DraftEngine
    hello: Hello


async def serve(settings: DrafterSettings, threads: int) -> int:
    """The service on this event loop. Raises CannotLoad where the settings name a model that is not to be had."""
    loop = asyncio.get_running_loop()
    lifecycle = Lifecycle()
    running: asyncio.Future[_Running] = loop.create_future()

    def make_engine() -> DraftEngine:
        made = _make_engine(settings, threads)
        loop.call_soon_threadsafe(running.set_result, made)
        return made.engine

    def on_events(events: Sequence[Event]) -> None:
        links.deliver(events)

    def on_crash(error: BaseException) -> None:
        loop.call_soon_threadsafe(crashed, error)

    def crashed(error: BaseException) -> None:
        if not running.done():
            running.set_exception(error)
            return
        log.error("the engine crashed", exc_info=error)
        lifecycle.fail(f"the engine crashed: {error!r}")

    thread: DeviceThread[Command, Event] = DeviceThread(make_engine, on_events, on_crash, _clock_us)
    links = Links(loop, thread.post)
    thread.start()
    made = await running
    spare_rounds()
    log.info(
        "loaded", kind=settings.kind, model=settings.model, drafter_id=made.hello.drafter_id, threads=threads
    )
    try:
        return await _serve(settings, lifecycle, links, made)
    finally:
        thread.stop(timeout_s=2)


async def _serve(settings: DrafterSettings, lifecycle: Lifecycle, links: Links, made: _Running) -> int:
    dialled = [_link(address, settings, links, made.loaded) for address in settings.verifier_addresses]
    servicer = DrafterServicer(
        made.hello, made.engine.totals, lambda: [(link.status, link.link_id) for link in dialled]
    )
    talking = asyncio.create_task(links.run(dialled))

    def links_ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the links crashed", exc_info=error)
            lifecycle.fail(f"the links crashed: {error!r}")

    talking.add_done_callback(links_ended)

    def add_services(server: grpc.aio.Server) -> None:
        drafter_service_pb2_grpc.add_DrafterServiceServicer_to_server(servicer, server)
        lifecycle.set_ready()

    async def on_drain(limit_s: float) -> None:
        servicer.end_watches()
        await links.drain()
        await asyncio.wait({talking}, timeout=limit_s / 2)

    try:
        return await run_service(
            name=NAME,
            settings=settings,
            lifecycle=lifecycle,
            add_services=add_services,
            reflection_names=[
                service.full_name for service in drafter_service_pb2.DESCRIPTOR.services_by_name.values()
            ],
            on_drain=on_drain,
        )
    finally:
        talking.cancel()
        await asyncio.wait({talking})


def _make_engine(settings: DrafterSettings, threads: int) -> _Running:
    options = ModelOptions(
        block_size=settings.block_size,
        model=settings.model,
        target=settings.target,
        dtype=settings.dtype,
        exact=settings.exact,
        threads=threads,
        state_memory_mib=settings.state_memory_mib,
        ngram_min=settings.ngram_min,
        ngram_max=settings.ngram_max,
        seed=settings.seed,
    )
    loaded = load_model(settings.kind, options)
    hello = Hello(
        PROTOCOL_MIN,
        PROTOCOL_MAX,
        settings.drafter_id or _default_id(settings),
        uuid.uuid4().hex,
        loaded.model.fingerprint,
    )
    limits = KeepLimits(settings.kept_sessions, settings.kept_tokens)
    engine = DraftEngine(loaded.model, hello, _clock_us, limits, max_sessions=settings.max_sessions)
    return _Running(loaded, engine, hello)


def _link(address: str, settings: DrafterSettings, links: Links, loaded: LoadedModel) -> VerifierLink:
    return VerifierLink(
        address,
        links,
        Backoff(settings.backoff_min_ms, settings.backoff_max_ms, random.Random()),
        clock_us=_clock_us,
        times=LinkTimes(welcome_s=settings.welcome_timeout_ms / 1000),
        tamper=loaded.tamper,
        dialling=dialling(settings),
    )


def _default_id(settings: DrafterSettings) -> str:
    """host-port; with a free port, which is not known yet, host-pid."""
    port = settings.listen.rpartition(":")[2]
    return f"{socket.gethostname()}-{port if port != '0' else os.getpid()}"


def _clock_us() -> int:
    return time.monotonic_ns() // 1000


if __name__ == "__main__":
    sys.exit(main())
