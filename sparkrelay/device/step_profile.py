"""Where one step of the verifier's engine spent its time.

One stopwatch goes through the step: the engine takes its laps, the model adds what its products and its attention took. Reading
the clock some three hundred times a step is all that it costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepProfile:
    """One step, in microseconds by part; the parts are apart, and together the whole step.

    scheduling_us  commands, admission, and which rows the step computes
    linear_us      products with weights, the LM head's too
    attention_us   keys and values written, scores, sums
    other_us       the rest of the forward: norms, rotations, activations, and Python
    choice_us      from logits to committed tokens and events
    row_count      rows of the forward, its own padding not counted
    session_count  sequences that took part
    """

    scheduling_us: int
    linear_us: int
    attention_us: int
    other_us: int
    choice_us: int
    row_count: int
    session_count: int

    @property
    def total_us(self) -> int:
        return self.scheduling_us + self.linear_us + self.attention_us + self.other_us + self.choice_us


class Stopwatch:
    """Adds up a step's parts. Without a clock it measures nothing and `profile` gives None. One thread uses it.

    clock_ns      a monotonic clock in nanoseconds
    linear_ns     of products with weights since `begin`; whoever computes them adds to it. attention_ns alike
    """

    __slots__ = (
        "_begun",
        "_chosen_from",
        "_forward_from",
        "_running",
        "attention_ns",
        "clock_ns",
        "linear_ns",
    )

    def __init__(self, clock_ns: Callable[[], int] | None = None) -> None:
        self._running = clock_ns is not None
        self.clock_ns: Callable[[], int] = clock_ns or _stopped
        self.linear_ns = 0
        self.attention_ns = 0
        self._begun = 0
        self._forward_from = 0
        self._chosen_from = 0

    def begin(self) -> None:
        """A step begins."""
        self.linear_ns = self.attention_ns = 0
        self._begun = self._forward_from = self._chosen_from = self.clock_ns()

    def begin_forward(self) -> None:
        """What to compute is decided."""
        self._forward_from = self.clock_ns()

    def begin_choice(self) -> None:
        """The logits are there."""
        self._chosen_from = self.clock_ns()

    def profile(self, row_count: int, session_count: int) -> StepProfile | None:
        """The step that ends now."""
        if not self._running:
            return None
        forward_ns = self._chosen_from - self._forward_from
        return StepProfile(
            scheduling_us=(self._forward_from - self._begun) // 1000,
            linear_us=self.linear_ns // 1000,
            attention_us=self.attention_ns // 1000,
            other_us=max(0, forward_ns - self.linear_ns - self.attention_ns) // 1000,
            choice_us=(self.clock_ns() - self._chosen_from) // 1000,
            row_count=row_count,
            session_count=session_count,
        )


def _stopped() -> int:
    return 0
