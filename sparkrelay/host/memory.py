"""How much memory can still be taken: the machine's, or less in a container with a limit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sparkrelay.host.cgroups import Cgroups

MIB = 1024 * 1024
GUESS_BYTES = 4096 * MIB  # where the machine does not tell at all


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """byte_count can be taken without swapping. source: who says so, for people."""

    byte_count: int
    source: str

    @property
    def mib(self) -> int:
        return self.byte_count // MIB


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroups: Cgroups | None = None) -> FreeMemory:
    """What is free now. The files are arguments so that tests can be any machine."""
    machine = _available(meminfo)
    if machine is None:
        machine = _physical_half()
    room = (cgroups or Cgroups()).memory_room_bytes()
    return machine if room is None or room >= machine.byte_count else FreeMemory(room, "container limit")


def _available(meminfo: Path) -> FreeMemory | None:
    """MemAvailable of Linux: free pages and what can be taken back from caches without harm."""
    try:
        lines = meminfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return FreeMemory(int(value.split()[0]) * 1024, "machine")
    return None


def _physical_half() -> FreeMemory:
    """Elsewhere (macOS) nobody says what is free without a library: half of what is built in."""
    try:
        return FreeMemory(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, "half of the machine's memory"
        )
    except (ValueError, OSError):
        return FreeMemory(GUESS_BYTES, "a guess: the machine does not tell")
