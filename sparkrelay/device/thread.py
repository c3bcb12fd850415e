"""One thread owns one device: commands go into its inbox, the events of each step come out of one callback.

Everything the engine does happens on this thread, in the order of the inbox, so the engine itself needs no lock and no clock.
An asyncio servicer posts commands from its loop and takes the events of a step with one `loop.call_soon_threadsafe`:
waking a loop costs more than most events do, so the callback gets them together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from sparkrelay.device.step_profile import StepProfile

Command = TypeVar("Command")
Event = TypeVar("Event")
Command_contra = TypeVar("Command_contra", contravariant=True)
Event_co = TypeVar("Event_co", covariant=True)


@dataclass(frozen=True, slots=True)
class StepResult(Generic[Event_co]):
    """What one step did.

    events       in the order they happened
    next_due_us  when (on the injected clock) to step again without a command; now or earlier: at once; None: never
    profile      where the time went, if the step computed something and the engine has a stopwatch that runs
    """

    events: Sequence[Event_co]
    next_due_us: int | None
    profile: StepProfile | None = None


class Engine(Protocol[Command_contra, Event_co]):
    """What a device thread drives: synchronous, deterministic given its inputs, never blocking on anything but the device."""

    def step(self, commands: Sequence[Command_contra], now_us: int) -> StepResult[Event_co]:
        """Takes the commands that have arrived, in order, does one unit of work, says what happened."""


class DeviceThread(Generic[Command, Event]):
    """A running engine.

    make_engine  called first on the new thread, so that what it loads belongs to that thread
    deliver      called on the device thread, once per step that has events, with all of them
    crashed      called on the device thread, once, with what escaped the engine (or deliver): a broken invariant. The thread is
                 over then and the process must end; commands are dropped
    clock_us     a monotonic clock in microseconds
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine[Command, Event]],
        deliver: Callable[[Sequence[Event]], None],
        crashed: Callable[[BaseException], None],
        clock_us: Callable[[], int],
        name: str = "device",
    ) -> None:
        self._make_engine = make_engine
        self._deliver = deliver
        self._crashed = crashed
        self._clock_us = clock_us
        self._wake = threading.Condition()
        self._inbox: list[Command] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def post(self, command: Command) -> bool:
        """Hands over a command from any thread. False when the thread is stopping: it will not be seen."""
        return self.post_all((command,))

    def post_all(self, commands: Sequence[Command]) -> bool:
        """As `post`, for commands that arrived together: the same step sees them all."""
        with self._wake:
            if self._stopping:
                return False
            self._inbox.extend(commands)
            self._wake.notify()
            return True

    def stop(self, timeout_s: float) -> bool:
        """Lets the step in progress end and no other begin. False when it had not ended after `timeout_s`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            engine = self._make_engine()
            due_us: int | None = None
            while (commands := self._next_commands(due_us)) is not None:
                result = engine.step(commands, self._clock_us())
                if result.events:
                    self._deliver(result.events)
                due_us = result.next_due_us
        except BaseException as crash:  # noqa: BLE001 - reported to the owner, who ends the process
            with self._wake:
                self._stopping = True
            self._crashed(crash)

    def _next_commands(self, due_us: int | None) -> list[Command] | None:
        """Waits until there are commands or `due_us` has come. None: stop."""
        with self._wake:
            while not self._stopping and not self._inbox:
                wait_us = None if due_us is None else due_us - self._clock_us()
                if wait_us is not None and wait_us <= 0:
                    break
                self._wake.wait(None if wait_us is None else wait_us / 1e6)
            if self._stopping:
                return None
            commands, self._inbox = self._inbox, []
            return commands
