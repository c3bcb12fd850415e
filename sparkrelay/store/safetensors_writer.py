"""Writes one safetensors file tensor by tensor, so that a conversion never holds a whole model in memory.

The format: u64 little-endian length of a JSON header, the header, then the tensors' bytes without gaps. The header comes first,
so all names and shapes are declared before the first byte of data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BFLOAT16_BYTES = 2
HEADER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor to come: its name and its shape. The element type is bfloat16 throughout."""

    name: str
    shape: tuple[int, ...]

    @property
    def byte_count(self) -> int:
        count = BFLOAT16_BYTES
        for extent in self.shape:
            count *= extent
        return count


def header_bytes(plans: Iterable[TensorPlan]) -> bytes:
    """The length word and the padded JSON header for these tensors in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        if plan.name in header:
            raise ValueError(f"two tensors are named {plan.name}")
        end = offset + plan.byte_count
        header[plan.name] = {"dtype": "BF16", "shape": list(plan.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write_tensor(file: IO[bytes], plan: TensorPlan, values: npt.NDArray[np.float32]) -> None:
    """Appends one tensor, rounded to bfloat16. `values` has the planned shape."""
    if values.shape != plan.shape:
        raise ValueError(f"{plan.name} was planned as {plan.shape} and is {values.shape}")
    file.write(bfloat16_words(values).tobytes())


def bfloat16_words(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 -> the 16-bit words of bfloat16, rounded to nearest, ties to even. Values must be finite."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    if not np.isfinite(values).all():
        raise ValueError("a weight is not finite")
    round_up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    words: npt.NDArray[np.uint16] = ((bits + round_up) >> np.uint32(16)).astype("<u2")
    return words
