"""How a service starts, reports health, drains and ends: a real process, real sockets."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sparkrelay.server import CannotStart, check_address

ROOT = Path(__file__).parents[1]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Small:
    """A running small service."""

    process: subprocess.Popen[bytes]
    listen: str
    channel: grpc.Channel
    health: Any

    def status(self, service: str) -> int:
        return int(self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status)

    def endless(self) -> Any:
        """Opens the endless stream; its first answer has come."""
        stream = self.channel.unary_stream("/tests.Small/Endless")(b"", timeout=60)
        assert next(stream) == b"first"
        return stream


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[..., Small]]:
    """Starts small services; ends them all."""
    started: list[Small] = []

    def start(*flags: str) -> Small:
        port_file = tmp_path / f"ports{len(started)}.json"
        process = launch("--port-file", str(port_file), "--exit-with-stdin", *flags)
        assert process.stderr is not None
        for line in process.stderr:
            if b'"serving"' in line:
                break
        while not port_file.exists():
            assert process.poll() is None
        ports = json.loads(port_file.read_text())
        assert ports["pid"] == process.pid
        channel, health_channel = (
            grpc.insecure_channel(ports["listen"]),
            grpc.insecure_channel(ports["health_listen"]),
        )
        small = Small(process, ports["listen"], channel, health_pb2_grpc.HealthStub(health_channel))
        small_channels.extend([channel, health_channel])
        started.append(small)
        return small

    small_channels: list[grpc.Channel] = []
    yield start
    for channel in small_channels:
        channel.close()
    for service in started:
        finish(service.process)


def launch(*flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.small_service", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> bytes:
    """Ends it if it runs, closes its pipes, returns what it logged; a second time returns nothing."""
    if process.poll() is None:
        process.kill()
    assert process.stderr is not None
    with process:
        return b"" if process.stderr.closed else process.stderr.read()


def wait_for_status(small: Small, service: str, wanted: int) -> None:
    """Follows Watch until it says so; the test's own timeout bounds it."""
    for answer in small.health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=30):
        if answer.status == wanted:
            return


def test_health_answers_check_list_and_watch(small: Callable[..., Small]) -> None:
    service = small()
    wait_for_status(service, "readiness", SERVING)
    assert service.status("liveness") == service.status("") == SERVING
    listed = service.health.List(health_pb2.HealthListRequest(), timeout=10).statuses
    assert {"", "liveness", "readiness"} <= set(listed)
    with pytest.raises(grpc.RpcError) as error:
        service.status("unheard-of")
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_names_the_services(small: Callable[..., Small]) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(small().channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(stub.ServerReflectionInfo(iter([request]), timeout=10))
    assert "tests.Small" in {service.name for service in answer.list_services_response.service}


def test_while_draining_readiness_is_off_and_liveness_is_on(small: Callable[..., Small]) -> None:
    service = small("--behaviour", "patient", "--drain-ms", "30000")
    stream = service.endless()
    service.process.send_signal(signal.SIGTERM)
    wait_for_status(service, "readiness", NOT_SERVING)
    assert service.status("liveness") == SERVING
    assert stream.is_active()


def test_sigterm_ends_open_streams_from_the_inside(small: Callable[..., Small]) -> None:
    service = small()
    stream = service.endless()
    service.process.send_signal(signal.SIGTERM)
    assert list(stream) == [b"last"]
    assert service.process.wait(timeout=20) == 0


def test_an_open_stream_cannot_hold_up_the_end_for_longer_than_the_drain(small: Callable[..., Small]) -> None:
    service = small("--behaviour", "patient", "--drain-ms", "100")
    stream = service.endless()
    service.process.send_signal(signal.SIGTERM)
    with pytest.raises(grpc.RpcError):
        next(stream)
    assert service.process.wait(timeout=20) == 0


def test_the_second_signal_ends_it_at_once(small: Callable[..., Small]) -> None:
    service = small("--behaviour", "patient", "--drain-ms", "1000000")
    stream = service.endless()
    service.process.send_signal(signal.SIGINT)
    wait_for_status(service, "readiness", NOT_SERVING)
    service.process.send_signal(signal.SIGINT)
    with pytest.raises(grpc.RpcError):
        next(stream)
    assert service.process.wait(timeout=20) == 0


def test_the_end_of_stdin_ends_it(small: Callable[..., Small]) -> None:
    service = small()
    assert service.process.stdin is not None
    service.process.stdin.close()
    assert service.process.wait(timeout=20) == 0


def test_a_failure_ends_it_with_1_and_says_why(small: Callable[..., Small]) -> None:
    service = small("--behaviour", "fails")
    with pytest.raises(grpc.RpcError):
        list(service.channel.unary_stream("/tests.Small/Endless")(b"", timeout=20))
    assert service.process.wait(timeout=20) == 1
    assert b"the engine crashed" in finish(service.process)


def test_a_stuck_event_loop_turns_liveness_off_until_it_runs_again(small: Callable[..., Small]) -> None:
    service = small("--stall-limit-ms", "200")
    assert service.status("liveness") == SERVING
    call = service.channel.unary_unary("/tests.Small/Stuck").future(b"2", timeout=30)
    wait_for_status(service, "liveness", NOT_SERVING)
    assert not call.done()
    wait_for_status(service, "liveness", SERVING)
    assert call.result() == b"done"


def test_a_busy_port_is_refused_with_the_port_and_the_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        process = launch("--listen", f"127.0.0.1:{port}")
        assert process.wait(timeout=30) == 1
    output = finish(process).decode()
    assert f"port {port}" in output and "--listen" in output


def test_two_services_cannot_share_a_port(small: Callable[..., Small]) -> None:
    process = launch("--listen", small().listen)
    assert process.wait(timeout=30) == 1
    assert "in use" in finish(process).decode()


def test_an_address_others_can_reach_needs_insecure() -> None:
    process = launch("--listen", "0.0.0.0:0")
    assert process.wait(timeout=30) == 1
    assert "--insecure" in finish(process).decode()
    assert check_address("listen", "0.0.0.0:7", allowed=True) == ("0.0.0.0", 7)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:0", "[::1]:65535", "127.8.8.8:7"])
def test_loopback_addresses_need_nothing(address: str) -> None:
    check_address("listen", address, allowed=False)


@pytest.mark.parametrize("address", ["", "7070", ":7070", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536"])
def test_a_malformed_address_is_refused_by_name(address: str) -> None:
    with pytest.raises(CannotStart, match=r"^listen: .*host:port"):
        check_address("listen", address, allowed=True)


def test_the_port_file_goes_with_the_service(small: Callable[..., Small], tmp_path: Path) -> None:
    service = small()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(timeout=20) == 0
    assert list(tmp_path.iterdir()) == []
