"""Durations in words, short."""

from __future__ import annotations

UNITS = ((86_400, "d"), (3600, "h"), (60, "min"))


def age(seconds: float) -> str:
    """How long ago: 5 s, 3 min, 2 h, 4 d. A clock that is behind gives 0 s."""
    for size, unit in UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"


def milliseconds(us: int) -> str:
    """Microseconds as 0.42 ms, 21.3 ms."""
    ms = us / 1000
    return f"{ms:.2f} ms" if ms < 10 else f"{ms:.1f} ms"
