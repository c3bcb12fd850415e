"""Whether a model fits into the memory that is free, and how many state blocks fit beside it.

What is free is an argument; of a checkpoint only the headers are read.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from sparkrelay.host.memory import MIB, FreeMemory
from verifier_service.models import ModelInfo

BLOCK_LIMIT = 1_000_000
HEADER_LIMIT_BYTES = 100 * MIB
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class StatePlan:
    """How much session state there is room for, and why.

    margin_bytes   left to everybody else
    growth_bytes   left for a session that grows: its old and its new slab exist together for a moment
    """

    block_count: int
    block_tokens: int
    block_bytes: int
    free: FreeMemory
    margin_bytes: int
    growth_bytes: int

    @property
    def token_count(self) -> int:
        return self.block_count * self.block_tokens

    def facts(self) -> dict[str, object]:
        """For the log."""
        return {
            "state_tokens": self.token_count,
            "state_blocks": self.block_count,
            "state_mib": self.block_count * self.block_bytes // MIB,
            "free_mib": self.free.mib,
            "free_by": self.free.source,
            "margin_mib": self.margin_bytes // MIB,
            "growth_mib": self.growth_bytes // MIB,
        }


def plan_state(
    info: ModelInfo, free: FreeMemory, *, state_memory_mib: int, memory_margin_mib: int
) -> StatePlan:
    """State blocks to allow. Raises ValueError, naming the setting, if not even one fits.

    state_memory_mib   what to use, whatever is free; 0: what is free less the margin, but no less than half of it
    info               its context_limit is that of a session: the largest slab that can grow
    """
    block_bytes = max(1, info.block_bytes)
    if state_memory_mib:
        margin, growth_count, budget = 0, 0, state_memory_mib * MIB
        count = budget // block_bytes
    else:
        margin = min(memory_margin_mib * MIB, free.byte_count // 2)
        budget = free.byte_count - margin
        fitting = budget // block_bytes
        growth_count = min(fitting // 2, -(-info.context_limit // info.block_tokens))
        count = fitting - growth_count
    if count < 1:
        free_words = f"{free.mib} MiB are free ({free.source})"
        if state_memory_mib:
            next_step = f"set at least {-(-block_bytes // MIB)}, or 0 for what is free: {free_words}"
        else:
            kept = f"{margin // MIB} of them kept back (memory_margin_mib)"
            next_step = f"{free_words}, {kept}: free memory, allow more, or serve a smaller model"
        raise ValueError(
            f"state_memory_mib: {budget // MIB} MiB hold no block of {info.block_tokens} tokens, which takes "
            f"{block_bytes / MIB:.1f} MiB; {next_step}"
        )
    return StatePlan(
        block_count=min(count, BLOCK_LIMIT),
        block_tokens=info.block_tokens,
        block_bytes=info.block_bytes,
        free=free,
        margin_bytes=margin,
        growth_bytes=growth_count * block_bytes,
    )


def require_room_for_weights(folder: Path, dtype: str, free: FreeMemory) -> None:
    """Raises ValueError if the weights alone are more than what is free: said now, not by the kernel's killer."""
    needed = weight_bytes(folder, ITEM_BYTES[dtype])
    if needed <= free.byte_count:
        return
    steps = ["serve a smaller model", "free memory"]
    if dtype == "float32":
        steps.insert(0, "use dtype bfloat16, which takes half")
    raise ValueError(
        f"model: the weights of {folder.name} take at least {needed // MIB} MiB as {dtype}, and {free.mib} MiB are free "
        f"({free.source}). Next: {', or '.join(steps)}"
    )


def weight_bytes(folder: Path, item_bytes: int) -> int:
    """What a checkpoint's numbers take when its floating-point ones are `item_bytes` wide; 0 if it has no safetensors files."""
    return sum(_file_bytes(file, item_bytes) for file in folder.glob("*.safetensors"))


def _file_bytes(file: Path, item_bytes: int) -> int:
    """From the header: 8 bytes of length, then JSON. A file that is no such is left to the loader's own error."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length)) if length <= HEADER_LIMIT_BYTES else {}
    except (OSError, ValueError, struct.error):
        return 0
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return sum(
        prod(entry["shape"]) * item_bytes
        if entry["dtype"] in FLOATS
        else entry["data_offsets"][1] - entry["data_offsets"][0]
        for entry in entries
    )
