"""What a container allows this process: limits of its control groups (cgroups), version 1 and 2, read from their files.

A limit of an enclosing group holds too, so every question is asked of the process's own group and of all above it. Inside a
container the path of the own group may be that of the host, where it cannot be seen; then the mount's top is the container.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Cgroups:
    """membership: which groups this process is in (proc(5)). mount: where their files are."""

    membership: Path = Path("/proc/self/cgroup")
    mount: Path = Path("/sys/fs/cgroup")

    def memory_room_bytes(self) -> int | None:
        """What is left of the tightest memory limit; None without one. Cached files count as free: they go when needed."""
        rooms = []
        for folder in self._folders("memory"):
            for limit_file, used_file, cache_key in (
                ("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            ):
                limit, used = _number(folder / limit_file), _number(folder / used_file)
                if limit is not None and used is not None:
                    cached = _of_table(folder / "memory.stat", cache_key)
                    rooms.append(max(0, limit - max(0, used - cached)))
        return min(rooms, default=None)

    def cpu_quota(self) -> float | None:
        """Cores' worth of time that may be used; None without a limit."""
        quotas = []
        for folder in self._folders("cpu"):
            quota, period = _pair(folder / "cpu.max")
            if quota is None:
                quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
            if quota is not None and period is not None and quota > 0 and period > 0:
                quotas.append(quota / period)
        return min(quotas, default=None)

    def _folders(self, controller: str) -> Iterator[Path]:
        """The folders whose limits hold, innermost first, of both versions: where there is no file there is no limit."""
        for line in _text(self.membership).splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if number == "0" and not controllers:
                yield from _upwards(self.mount, path)
                yield from _upwards(self.mount / "unified", path)
            elif controller in controllers.split(","):
                yield from _upwards(self.mount / controller, path)


def _upwards(top: Path, path: str) -> Iterator[Path]:
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for count in range(len(parts), -1, -1):
        yield top.joinpath(*parts[:count])


def _text(file: Path) -> str:
    """Empty where there is no such file."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    """None for no file, and for "max": no limit."""
    text = _text(file).strip()
    return int(text) if text.lstrip("-").isdecimal() else None


def _pair(file: Path) -> tuple[int | None, int | None]:
    """quota and period of cpu.max; "max 100000" has no quota."""
    fields = [int(field) if field.isdecimal() else None for field in _text(file).split()]
    return (fields[0], fields[1]) if len(fields) == 2 else (None, None)


def _of_table(file: Path, key: str) -> int:
    """The number after a key, 0 if there is none."""
    for line in _text(file).splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.strip().isdecimal():
            return int(value)
    return 0
