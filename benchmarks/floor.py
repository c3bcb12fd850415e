"""The floor under a step's time: every weight has to be read from memory once a step."""

from __future__ import annotations

import json
import math
import struct
import time
from pathlib import Path

READ_BYTES = 512 * 1024 * 1024  # far more than any cache
READ_REPEATS = 5
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"


def weight_bytes(folder: Path, dtype: str) -> int:
    """Bytes that a step reads of a checkpoint folder's matrices, computed in `dtype`.

    The embedding counts if it is the output head too; else only a few of its rows are read. Mixtures of experts read less.
    Raises OSError or ValueError for what is no checkpoint.
    """
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        shapes |= _shapes(file)
    if not shapes:
        raise ValueError(f"{folder} holds no .safetensors file")
    has_head = any(name.endswith(HEAD) for name in shapes)
    read = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and not (has_head and name.endswith(EMBEDDING))
    ]
    return ELEMENT_BYTES[dtype] * sum(math.prod(shape) for shape in read)


def read_speed(byte_count: int = READ_BYTES, repeats: int = READ_REPEATS) -> float:
    """Bytes a second that torch's threads together read from memory: the best of a few sums over more than a cache holds."""
    import torch

    numbers = torch.ones(byte_count // 4, dtype=torch.float32)
    best = math.inf
    for _ in range(repeats):
        begun = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - begun)
    return byte_count / best


def floor_ms(read_bytes: int, bytes_per_s: float) -> float:
    """Milliseconds of a step that does nothing but read its weights."""
    return 1000 * read_bytes / bytes_per_s


def _shapes(file: Path) -> dict[str, list[int]]:
    """Tensor name |-> shape, from the file's header alone."""
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        header = json.loads(content.read(length))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
