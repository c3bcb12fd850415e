"""How long to wait before dialling a verifier again."""

from __future__ import annotations

import random


class Backoff:
    """Doubles from min_ms to max_ms; each wait is drawn between half of that and all of it, so that many drafters spread out."""

    def __init__(self, min_ms: int, max_ms: int, dice: random.Random) -> None:
        self._min_ms = min_ms
        self._max_ms = max_ms
        self._dice = dice
        self._next_ms = min_ms

    @property
    def max_ms(self) -> int:
        return self._max_ms

    def reset(self) -> None:
        """The link was good for a while: the next loss is a new story."""
        self._next_ms = self._min_ms

    def next_ms(self) -> float:
        """The wait before the next attempt."""
        ceiling = self._next_ms
        self._next_ms = min(ceiling * 2, self._max_ms)
        return ceiling * (0.5 + self._dice.random() / 2)
