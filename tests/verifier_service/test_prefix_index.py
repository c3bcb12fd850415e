"""The prefix index against the obvious: the longest common prefix of a list with every other list."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier_service import prefix_index
from verifier_service.prefix_index import CANDIDATES, PREFIX_BLOCK, PrefixIndex

OPERATIONS = st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 9)), max_size=60)


@dataclass(eq=False)
class Remembered:
    sequence_id: int
    salt: bytes = b""
    token_ids: list[int] = field(default_factory=list)
    state_len: int = 0


def common_len(left: list[int], right: list[int]) -> int:
    return next(
        (i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]),
        min(len(left), len(right)),
    )


def longest(holders: list[Remembered], salt: bytes, ids: list[int], limit: int) -> int:
    """What `find` should say, by comparing with everybody; less than a block counts for nothing."""
    lengths = [
        common_len(holder.token_ids[: holder.state_len], ids[:limit])
        for holder in holders
        if holder.salt == salt
    ]
    best = max(lengths, default=0)
    return best if best >= PREFIX_BLOCK else 0


def some_ids(rng: random.Random, holders: list[Remembered]) -> list[int]:
    """Lists that agree a lot: cuts of one another, of two alphabets, going on differently."""
    base = list(rng.choice(holders).token_ids) if holders and rng.random() < 0.8 else []
    cut = base[: rng.randint(0, len(base))] if rng.random() < 0.8 else base
    return cut + [rng.randint(1, 2) for _ in range(rng.choice((0, 1, 15, 16, 40)))]


class World:
    """An index, and the holders it should know. With no more of them than CANDIDATES, `find` compares with everybody."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.holders: list[Remembered] = []
        self._opened_count = 0

    def live_a_little(self, rng: random.Random, kind: int) -> None:
        """One thing that happens to a holder, or a new one."""
        if kind < 3 and len(self.holders) < CANDIDATES:
            self._opened_count += 1
            salt = rng.choice((b"", b"", b"x"))
            self.holders.append(Remembered(self._opened_count, salt, some_ids(rng, self.holders)))
        elif self.holders:
            self._change(rng.choice(self.holders), rng, kind)

    def _change(self, holder: Remembered, rng: random.Random, kind: int) -> None:
        ids = holder.token_ids
        if kind == 3:
            holder.state_len = 0
            self.holders.remove(holder)
        elif kind < 6:
            keep = rng.randint(0, len(ids))
            holder.state_len = min(holder.state_len, keep)
            self.index.follow(holder)
            ids[keep:] = [rng.randint(1, 2) for _ in range(rng.randint(0, 40))]
        else:
            holder.state_len = rng.choice((len(ids), rng.randint(holder.state_len, len(ids))))
        self.index.follow(holder)


@given(OPERATIONS)
def test_it_finds_what_comparing_with_everybody_finds(operations: list[tuple[int, int]]) -> None:
    world = World()
    for seed, kind in operations:
        rng = random.Random(seed)
        world.live_a_little(rng, kind)
        world.index.check_integrity(world.holders)
        ids, salt = some_ids(rng, world.holders), rng.choice((b"", b"x"))
        limit = rng.choice((max(0, len(ids) - 1), rng.randint(0, len(ids))))
        hit = world.index.find(salt, ids, limit)
        assert (hit.length if hit is not None else 0) == longest(world.holders, salt, ids, limit)
        if hit is not None:
            [found] = [holder for holder in world.holders if holder.sequence_id == hit.sequence_id]
            assert found.state_len >= hit.length and found.token_ids[: hit.length] == ids[: hit.length]


@given(OPERATIONS)
def test_who_remembers_a_part_is_told_only_of_a_block_more(operations: list[tuple[int, int]]) -> None:
    world = World()
    for seed, kind in operations:
        world.live_a_little(random.Random(seed), kind)
        for own in world.holders:
            limit = max(own.state_len, len(own.token_ids) - 1)
            hit = world.index.find(own.salt, own.token_ids, limit, own)
            others = [holder for holder in world.holders if holder is not own]
            best = longest(others, own.salt, own.token_ids, limit)
            assert (hit.length if hit is not None else 0) == (
                best if best - own.state_len >= PREFIX_BLOCK else 0
            )
            assert hit is None or hit.sequence_id != own.sequence_id


@given(OPERATIONS)
def test_entries_are_full_blocks_of_state_and_none_is_left_over(operations: list[tuple[int, int]]) -> None:
    world = World()
    for seed, kind in operations:
        world.live_a_little(random.Random(seed), kind)
        assert len(world.index) == sum(holder.state_len // PREFIX_BLOCK for holder in world.holders)
    for holder in world.holders:
        holder.state_len = 0
        world.index.follow(holder)
    assert len(world.index) == 0
    world.index.check_integrity([])


def test_hashes_that_collide_cost_a_hit_but_never_give_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every list looks like every other one of its length; only the ids tell."""
    monkeypatch.setattr(prefix_index, "_link", lambda before, ids, block: bytes([block]))
    index = PrefixIndex()
    holders = [Remembered(n, b"", [n] * 40, 40) for n in range(3)] + [Remembered(9, b"x", [7] * 40, 40)]
    for holder in holders:
        index.follow(holder)
    for n in range(3):
        hit = index.find(b"", [n] * 33, 32)
        assert hit is not None and (hit.sequence_id, hit.length) == (n, 32)
    assert index.find(b"", [7] * 33, 32) is None, "another tenant's"
    assert index.find(b"", [5] * 33, 32) is None


def test_of_many_that_share_a_beginning_only_a_few_are_compared() -> None:
    """A system prompt of a thousand sessions: the answer is at most a block short of the longest."""
    index, text = PrefixIndex(), list(range(64))
    for n in range(1000):
        index.follow(Remembered(n, b"", [*text, *[1000 + n] * 10], 74))
    hit = index.find(b"", [*text, *[1000] * 10], 74)
    assert hit is not None and hit.length == 64
    latest = index.find(b"", [*text, *[1999] * 10], 74)
    assert latest is not None and (latest.sequence_id, latest.length) == (999, 74)
