"""What is shown of an answer while it is made: how fast, and what each round brought. Pure: the time is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparkrelay.cli.output import count

if TYPE_CHECKING:
    from sparkrelay.client.results import Delta, TurnStarted

BARS = "▁▂▃▄▅▆▇█"
DIGITS = "01234567"
SHOWN_ROUNDS = 24


@dataclass(slots=True)
class AnswerMeter:
    """Counts an answer as it comes.

    bars  eight signs from nothing accepted to everything; a round without a checked draft is a dot
    """

    bars: str = BARS
    token_count: int = 0
    round_count: int = 0
    accepted_count: int = 0
    _first_at: float = 0.0
    _last_at: float = 0.0
    _first_tokens: int = 0
    _recent: list[str] = field(default_factory=list)

    def add(self, delta: Delta, now: float) -> None:
        """now: seconds by a monotonic clock."""
        if not self.token_count:
            self._first_at, self._first_tokens = now, len(delta.token_ids)
        self._last_at = now
        self.token_count += len(delta.token_ids)
        for report in delta.rounds:
            self.round_count += 1
            self.accepted_count += report.accepted
            self._recent.append(self._sign(report.depth, report.accepted))
        del self._recent[:-SHOWN_ROUNDS]

    @property
    def tokens_per_s(self) -> float:
        """Of what came after the first event with tokens; 0 as long as there is nothing."""
        elapsed = self._last_at - self._first_at
        return (self.token_count - self._first_tokens) / elapsed if elapsed > 0 else 0.0

    def line(self, width: int) -> str:
        """The status line, at most `width` cells: what does not fit is left out, the rounds first."""
        parts = [count(self.token_count, "token"), f"{self.tokens_per_s:.1f} tokens/s"]
        if self.round_count:
            length = (self.accepted_count + self.round_count) / self.round_count
            parts.append(f"{length:.2f} a round")
        while len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        text = "  ".join(parts)[:width]
        room = width - len(text) - 2
        return f"{text}  {''.join(self._recent[-room:])}" if self._recent and room > 0 else text

    def _sign(self, depth: int, accepted: int) -> str:
        if depth == 0:
            return "."
        return self.bars[accepted * (len(self.bars) - 1) // depth]


def reading_line(started: TurnStarted, width: int) -> str:
    """Shown until the first token comes."""
    new = started.prompt_token_count - started.cached_token_count
    kept = f", {started.cached_token_count} kept" if started.cached_token_count else ""
    return f"reading {count(new, 'token')}{kept} ..."[:width]
