"""A stack of real processes that do nothing: deaths are told, the dead come back, nothing outlives its end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from sparkrelay.cli.stack import FIRST_BACKOFF_S, Died, Restarted, Stack, StackError, describe_exit, health_of
from sparkrelay.cli.stack_plan import ProcessPlan, StackPlan, any_free_port
from sparkrelay.runtime import is_alive

ROOT = Path(__file__).parents[2]


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def process_plan(name: str, *flags: str) -> ProcessPlan:
    listen, health = (f"127.0.0.1:{any_free_port(0)}" for _ in range(2))
    arguments = (
        "--listen",
        listen,
        "--health-listen",
        health,
        "--exit-with-stdin",
        "--drain-ms",
        "500",
        *flags,
    )
    return ProcessPlan(name, "tests.small_service", arguments, listen, health)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> StackPlan:
    monkeypatch.chdir(ROOT)
    return StackPlan(process_plan("verifier"), (), process_plan("gateway"), "none")


def test_a_stack_comes_up_and_leaves_no_process_and_no_port(plan: StackPlan, tmp_path: Path) -> None:
    lines: list[str] = []
    with Stack(plan, tmp_path) as stack:
        stack.wait_until_ready(lines.append)
        pids = stack.pids
        assert all(health_of(process.health_listen, "liveness") for process in plan.processes)
    assert [line.split()[0] for line in lines] in (["verifier", "gateway"], ["gateway", "verifier"])
    assert not any(is_alive(pid) for pid in pids.values())
    for process in plan.processes:
        socket.create_server(("127.0.0.1", int(process.listen.rpartition(":")[2]))).close()


def test_a_service_that_cannot_start_fails_the_stack_with_its_name_and_log(
    plan: StackPlan, tmp_path: Path
) -> None:
    broken = StackPlan(
        plan.verifier, (), process_plan("gateway", "--behaviour", "obedient", "--drain-ms", "x"), "none"
    )
    with (
        pytest.raises(StackError, match="gateway ended with exit code 2 while starting") as error,
        Stack(broken, tmp_path) as stack,
    ):
        stack.wait_until_ready()
    assert "drain_ms" in str(error.value)
    assert not any(is_alive(pid) for pid in stack.pids.values())


def wait_for_the_end(stack: Stack, name: str) -> None:
    assert stack.children[name].wait(20)


def test_a_death_is_told_once_and_the_dead_comes_back_after_its_backoff(
    plan: StackPlan, tmp_path: Path
) -> None:
    clock = Clock()
    with Stack(plan, tmp_path, restart=True, now=clock) as stack:
        stack.wait_until_ready()
        assert stack.poll() == []
        first = stack.pids["gateway"]
        stack.kill("gateway")
        (died,) = stack.poll()
        assert isinstance(died, Died)
        assert (died.name, died.how, died.restart_in_s) == (
            "gateway",
            "was killed by SIGKILL",
            FIRST_BACKOFF_S,
        )
        assert "serving" in died.log_tail
        assert stack.poll() == []
        assert health_of(plan.verifier.health_listen, "liveness")
        clock.now += FIRST_BACKOFF_S
        assert stack.poll() == [Restarted("gateway")]
        assert stack.pids["gateway"] != first


def test_the_backoff_doubles_and_starts_afresh_after_a_steady_minute(plan: StackPlan, tmp_path: Path) -> None:
    clock = Clock()
    waits = []
    with Stack(plan, tmp_path, restart=True, now=clock) as stack:
        for steady_s in (0, 0, 0, 61):
            clock.now += steady_s
            stack.kill("gateway")
            (died,) = stack.poll()
            assert isinstance(died, Died) and died.restart_in_s is not None
            waits.append(died.restart_in_s)
            clock.now += died.restart_in_s
            assert stack.poll() == [Restarted("gateway")]
    assert waits == [1.0, 2.0, 4.0, 1.0]


def test_without_restart_a_death_is_only_told(plan: StackPlan, tmp_path: Path) -> None:
    clock = Clock()
    with Stack(plan, tmp_path, now=clock) as stack:
        stack.kill("verifier")
        (died,) = stack.poll()
        assert isinstance(died, Died) and died.restart_in_s is None
        clock.now += 1000
        assert stack.poll() == []


def test_children_never_outlive_a_parent_that_was_killed(plan: StackPlan, tmp_path: Path) -> None:
    program = f"""
        from pathlib import Path
        from sparkrelay.cli.stack import Stack
        from sparkrelay.cli.stack_plan import ProcessPlan, StackPlan
        with Stack({plan!r}, Path({str(tmp_path)!r})) as stack:
            stack.wait_until_ready()
            print(*stack.pids.values(), flush=True)
            input()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def wait_until(condition: Callable[[], bool]) -> None:
    """Bounded by the test's own timeout."""
    while not condition():
        pass


def test_a_service_that_does_not_end_is_killed(plan: StackPlan, tmp_path: Path) -> None:
    with Stack(plan, tmp_path) as stack:
        stack.wait_until_ready()
        stack.children["gateway"].signal(signal.SIGSTOP)
        assert stack.stop(grace_s=1.0) == ["gateway"]
        assert not any(is_alive(pid) for pid in stack.pids.values())


def test_exits_are_told_in_words() -> None:
    assert describe_exit(3) == "ended with exit code 3"
    assert describe_exit(-15) == "was killed by SIGTERM"
