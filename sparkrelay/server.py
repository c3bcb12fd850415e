"""How a service starts, reports health, drains and ends. All three do it in these lines.

    SIGTERM, SIGINT or the end of stdin    -> readiness says NOT_SERVING, liveness goes on saying SERVING
                                           -> on_drain(seconds): refuse new work, end open streams from the inside
                                           -> the server stops; what is still open then is cut off
    the same once more                     -> cut off now
    Lifecycle.fail                         -> cut off now, exit code 1

Health (grpc.health.v1: Check, List, Watch) has its own thread and port, so that a busy event loop cannot make a service look
dead, and its own eye on that loop, so that a stuck one does. Its services: "liveness", "readiness", and "" which is readiness.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sparkrelay.runtime import write_json
from sparkrelay.security import InsecureSettings, SecuritySettings, is_loopback, server_security
from sparkrelay.wire import RefuseUnreadable

log = structlog.get_logger(__name__)

FRAME_LIMIT_BYTES = 4 * 1024 * 1024
STALL_LIMIT_S = 10.0  # an event loop that has not run for so long is stuck: liveness says NOT_SERVING
CUT_OFF_S = 0.5  # between the end of the drain and cutting off what is still open
LAST_WORDS_S = 5.0  # after the drain: what a process may take to close what it holds

# Two services that share a port would each get half of the calls: the kernel's default is to allow it.
SERVER_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", FRAME_LIMIT_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)

# What every server of ours does to a call before a servicer sees it.
SERVER_INTERCEPTORS = (RefuseUnreadable(),)

# For every channel to one of our services: pings often enough to notice a dead peer, never more often than the server allows.
CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", FRAME_LIMIT_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class ServerSettings(SecuritySettings, Protocol):
    """What this file needs of a service's settings; every settings class has these fields, with the same meaning."""

    @property
    def listen(self) -> str: ...
    @property
    def health_listen(self) -> str: ...
    @property
    def port_file(self) -> str: ...
    @property
    def exit_with_stdin(self) -> bool: ...
    @property
    def drain_ms(self) -> int: ...
    @property
    def insecure(self) -> bool: ...
    @property
    def tls_cert(self) -> str: ...


class CannotStart(Exception):
    """A setting that this machine or this project refuses; the message names the setting and what to do."""


class Lifecycle:
    """Where a service stands. Any thread may change it; the event loop that runs the service hears of it.

    ready     it can do its work (a gateway without a verifier cannot)
    draining  it was asked to end: refuse new work
    failure   why it must end at once, "" if it need not
    """

    def __init__(self) -> None:
        self.ready = False
        self.failure = ""
        self._stop_count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()

    @property
    def draining(self) -> bool:
        return self._stop_count > 0

    @property
    def must_stop_now(self) -> bool:
        return self._stop_count > 1 or bool(self.failure)

    def set_ready(self, ready: bool = True) -> None:
        self.ready = ready
        self._announce()

    def stop(self) -> None:
        """Asks the service to drain and end; asked again, it ends at once."""
        self._stop_count += 1
        self._announce()

    def fail(self, message: str) -> None:
        """The service cannot go on (a crashed engine): it ends at once with exit code 1."""
        self.failure = self.failure or message
        self._announce()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._announce()

    async def changed(self) -> None:
        """Returns when anything has changed since the last call."""
        await self._changed.wait()
        self._changed.clear()

    def _announce(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)


