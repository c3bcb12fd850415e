"""What one sequence's keys and values are on a CPU: one slot of an arena.

A slot belongs to one sequence and grows in blocks of 512 tokens by moving to an arena of larger ones, so that attention reads
plain views and never gathers pages. Position p of the sequence lies at index p, always: rolling back after a rejection is a lower
`length`, nothing moves, and stale rows behind `length` are finite and hidden by the mask.
"""

from __future__ import annotations

import torch

from sparkrelay.device.slab_arena import SlabArena, SlabPool
from sparkrelay.device.slab_layout import BLOCK_TOKENS, KVLayout, LayerPlace, SlabKind, round_up

__all__ = ["BLOCK_TOKENS", "KVLayout", "LayerPlace", "SlabKind", "SlabPool", "SlabState", "round_up"]


class SlabState:
    """The keys and values of one sequence. `length` is how many positions, from 0, are valid.

    keys[kind]    [layers of the kind, kv_heads, capacity, key_dim], views of the arena; empty where there is no room yet
    values[kind]  [layers of the kind, kv_heads, capacity, value_dim]
    """

    __slots__ = ("_pool", "arena", "keys", "length", "slot", "values")

    def __init__(self, pool: SlabPool) -> None:
        self._pool = pool
        self.length = 0
        self.arena: SlabArena | None = None
        self.slot = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __del__(self) -> None:
        self.close()

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self.arena.capacity if self.arena is not None else 0

    @property
    def byte_count(self) -> int:
        """Bytes that the slot may come to hold."""
        return self.capacity * self._pool.bytes_per_token

    def reserve(self, token_count: int) -> None:
        """Makes room for positions 0 to token_count - 1; what is valid is kept."""
        if token_count > self.capacity:
            self.resize(round_up(token_count, BLOCK_TOKENS))

    def resize(self, capacity: int) -> None:
        """Gives the slabs room for exactly `capacity` positions, a multiple of 512; what is valid below it is kept."""
        assert capacity % BLOCK_TOKENS == 0, f"{capacity} is not a multiple of {BLOCK_TOKENS}"
        if capacity == self.capacity:
            return
        length, old, old_slot = min(self.length, capacity), self.arena, self.slot
        old_keys, old_values = self.keys, self.values
        self._move(capacity)
        _copy(self.keys, old_keys, length)
        _copy(self.values, old_values, length)
        self.length = length
        if old is not None:
            old.give_back(old_slot)

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
        other = SlabState(self._pool)
        other.copy_from(self, self.length)
        return other

    def close(self) -> None:
        """Gives the memory back. The state is then as new."""
        arena, self.arena = self.arena, None
        self.keys, self.values, self.length = [], [], 0
        if arena is not None:
            arena.give_back(self.slot)

    def _move(self, capacity: int) -> None:
        """To an empty slot of that capacity; to nowhere for 0."""
        if capacity == 0:
            self.arena, self.keys, self.values = None, [], []
            return
        self.arena, self.slot = self._pool.take(capacity)
        self.keys = [slabs[:, self.slot] for slabs in self.arena.keys]
        self.values = [slabs[:, self.slot] for slabs in self.arena.values]


def _copy(to: list[torch.Tensor], source: list[torch.Tensor], length: int) -> None:
    """The first `length` positions of each slab."""
    if length == 0:
        return
    for new, old in zip(to, source, strict=True):
        new[:, :, :length] = old[:, :, :length]
