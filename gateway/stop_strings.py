"""Where a turn's text ends: the first stop string to be complete, however its characters are spread over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """`string` begins at character `start` of the turn's whole text."""

    string: str
    start: int


class StopStrings:
    """Lets through the text that cannot be part of a stop string and holds back the rest.

    The match is the one whose last character comes first; of several that end there, the longest. So the result does not
    depend on how the text was cut into pieces.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), "an empty stop string would match everywhere"
        self._strings = tuple(strings)
        self._held = ""
        self._safe_len = 0
        self.match: StopMatch | None = None

    @property
    def safe_len(self) -> int:
        """Characters of the turn's text that were let through."""
        return self._safe_len

    def feed(self, text: str) -> str:
        """Takes in more text; returns what may be shown. After a match nothing more is let through."""
        if self.match is not None:
            return ""
        pending = self._held + text
        found = self._first_complete(pending)
        if found is not None:
            start, string = found
            self.match = StopMatch(string, self._safe_len + start)
            return self._let_through(pending, start)
        return self._let_through(pending, len(pending) - self._beginning_len(pending))

    def finish(self) -> str:
        """The text ended: what was held back may be shown."""
        return "" if self.match is not None else self._let_through(self._held, len(self._held))

    def _let_through(self, pending: str, count: int) -> str:
        self._held = pending[count:]
        self._safe_len += count
        return pending[:count]

    def _first_complete(self, pending: str) -> tuple[int, str] | None:
        found = [(start, string) for string in self._strings if (start := pending.find(string)) >= 0]
        return min(found, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)

    def _beginning_len(self, pending: str) -> int:
        """Length of the longest end of `pending` that a stop string begins with."""
        longest = max((len(string) for string in self._strings), default=1) - 1
        for length in range(min(longest, len(pending)), 0, -1):
            end = pending[-length:]
            if any(string.startswith(end) for string in self._strings):
                return length
        return 0
