"""How much memory this machine has left, and how many state blocks that makes."""

from __future__ import annotations

import os
from pathlib import Path

from verifier_service.models import ModelInfo

MIB = 1024 * 1024
FREE_SHARE = 0.5  # of the free memory, when no amount is set
FALLBACK_BYTES = 2048 * MIB  # where the machine does not tell
BLOCK_LIMIT = 1_000_000


def free_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can be taken without swapping: the machine's, or less in a container with a limit."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = FALLBACK_BYTES
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup, or "max": no limit
        return free
    return min(free, max(0, limit - used))


def block_count(info: ModelInfo, state_memory_mib: int, free: int) -> int:
    """State blocks to allow. Raises ValueError, naming the setting, if not even one fits."""
    budget = state_memory_mib * MIB or int(free * FREE_SHARE)
    count = min(budget // max(1, info.block_bytes), BLOCK_LIMIT)
    if count < 1:
        raise ValueError(
            f"state_memory_mib: {budget // MIB} MiB hold no block of {info.block_tokens} tokens, which takes "
            f"{info.block_bytes / MIB:.1f} MiB; allow more, or free memory"
        )
    return count
