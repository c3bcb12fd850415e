"""State blocks: who holds which units of the model's memory. Only integers; the memory itself is the model's."""

from __future__ import annotations


class BlockManager:
    """Hands out `block_count` blocks of `block_tokens` tokens each to owners, which are numbers.

    An owner's blocks are in order of position: block i holds positions i * block_tokens onwards. Asking for room
    is all or nothing.
    """

    __slots__ = ("_free", "_held", "block_count", "block_tokens")

    def __init__(self, block_count: int, block_tokens: int) -> None:
        assert block_count > 0 and block_tokens > 0
        self.block_count = block_count
        self.block_tokens = block_tokens
        self._free = list(range(block_count - 1, -1, -1))  # a stack: the lowest id is handed out first
        self._held: dict[int, list[int]] = {}  # owner |-> its blocks, in order

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def used_count(self) -> int:
        return self.block_count - len(self._free)

    @property
    def capacity_tokens(self) -> int:
        """The most tokens one owner can ever hold."""
        return self.block_count * self.block_tokens

    def blocks_for(self, token_count: int) -> int:
        """How many blocks so many tokens need."""
        return -(-token_count // self.block_tokens)

    def blocks_of(self, owner: int) -> tuple[int, ...]:
        return tuple(self._held.get(owner, ()))

    def holds(self, owner: int, token_count: int) -> bool:
        """Whether the owner has room for so many tokens."""
        held = self._held.get(owner)
        return held is not None and len(held) * self.block_tokens >= token_count

    def lacks(self, owner: int, token_count: int) -> int:
        """How many blocks must be free before `extend` can succeed beyond those that are; 0 or less: it will."""
        return self.blocks_for(token_count) - len(self._held.get(owner, ())) - len(self._free)

    def extend(self, owner: int, token_count: int) -> bool:
        """Gives the owner room for at least so many tokens. False, and nothing changed, if too few blocks are free."""
        held = self._held.get(owner, [])
        missing = self.blocks_for(token_count) - len(held)
        if missing > len(self._free):
            return False
        if missing > 0:
            held.extend(self._free.pop() for _ in range(missing))
            self._held[owner] = held
        return True

    def shrink(self, owner: int, token_count: int) -> bool:
        """Takes back the blocks that so many tokens do not need. True if there were any."""
        held = self._held.get(owner, [])
        kept = self.blocks_for(token_count)
        if kept >= len(held):
            return False
        self._free.extend(reversed(held[kept:]))
        del held[kept:]
        if not held:
            del self._held[owner]
        return True

    def free(self, owner: int) -> None:
        """Takes back everything. An owner of nothing is no error."""
        self.shrink(owner, 0)

    def check_integrity(self) -> None:
        """Recounts: every block is free or has one owner."""
        every = sorted(self._free + [block for held in self._held.values() for block in held])
        assert every == list(range(self.block_count)), "a block was lost or given twice"
        assert all(self._held.values()), "an owner of nothing is remembered"
