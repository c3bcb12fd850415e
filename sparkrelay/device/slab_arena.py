"""Where slabs live: side by side, so that one product can run over the keys of many sequences without copying any.

An arena has slots for sequences of one capacity. Slots that are neighbours are one plain view; a sequence takes the lowest free
slot, so that those that run are neighbours more often than not. On a CPU an arena is address space: a page costs memory from the
first time it is written until its slot is given back, and reads as zeros before. Zeros matter: one NaN behind a mask would leak
into the output (0 * NaN is NaN).
"""

from __future__ import annotations

import heapq
import math
import mmap
from collections.abc import Iterable
from typing import Final

import torch

from sparkrelay.device.slab_layout import KVLayout

ARENA_BYTES: Final = 1 << 31
MOST_SLOTS: Final = 64
KEPT_SPANS: Final = 256
"""Views that an arena remembers: a step's are mostly those of the step before."""
_CAN_FORGET: Final = hasattr(mmap, "MADV_DONTNEED") and hasattr(mmap.mmap, "madvise")

LayerSpans = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""By layer of a kind: keys [slots * kv_heads, positions, key_dim] and values [slots * kv_heads, positions, value_dim]."""


class SlabArena:
    """Slots for `slot_count` sequences of up to `capacity` positions. MemoryError: there is no such address space.

    keys[kind]    [layers of the kind, slots, kv_heads, capacity, key_dim]; values[kind] alike
    """

    def __init__(
        self, layout: KVLayout, dtype: torch.dtype, device: torch.device, capacity: int, slot_count: int
    ) -> None:
        self.capacity = capacity
        self.slot_count = slot_count
        self._free = list(range(slot_count))  # a heap
        self._blocks: list[_ZeroedBlock] = []
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for kind, layers in zip(layout.kinds, layout.layer_counts, strict=True):
            shape = (layers, slot_count, kind.kv_heads, capacity)
            for tensors, dim in ((self.keys, kind.key_dim), (self.values, kind.value_dim)):
                block = _ZeroedBlock((*shape, dim), dtype, device)
                self._blocks.append(block)
                tensors.append(block.tensor)
        self.key_rows = [_rows_by_layer(tensor) for tensor in self.keys]
        self.value_rows = [_rows_by_layer(tensor) for tensor in self.values]
        self._spans: dict[tuple[int, int, int, int, int], LayerSpans] = {}

    def take(self) -> int | None:
        """The lowest free slot, all zeros; None if there is none."""
        return heapq.heappop(self._free) if self._free else None

    def give_back(self, slot: int) -> None:
        """The slot's memory goes back to the system."""
        for block in self._blocks:
            block.forget(slot)
        heapq.heappush(self._free, slot)

    def span(self, kind: int, slots: range, positions: range) -> LayerSpans:
        """Views of neighbouring slots' keys and values at some positions."""
        name = (kind, slots.start, slots.stop, positions.start, positions.stop)
        span = self._spans.get(name)
        if span is None:
            while len(self._spans) >= KEPT_SPANS:
                del self._spans[next(iter(self._spans))]
            keys, values = (
                tensor[kind][:, slots.start : slots.stop].flatten(1, 2)[
                    :, :, positions.start : positions.stop
                ]
                for tensor in (self.keys, self.values)
            )
            span = self._spans[name] = tuple(zip(keys.unbind(0), values.unbind(0), strict=True))
        return span


class SlabPool:
    """All arenas of one model's sequences. One thread uses it."""

    def __init__(self, layout: KVLayout, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self.bytes_per_token = layout.bytes_per_token(dtype)
        self._dtype = dtype
        self._device = device
        self._arenas: dict[int, list[SlabArena]] = {}  # capacity |-> its arenas, oldest first

    def take(self, capacity: int) -> tuple[SlabArena, int]:
        """A slot, all zeros, for a sequence of up to `capacity` positions."""
        arenas = self._arenas.setdefault(capacity, [])
        for arena in arenas:
            slot = arena.take()
            if slot is not None:
                return arena, slot
        arenas.append(self._new_arena(capacity))
        slot = arenas[-1].take()
        assert slot is not None, "a new arena has no slot"
        return arenas[-1], slot

    @torch.inference_mode(False)
    def _new_arena(self, capacity: int) -> SlabArena:
        """As many slots as ARENA_BYTES and the system allow, one at least."""
        slot_count = max(1, min(MOST_SLOTS, ARENA_BYTES // (capacity * self.bytes_per_token)))
        if self._device.type != "cpu":
            slot_count = 1  # every byte counts there from the beginning
        while True:
            try:
                return SlabArena(self.layout, self._dtype, self._device, capacity, slot_count)
            except (OSError, MemoryError):  # a system that promises no more than it has
                if slot_count == 1:
                    raise
                slot_count //= 2


class _ZeroedBlock:
    """A tensor [layers, slots, ...] of zeros whose slots can be made zeros again."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._slot_bytes = math.prod(shape[2:]) * dtype.itemsize
        self._map: mmap.mmap | None = None
        if device.type == "cpu" and _CAN_FORGET and self._slot_bytes % mmap.PAGESIZE == 0:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            self._map = mmap.mmap(-1, math.prod(shape[:2]) * self._slot_bytes, flags=flags)
            self.tensor = torch.frombuffer(self._map, dtype=dtype).view(shape)
        else:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    def forget(self, slot: int) -> None:
        if self._map is None:
            self.tensor[:, slot].zero_()
            return
        layers, slot_count = self.tensor.shape[:2]
        for number in range(slot, layers * slot_count, slot_count):
            self._map.madvise(mmap.MADV_DONTNEED, number * self._slot_bytes, self._slot_bytes)


def _rows_by_layer(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[layers, slots, heads, capacity, dim] as, by layer, [slots * heads * capacity, dim]."""
    rows: Iterable[torch.Tensor] = tensor.flatten(1, 3).unbind(0)
    return tuple(rows)
