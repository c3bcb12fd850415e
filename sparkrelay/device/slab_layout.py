"""What a model's sequences keep: which slabs there are, of what shape, and which layer reads which."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK_TOKENS = 512
"""Growth step of a slab: room is given in these units."""


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True, slots=True)
class SlabKind:
    """What all layers of one slab have in common."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where one model layer reads its keys and values, and whether it writes them.

    A layer that shares another one's (Gemma 4) names the same `kind` and `index` and does not write.
    """

    kind: int
    index: int
    writes: bool
    window: int | None
    """Positions that a row sees, itself included; None is all of them."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The state of a model's sequences: `places` by model layer, `layer_counts` (layers that write) by kind."""

    kinds: tuple[SlabKind, ...]
    layer_counts: tuple[int, ...]
    places: tuple[LayerPlace, ...]

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one position costs."""
        numbers = sum(
            count * kind.kv_heads * (kind.key_dim + kind.value_dim)
            for kind, count in zip(self.kinds, self.layer_counts, strict=True)
        )
        return numbers * dtype.itemsize
