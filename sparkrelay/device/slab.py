"""What one sequence's keys and values are on a CPU: one contiguous slab per kind of layer.

A slab belongs to one sequence and grows in blocks of 512 tokens by copying, so that attention reads plain views and never
gathers pages. Position p of the sequence lies at index p, always: rolling back after a rejection is a lower `length`, nothing
moves, and stale rows behind `length` are finite and hidden by the mask. A slab is zero-filled when it is made, never left as the
allocator gave it: one NaN behind a mask leaks into the output (0 * NaN is NaN).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK_TOKENS = 512
"""Growth step of a slab, and the key block of torch's CPU attention kernel: key ranges start and end at its multiples."""


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


class SlabState:
    """The keys and values of one sequence. `length` is how many positions, from 0, are valid.

    keys[kind]    [layers of the kind, kv_heads, capacity, key_dim]
    values[kind]  [layers of the kind, kv_heads, capacity, value_dim]
    """

    __slots__ = ("_device", "_dtype", "_layout", "capacity", "keys", "length", "values")

    def __init__(self, layout: KVLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout = layout
        self._dtype = dtype
        self._device = device
        self.length = 0
        self.capacity = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.close()

    @property
    def byte_count(self) -> int:
        """Bytes that the slabs hold, used or not."""
        return self.capacity * self._layout.bytes_per_token(self._dtype)

    def reserve(self, token_count: int) -> None:
        """Makes room for positions 0 to token_count - 1; what is valid is kept."""
        if token_count > self.capacity:
            self.resize(round_up(token_count, BLOCK_TOKENS))

    def resize(self, capacity: int) -> None:
        """Gives the slabs room for exactly `capacity` positions, a multiple of 512; what is valid below it is kept."""
        assert capacity % BLOCK_TOKENS == 0, f"{capacity} is not a multiple of {BLOCK_TOKENS}"
        if capacity == self.capacity:
            return
        keys, values = self._zeros(capacity)
        length = min(self.length, capacity)
        _copy(keys, self.keys, length)
        _copy(values, self.values, length)
        self.keys, self.values, self.capacity, self.length = keys, values, capacity, length

    def rewind(self, length: int) -> None:
        """Forgets the positions from `length` on. ValueError where they were never valid."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the state holds {self.length} positions")
        self.length = length

    def copy_from(self, source: SlabState, length: int) -> None:
        """Takes over the first `length` positions of another sequence; nothing is shared afterwards."""
        if not 0 <= length <= source.length:
            raise ValueError(f"cannot copy {length} positions: the source holds {source.length}")
        self.length = 0
        self.reserve(length)
        _copy(self.keys, source.keys, length)
        _copy(self.values, source.values, length)
        self.length = length

    def fork(self) -> SlabState:
        """A second sequence that begins with the same positions."""
        other = SlabState(self._layout, self._dtype, self._device)
        other.copy_from(self, self.length)
        return other

    def close(self) -> None:
        """Gives the memory back. The state is then as new."""
        self.length = 0
        self.capacity = 0
        self.keys, self.values = self._zeros(0)

    def _zeros(self, capacity: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        keys, values = [], []
        for kind, layers in zip(self._layout.kinds, self._layout.layer_counts, strict=True):
            shape = (layers, kind.kv_heads, capacity)
            keys.append(torch.zeros(*shape, kind.key_dim, dtype=self._dtype, device=self._device))
            values.append(torch.zeros(*shape, kind.value_dim, dtype=self._dtype, device=self._device))
        return keys, values


def _copy(to: list[torch.Tensor], source: list[torch.Tensor], length: int) -> None:
    """The first `length` positions of each slab."""
    for new, old in zip(to, source, strict=True):
        new[:, :, :length] = old[:, :, :length]