async def run_service(
    *,
    name: str,
    settings: ServerSettings,
    lifecycle: Lifecycle,
    add_services: Callable[[grpc.aio.Server], None],
    reflection_names: Sequence[str],
    on_drain: Callable[[float], Awaitable[None]],
    stall_limit_s: float = STALL_LIMIT_S,
) -> int:
    """Runs a service until it is told to end; returns the exit code of the process.

    add_services      registers the servicers; called on the running loop, before the port is open
    reflection_names  full names of the services, for tools such as grpcurl
    on_drain          must make the open calls end; gets the seconds it has and is cancelled after them
    stall_limit_s     liveness turns to NOT_SERVING when the event loop has not run for so long
    """
    lifecycle.attach(asyncio.get_running_loop())
    try:
        server, listen = _serve_on(settings, add_services, reflection_names)
        health_server = HealthServer(settings, stall_limit_s)
    except CannotStart as error:
        log.error("cannot start", name=name, reason=str(error))
        return 1
    port_file = Path(settings.port_file) if settings.port_file else None
    tasks: list[asyncio.Task[None]] = [asyncio.create_task(health_server.beat())]
    try:
        _listen_for_the_end(lifecycle, settings.exit_with_stdin)
        await server.start()
        log.info("serving", name=name, listen=listen, health_listen=health_server.address)
        if port_file is not None:
            port_file.parent.mkdir(parents=True, exist_ok=True)
            content = {"pid": os.getpid(), "listen": listen, "health_listen": health_server.address}
            write_json(port_file, content)
        await _until_the_end(server, lifecycle, health_server, on_drain, settings.drain_ms / 1000)
    finally:
        for task in tasks:
            task.cancel()
        health_server.stop()
        if port_file is not None:
            port_file.unlink(missing_ok=True)
    if lifecycle.failure:
        log.error("failed", name=name, reason=lifecycle.failure)
        return 1
    log.info("ended", name=name)
    return 0


def _serve_on(
    settings: ServerSettings, add_services: Callable[[grpc.aio.Server], None], reflection_names: Sequence[str]
) -> tuple[grpc.aio.Server, str]:
    try:
        credentials, checks = server_security(settings)
    except InsecureSettings as error:
        raise CannotStart(str(error)) from None
    host, port = check_address("listen", settings.listen, settings.insecure or credentials is not None)
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=(*checks, *SERVER_INTERCEPTORS))
    add_services(server)
    reflection.enable_server_reflection((*reflection_names, reflection.SERVICE_NAME), server)
    bound = _bind(server, "listen", host, port, credentials)
    return server, f"{host}:{bound}"


def check_address(field: str, address: str, allowed: bool) -> tuple[str, int]:
    """The host and port of an address. CannotStart if it is malformed, or others can reach it and that is not allowed."""
    host, separator, port_text = address.rpartition(":")
    if not separator or not host or not port_text.isdecimal() or int(port_text) > 65535:
        raise CannotStart(
            f"{field}: {address!r} is no address; write host:port, for example 127.0.0.1:0 (0 = any free port)"
        )
    if not allowed and not is_loopback(host):
        raise CannotStart(
            f"{field}: {address} can be reached from other machines and the connection is not encrypted; "
            "give --tls-cert and --tls-key, listen on 127.0.0.1, or pass --insecure if the network is trusted"
        )
    return host, int(port_text)


def _bind(
    server: grpc.Server | grpc.aio.Server,
    field: str,
    host: str,
    port: int,
    credentials: grpc.ServerCredentials | None = None,
) -> int:
    """Opens the port; returns the real one. Must be called where the server lives."""
    try:
        if credentials is None:
            bound = server.add_insecure_port(f"{host}:{port}")
        else:
            bound = server.add_secure_port(f"{host}:{port}", credentials)
    except RuntimeError:
        bound = 0
    if bound:
        return bound
    flag = field.replace("_", "-")
    raise CannotStart(
        f"{field}: cannot open port {port} on {host}: it is in use, or the address is not this machine's; "
        f"stop what uses it, or choose another with --{flag} (port 0 = any free one)"
    )


def _listen_for_the_end(lifecycle: Lifecycle, exit_with_stdin: bool) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lifecycle.stop)
    if exit_with_stdin:
        threading.Thread(target=_stop_after_stdin, args=(lifecycle,), name="stdin", daemon=True).start()


def _stop_after_stdin(lifecycle: Lifecycle) -> None:
    try:
        # Not sys.stdin: a thread that holds its lock would stop the interpreter from ending.
        while os.read(0, 4096):
            pass
    except OSError:
        pass
    lifecycle.stop()


