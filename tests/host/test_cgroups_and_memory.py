"""Memory and quotas of machines and containers, all of them made of files in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkrelay.host.cgroups import Cgroups
from sparkrelay.host.memory import MIB, free_memory

GIB = 1024 * MIB


def made(folder: Path, membership: str, files: dict[str, object]) -> Cgroups:
    """Groups with these files."""
    (folder / "membership").write_text(membership)
    for name, content in files.items():
        file = folder / "mount" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return Cgroups(folder / "membership", folder / "mount")


V2 = "0::/user/app\n"
V1 = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"

MEMORY: list[tuple[str, str, dict[str, object], int | None]] = [
    ("no cgroups at all", "", {}, None),
    ("v2 without a limit", V2, {"user/app/memory.max": "max", "user/app/memory.current": 5}, None),
    ("v2, the own group's limit", V2, {"user/app/memory.max": 12, "user/app/memory.current": 5}, 7),
    (
        "v2, the limit of a group above",
        V2,
        {
            "user/app/memory.max": 100,
            "user/app/memory.current": 5,
            "user/memory.max": 40,
            "user/memory.current": 30,
        },
        10,
    ),
    (
        "v2, cached files give way",
        V2,
        {
            "user/app/memory.max": 100,
            "user/app/memory.current": 90,
            "user/app/memory.stat": "anon 20\ninactive_file 60\nactive_file 10",
        },
        70,
    ),
    ("v2, used up", V2, {"user/app/memory.max": 5, "user/app/memory.current": 9}, 0),
    (
        "v2 seen from inside a container",
        "0::/../other\n",
        {"memory.max": 50, "memory.current": 20},
        30,
    ),
    ("v2 beside v1", "0::/app\n", {"unified/app/memory.max": 8, "unified/app/memory.current": 5}, 3),
    (
        "v1, whose own group is not to be seen from inside",
        V1,
        {
            "memory/memory.limit_in_bytes": 64,
            "memory/memory.usage_in_bytes": 50,
            "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 16",
        },
        30,
    ),
    (
        "v1, the own group's limit below the top's none",
        V1,
        {
            "memory/docker/abc/memory.limit_in_bytes": 20,
            "memory/docker/abc/memory.usage_in_bytes": 8,
            "memory/memory.limit_in_bytes": 9223372036854771712,
            "memory/memory.usage_in_bytes": 1000,
        },
        12,
    ),
    ("no number", V2, {"user/app/memory.max": "lots", "user/app/memory.current": "x"}, None),
]


@pytest.mark.parametrize(("membership", "files", "room"), [pytest.param(*c[1:], id=c[0]) for c in MEMORY])
def test_the_tightest_memory_limit_counts(
    tmp_path: Path, membership: str, files: dict[str, object], room: int | None
) -> None:
    assert made(tmp_path, membership, files).memory_room_bytes() == room


QUOTAS: list[tuple[str, str, dict[str, object], float | None]] = [
    ("none", "", {}, None),
    ("v2 without a limit", V2, {"user/app/cpu.max": "max 100000"}, None),
    ("v2", V2, {"user/app/cpu.max": "150000 100000"}, 1.5),
    ("v2 above", V2, {"user/app/cpu.max": "400000 100000", "user/cpu.max": "250000 100000"}, 2.5),
    ("v1 without a limit", V1, {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, None),
    ("v1", V1, {"cpu/cpu.cfs_quota_us": 50000, "cpu/cpu.cfs_period_us": 100000}, 0.5),
]


@pytest.mark.parametrize(("membership", "files", "quota"), [pytest.param(*c[1:], id=c[0]) for c in QUOTAS])
def test_the_tightest_quota_counts(
    tmp_path: Path, membership: str, files: dict[str, object], quota: float | None
) -> None:
    assert made(tmp_path, membership, files).cpu_quota() == quota


def meminfo(folder: Path, available_kib: int) -> Path:
    file = folder / "meminfo"
    file.write_text(f"MemTotal:  99999999 kB\nMemFree: 1 kB\nMemAvailable:   {available_kib} kB\n")
    return file


@pytest.mark.parametrize(
    ("limit", "free", "source"),
    [(None, 8 * GIB, "machine"), (20 * GIB, 8 * GIB, "machine"), (3 * GIB, 2 * GIB, "container limit")],
)
def test_free_is_what_the_machine_has_or_less_in_a_container(
    tmp_path: Path, limit: int | None, free: int, source: str
) -> None:
    files = {} if limit is None else {"user/app/memory.max": limit, "user/app/memory.current": GIB}
    found = free_memory(meminfo(tmp_path, 8 * 1024 * 1024), made(tmp_path, V2, files))
    assert (found.byte_count, found.source, found.mib) == (free, source, free // MIB)


def test_a_machine_without_such_files_gives_half_of_what_it_has(tmp_path: Path) -> None:
    found = free_memory(tmp_path / "nothing", made(tmp_path, "", {}))
    assert found.byte_count > 0 and found.source.startswith(("half", "a guess"))


def test_this_very_machine_says_something() -> None:
    assert free_memory().byte_count > 0
