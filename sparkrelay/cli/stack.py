"""A running stack: the services of a plan as child processes that never outlive this one.

    with Stack(plan_stack(options, cores, free_port), folder) as stack:
        stack.wait_until_ready(print)
        ... stack.plan.gateway.listen ...

A child's stdin is a pipe from here: when this process is gone, however it went, the pipe ends and the child drains and ends.
Children get a session of their own, so that Ctrl-C in the terminal reaches this process alone, which then ends them in order.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sparkrelay.cli.stack_plan import ProcessPlan, StackPlan
from sparkrelay.host.cores import explain, plan_threads, read_cores
from sparkrelay.host.memory import MIB
from sparkrelay.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    verifier_service_pb2,
    verifier_service_pb2_grpc,
)

READY_TIMEOUT_S = 180.0  # a large model on a slow disk; a small one takes seconds
POLL_S = 0.05
TAIL_LINES = 15
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 30.0
STEADY_AFTER_S = 60.0  # a process that ran so long starts its backoff afresh

Say = Callable[[str], None]


class StackError(Exception):
    """The stack could not come up; the message says which process, why, and the last lines of its log."""


@dataclass(frozen=True, slots=True)
class Died:
    """A process that ended by itself. restart_in_s: None if it will not be started again."""

    name: str
    how: str
    log_tail: str
    restart_in_s: float | None


@dataclass(frozen=True, slots=True)
class Restarted:
    """A process that was started again."""

    name: str


class Child:
    """One service of the plan: its process, its log, when it was started and when it will be again."""

    def __init__(self, plan: ProcessPlan, log_file: Path) -> None:
        self.plan = plan
        self.log_file = log_file
        self.backoff_s = FIRST_BACKOFF_S
        self.started_at = 0.0
        self.restart_at: float | None = None
        self._log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def start(self, now: float) -> None:
        self.close()
        self.started_at, self.restart_at = now, None
        self._log = self.log_file.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.plan.module, *self.plan.arguments],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **self.plan.environment},
            start_new_session=True,
        )

    def signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """True once it has ended."""
        try:
            if self._process is not None:
                self._process.wait(max(timeout_s, 0.0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL if it still runs; its end is awaited and what belongs to it freed."""
        self.signal(signal.SIGKILL)
        self.wait(10)
        self.close()

    def close(self) -> None:
        """Frees what belongs to a process that has ended."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
        if self._log is not None:
            self._log.close()

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        try:
            text = self.log_file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


class Stack:
    """The children of a plan. Leaving the context ends them all.

    folder   where their logs go
    restart  start a child again that has ended by itself
    """

    def __init__(
        self,
        plan: StackPlan,
        folder: Path,
        *,
        restart: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self._restart = restart
        self._now = now
        self.children = {
            process.name: Child(process, folder / f"{process.name}.log") for process in plan.processes
        }
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def __enter__(self) -> Stack:
        for child in self.children.values():
            child.log_file.write_bytes(b"")
            child.start(self._now())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(grace_s=0.0 if error is not None else None)

    @property
    def gateway(self) -> str:
        return self.plan.gateway.listen

    @property
    def verifier(self) -> str:
        return self.plan.verifier.listen

    @property
    def pids(self) -> dict[str, int]:
        return {name: child.pid for name, child in self.children.items()}

    def wait_until_ready(
        self,
        say: Say = lambda _line: None,
        timeout_s: float = READY_TIMEOUT_S,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Returns when every service is ready and the gateway sees the drafters, or when `give_up` says so.

        Raises StackError when a service ends or time is up.
        """
        started = self._now()
        waiting = list(self.children.values())
        while not give_up() and (waiting or not self.drafters_are_connected()):
            for child in list(waiting):
                if is_ready(child.plan.health_listen):
                    waiting.remove(child)
                    say(
                        f"  {child.plan.name:<10} ready at {child.plan.listen}  ({self._now() - started:.1f} s)"
                    )
            for child in self.children.values():
                if child.exit_code is not None:
                    raise StackError(
                        _failure(child, f"{child.plan.name} {describe_exit(child.exit_code)} while starting")
                    )
            if self._now() - started > timeout_s:
                late = waiting[0] if waiting else list(self.children.values())[1]
                raise StackError(_failure(late, f"{late.plan.name} was not ready after {timeout_s:.0f} s"))
            time.sleep(POLL_S)

    def drafters_are_connected(self) -> bool:
        """True when the gateway knows every drafter of the plan as connected to the verifier."""
        wanted = {drafter.name for drafter in self.plan.drafters}
        if not wanted:
            return True
        try:
            workers = list_workers(self.gateway)
        except grpc.RpcError:
            return False
        connected = verifier_service_pb2.DrafterStatus.STATE_CONNECTED
        known = {
            drafter.drafter_id
            for worker in workers
            for drafter in worker.load.drafters
            if drafter.state == connected
        }
        return wanted <= known

    def poll(self) -> list[Died | Restarted]:
        """Looks after the children; says what has happened since the last call. To be called a few times a second."""
        now = self._now()
        happened: list[Died | Restarted] = []
        for child in self.children.values():
            if child.restart_at is None and child.exit_code is not None:
                happened.append(self._mourn(child, now))
            elif child.restart_at is not None and now >= child.restart_at and self._restart:
                child.start(now)
                happened.append(Restarted(child.plan.name))
        return happened

    def _mourn(self, child: Child, now: float) -> Died:
        assert child.exit_code is not None
        if now - child.started_at > STEADY_AFTER_S:
            child.backoff_s = FIRST_BACKOFF_S
        backoff_s = child.backoff_s
        child.backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
        child.restart_at = now + backoff_s
        restart_in_s = backoff_s if self._restart else None
        return Died(child.plan.name, describe_exit(child.exit_code), child.log_tail(), restart_in_s)

    def kill(self, name: str) -> None:
        """SIGKILL, and its end awaited: for tests."""
        self.children[name].kill()

    def start_again(self, name: str) -> None:
        """Starts a child that has ended, where it was."""
        self.children[name].start(self._now())

    def stop(self, grace_s: float | None = None) -> list[str]:
        """Ends every child: a signal, a while to drain, then SIGKILL. Returns the names of those that had to be killed.

        grace_s  how long to wait after the signal; None for what the services themselves allow
        """
        for child in self.children.values():
            child.signal(signal.SIGTERM)
        deadline = self._now() + (self._drain_s() + 3.0 if grace_s is None else grace_s)
        killed = []
        for name, child in self.children.items():
            if not child.wait(deadline - self._now()):
                killed.append(name)
            child.kill()
        return killed

    def hurry(self) -> None:
        """The second signal: children cut off what is open. Safe to call from a signal handler."""
        for child in self.children.values():
            child.signal(signal.SIGTERM)

    def _drain_s(self) -> float:
        arguments = self.plan.verifier.arguments
        return int(arguments[arguments.index("--drain-ms") + 1]) / 1000


