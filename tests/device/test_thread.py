"""One thread owns the engine: order of commands, one delivery a step, sleep, stop, crash."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparkrelay.device.thread import DeviceThread, StepResult

WAIT_S = 20.0
"""How long a test waits for what must come; never reached by a test that passes."""


@dataclass
class Echo:
    """Answers every command with itself, and remembers its steps."""

    steps: list[list[str]] = field(default_factory=list)
    thread_ids: set[int] = field(default_factory=set)

    def step(self, commands: Sequence[str], now_us: int) -> StepResult[str]:
        self.steps.append(list(commands))
        self.thread_ids.add(threading.get_ident())
        if "crash" in commands:
            raise AssertionError("a broken invariant")
        return StepResult(list(commands), None)


@dataclass
class Countdown:
    """Has three more things to do after a command, each due at once."""

    left: int = 0

    def step(self, commands: Sequence[str], now_us: int) -> StepResult[int]:
        self.left += 3 * len(commands)
        if not self.left:
            return StepResult([], None)
        self.left -= 1
        return StepResult([self.left], now_us if self.left else None)


class Alarm:
    """Wants to be called again one virtual second after its first step."""

    def step(self, commands: Sequence[str], now_us: int) -> StepResult[int]:
        return StepResult([now_us], 1_000_000 if now_us < 1_000_000 else None)


class Outbox:
    """Where a device thread delivers and reports."""

    def __init__(self) -> None:
        self.deliveries: queue.Queue[list[object]] = queue.Queue()
        self.crashes: queue.Queue[BaseException] = queue.Queue()

    def thread(self, engine: object, clock_us: object = None) -> DeviceThread[str, object]:
        clock = clock_us or (lambda: 0)
        return DeviceThread(
            lambda: engine,
            lambda events: self.deliveries.put(list(events)),
            self.crashes.put,
            clock,  # type: ignore[arg-type, return-value]
        )

    def next(self) -> list[object]:
        return self.deliveries.get(timeout=WAIT_S)


def test_commands_arrive_in_order_on_one_thread_that_is_not_the_callers() -> None:
    engine, outbox = Echo(), Outbox()
    thread = outbox.thread(engine)
    thread.start()
    wanted = [f"command {number}" for number in range(500)]
    for command in wanted:
        assert thread.post(command)
    got: list[object] = []
    while len(got) < len(wanted):
        got += outbox.next()
    assert thread.stop(WAIT_S)
    assert got == wanted
    assert len(engine.thread_ids) == 1 and threading.get_ident() not in engine.thread_ids


def test_commands_that_wait_together_are_one_step_and_one_delivery() -> None:
    engine, outbox = Echo(), Outbox()
    thread = outbox.thread(engine)
    for command in ("a", "b", "c"):
        thread.post(command)
    thread.start()
    assert outbox.next() == ["a", "b", "c"]
    assert thread.stop(WAIT_S)
    assert engine.steps == [["a", "b", "c"]]


def test_an_engine_with_work_left_is_stepped_without_commands_until_it_has_none() -> None:
    outbox = Outbox()
    thread = outbox.thread(Countdown())
    thread.start()
    thread.post("go")
    assert [outbox.next() for _ in range(3)] == [[2], [1], [0]]
    thread.post("again")
    assert outbox.next() == [2]
    assert thread.stop(WAIT_S)


def test_an_engine_that_is_due_later_is_stepped_when_its_clock_says_so() -> None:
    moments = iter([0, 999_000, *[1_000_000] * 100])
    outbox = Outbox()
    thread = outbox.thread(Alarm(), lambda: next(moments))
    thread.start()
    thread.post("go")
    assert outbox.next() == [0]
    assert outbox.next() == [1_000_000]
    assert thread.stop(WAIT_S)


def test_an_engine_with_nothing_due_sleeps_until_a_command_comes() -> None:
    engine, outbox = Echo(), Outbox()
    thread = outbox.thread(engine)
    thread.start()
    for command in ("first", "second"):
        thread.post(command)
        assert outbox.next() == [command]
    assert thread.stop(WAIT_S)
    assert engine.steps == [["first"], ["second"]], "no step without a reason"


def test_stop_ends_the_thread_and_refuses_what_comes_later() -> None:
    engine, outbox = Echo(), Outbox()
    thread = outbox.thread(engine)
    thread.start()
    assert thread.stop(WAIT_S)
    assert not thread.alive
    assert not thread.post("too late")
    assert engine.steps == []
    assert thread.stop(WAIT_S), "stopping twice is harmless"


def test_stop_says_when_a_step_does_not_end_in_time() -> None:
    entered, leave = threading.Event(), threading.Event()

    class Stuck:
        def step(self, commands: Sequence[str], now_us: int) -> StepResult[str]:
            entered.set()
            leave.wait(WAIT_S)
            return StepResult([], 0)

    thread = Outbox().thread(Stuck())
    thread.start()
    thread.post("go")
    assert entered.wait(WAIT_S)
    assert not thread.stop(0.0)
    leave.set()
    assert thread.stop(WAIT_S)


def test_a_crash_is_reported_once_and_ends_the_thread() -> None:
    outbox = Outbox()
    thread = outbox.thread(Echo())
    thread.start()
    thread.post("crash")
    assert str(outbox.crashes.get(timeout=WAIT_S)) == "a broken invariant"
    assert thread.stop(WAIT_S)
    assert not thread.post("more")
    assert outbox.crashes.empty() and outbox.deliveries.empty()


def test_an_engine_that_cannot_be_made_is_a_crash_too() -> None:
    outbox = Outbox()

    def fail() -> Echo:
        raise OSError("no such model")

    thread: DeviceThread[str, str] = DeviceThread(fail, lambda events: None, outbox.crashes.put, lambda: 0)
    thread.start()
    assert str(outbox.crashes.get(timeout=WAIT_S)) == "no such model"
    assert thread.stop(WAIT_S)