async def _until_the_end(
    server: grpc.aio.Server,
    lifecycle: Lifecycle,
    health_server: HealthServer,
    on_drain: Callable[[float], Awaitable[None]],
    drain_s: float,
) -> None:
    while not lifecycle.draining and not lifecycle.must_stop_now:
        await lifecycle.changed()
        health_server.set_ready(lifecycle.ready and not lifecycle.draining)
    health_server.set_ready(False)
    if lifecycle.must_stop_now:
        await server.stop(0)
        return
    log.info("draining", limit_ms=round(drain_s * 1000))
    _end_for_certain(drain_s + LAST_WORDS_S)
    drain = asyncio.create_task(_drain(server, on_drain, drain_s))
    while not drain.done() and not lifecycle.must_stop_now:
        change = asyncio.create_task(lifecycle.changed())
        await asyncio.wait({drain, change}, return_when=asyncio.FIRST_COMPLETED)
        change.cancel()
    if not drain.done():
        log.warning("told to end now: what is open is cut off")
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=True)
    await server.stop(0)


def _end_for_certain(limit_s: float) -> None:
    """A process that was told to end does end, even if something in it waits for ever: that is a bug, and the log says so."""

    def cut() -> None:
        log.error("did not end in time: cut off", limit_s=round(limit_s, 1))
        os._exit(1)

    timer = threading.Timer(limit_s, cut)
    timer.daemon = True
    timer.start()


async def _drain(
    server: grpc.aio.Server, on_drain: Callable[[float], Awaitable[None]], drain_s: float
) -> None:
    try:
        async with asyncio.timeout(drain_s):
            await on_drain(drain_s)
    except TimeoutError:
        log.warning("the drain took too long: what is open is cut off", limit_ms=round(drain_s * 1000))
        return
    except Exception:
        log.exception("the drain failed: what is open is cut off")
        return
    await server.stop(CUT_OFF_S)


class _HealthServicer(health.HealthServicer):  # type: ignore[misc]  # the library has no types
    """The library's servicer and the call that it lacks on threads."""

    def List(  # noqa: N802  the name is the call's
        self, request: health_pb2.HealthListRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthListResponse:
        with self._lock:
            statuses = dict(self._server_status)
        return health_pb2.HealthListResponse(
            statuses={
                name: health_pb2.HealthCheckResponse(status=status) for name, status in statuses.items()
            }
        )


class HealthServer:
    """The health service of one process on threads of its own. Without an address it only keeps the answers, for nobody."""

    def __init__(self, settings: ServerSettings, stall_limit_s: float) -> None:
        self._stall_limit_s = stall_limit_s
        self._last_beat = time.monotonic()
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="health")
        self._servicer = _HealthServicer(experimental_non_blocking=True, experimental_thread_pool=self._pool)
        self._server = grpc.server(self._pool, options=SERVER_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        self.address = ""
        if settings.health_listen:
            # Health is plain also beside TLS: it tells no secret, and those who probe have no certificates.
            allowed = settings.insecure or bool(settings.tls_cert)
            host, port = check_address("health_listen", settings.health_listen, allowed)
            self.address = f"{host}:{_bind(self._server, 'health_listen', host, port)}"
        self._set(["liveness"], True)
        self.set_ready(False)
        self._server.start()
        threading.Thread(target=self._watch_the_loop, name="health-watch", daemon=True).start()

    def set_ready(self, ready: bool) -> None:
        self._set(["", "readiness"], ready)

    async def beat(self) -> None:
        """Runs on the event loop that is watched, for as long as the service does."""
        while True:
            self._last_beat = time.monotonic()
            await asyncio.sleep(self._stall_limit_s / 4)

    def stop(self) -> None:
        self._ended.set()
        self._server.stop(0).wait(1)
        self._pool.shutdown(wait=False)

    def _watch_the_loop(self) -> None:
        alive = True
        while not self._ended.wait(self._stall_limit_s / 4):
            silent_s = time.monotonic() - self._last_beat
            if alive != (silent_s < self._stall_limit_s):
                alive = not alive
                self._set(["liveness"], alive)
                log.warning(
                    "the event loop runs again" if alive else "the event loop is stuck",
                    silent_s=round(silent_s, 1),
                )

    def _set(self, services: Sequence[str], serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in services:
            self._servicer.set(service, status)