def is_ready(health_address: str) -> bool:
    """What a service's readiness says; False if nobody answers."""
    return health_of(health_address, "readiness") is True


def health_of(health_address: str, service: str, timeout_s: float = 1.0) -> bool | None:
    """True SERVING, False NOT_SERVING, None: nobody answers."""
    with grpc.insecure_channel(health_address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s
            )
        except grpc.RpcError:
            return None
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def list_workers(gateway: str, timeout_s: float = 2.0) -> list[admin_service_pb2.Worker]:
    """The verifiers that a gateway knows. Raises grpc.RpcError if it does not answer."""
    with grpc.insecure_channel(gateway) as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        return list(stub.ListWorkers(admin_service_pb2.ListWorkersRequest(), timeout=timeout_s).workers)


def threads_line(drafter_count: int) -> str:
    """How the services of one machine share its cores, in one line."""
    cores = read_cores()
    return f"threads    {explain(cores, plan_threads(cores.compute_count, drafter_count))}"


def state_line(verifier: str, timeout_s: float = 2.0) -> str:
    """How much session state a verifier has room for, in one line."""
    with grpc.insecure_channel(verifier) as channel:
        stub = verifier_service_pb2_grpc.VerifierServiceStub(channel)
        try:
            told = stub.Describe(verifier_service_pb2.VerifierServiceDescribeRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return "memory     unknown: the verifier did not answer"
    tokens, mib = told.block_count * told.block_tokens, told.block_count * told.block_bytes // MIB
    units = f"{told.block_count:,} units of {told.block_tokens}"
    return f"memory     {tokens:,} tokens of session state, at most {mib:,} MiB ({units}; set by --state-memory-mib)"


def describe_exit(code: int) -> str:
    """A process's end in words."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _failure(child: Child, what: str) -> str:
    return f"{what}. The end of its log ({child.log_file}):\n{child.log_tail()}"
