"""When a call is sent again, and after which pause. Pure: randomness is an argument.

Safe to repeat: questions, when the gateway was away; anything else, if it never left this machine. A turn that may have
begun is never sent again: its stream is resumed instead, which repeats nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc

from sparkrelay.client.errors import status_of, was_cut, was_never_sent

# Seconds before each further attempt, in the mean: bounded, and longer than the channel's own first pauses.
REPEAT_PAUSES_S = (0.15, 0.3, 0.6)
# A gateway that is restarted is back within seconds; a stream that has made progress starts from the first pause again.
RESUME_PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 3.2)
JITTER = 0.2


class RetryBudget:
    """What all calls of one client may repeat together: a gateway that fails for everybody is not asked twice as often.

    Each repetition costs one token, each good answer gives a tenth back. Any thread may use it.
    """

    def __init__(self, limit: float = 20.0, refund: float = 0.1) -> None:
        self._limit = limit
        self._refund = refund
        self._tokens = limit
        self._lock = threading.Lock()

    def take(self) -> bool:
        """True if one more repetition is allowed; it is counted."""
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True

    def succeeded(self) -> None:
        """A call was answered."""
        with self._lock:
            self._tokens = min(self._tokens + self._refund, self._limit)


class RetryPolicy:
    """One client's rules. uniform: a random number from 0 to 1."""

    def __init__(
        self,
        uniform: Callable[[], float],
        *,
        repeat_pauses_s: tuple[float, ...] = REPEAT_PAUSES_S,
        resume_pauses_s: tuple[float, ...] = RESUME_PAUSES_S,
        budget: RetryBudget | None = None,
    ) -> None:
        self._uniform = uniform
        self._repeat_pauses_s = repeat_pauses_s
        self._resume_pauses_s = resume_pauses_s
        self.budget = budget or RetryBudget()

    def repeat_pause_s(self, failure: grpc.RpcError, attempt: int, *, is_read: bool) -> float | None:
        """Seconds to wait before a call is sent again after its failure number `attempt` (from 0); None: give up."""
        safe = status_of(failure) is grpc.StatusCode.UNAVAILABLE if is_read else was_never_sent(failure)
        return self._pause_s(self._repeat_pauses_s, attempt) if safe else None

    def resume_pause_s(
        self, failure: grpc.RpcError, attempt: int, *, even_if_answered: bool = False
    ) -> float | None:
        """The same for a stream that broke, `attempt` counted since it last made progress."""
        retried = even_if_answered or was_cut(failure)
        return self._pause_s(self._resume_pauses_s, attempt) if retried else None

    def _pause_s(self, pauses_s: tuple[float, ...], attempt: int) -> float | None:
        if attempt >= len(pauses_s) or not self.budget.take():
            return None
        return pauses_s[attempt] * (1 + JITTER * (2 * self._uniform() - 1))
