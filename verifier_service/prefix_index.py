"""Which sequences remember a given beginning of a prompt: a chain hash a block of 16 tokens, and who holds it.

Only integers and hashes; the state itself is the model's. What it says is always checked against the ids themselves, so a
collision costs a comparison and never a wrong state.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Protocol

PREFIX_BLOCK = 16
"""Tokens of a link. A shared beginning is found from this many tokens on, and then to the very token."""

CANDIDATES = 8  # of the holders of the same blocks, so many are compared token by token, the latest first
_LINK_BYTES = 16
_PACK = struct.Struct(f"<{PREFIX_BLOCK}i").pack


class Holder(Protocol):
    """A sequence as the index sees it: the model remembers the first `state_len` of its `token_ids`.

    salt: whose tokens they are; sequences of different salts never share
    """

    @property
    def sequence_id(self) -> int: ...
    @property
    def salt(self) -> bytes: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def state_len(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Hit:
    """The first `length` tokens that were asked for are remembered by `sequence_id`."""

    sequence_id: int
    length: int


@dataclass(slots=True)
class _Held:
    """links[i]: hash of the holder's first (i + 1) * 16 tokens and its salt."""

    holder: Holder
    links: list[bytes] = field(default_factory=list)


class PrefixIndex:
    """Its owner calls `follow` whenever a sequence's state has grown or shrunk, before the ids behind it change.

    There is one entry a full block of state, so it is bounded by the state memory: some 400 bytes for 16 tokens.

    key  what state is made of beside the tokens: the hash of the projector whose context rows lie in it
    """

    __slots__ = ("_held", "_holders", "_key")

    def __init__(self, key: bytes = b"") -> None:
        self._key = key
        self._held: dict[int, _Held] = {}  # sequence id |-> its links; no one without links
        self._holders: dict[bytes, dict[int, None]] = {}  # link |-> ids of those who have it, the latest last

    def __len__(self) -> int:
        """Entries: full blocks of state, of all sequences."""
        return sum(len(holders) for holders in self._holders.values())

    def follow(self, holder: Holder) -> None:
        """Makes the entries of a sequence those of its state, whatever they were. Cost: the blocks that came or went."""
        block_count = holder.state_len // PREFIX_BLOCK
        held = self._held.get(holder.sequence_id)
        if held is None:
            if block_count == 0:
                return
            held = self._held[holder.sequence_id] = _Held(holder)
        for _ in range(len(held.links) - block_count):
            self._drop(held.links.pop(), holder.sequence_id)
        for index in range(len(held.links), block_count):
            before = held.links[-1] if held.links else self._root(holder.salt)
            link = _link(before, holder.token_ids, index)
            held.links.append(link)
            self._holders.setdefault(link, {})[holder.sequence_id] = None
        if block_count == 0:
            del self._held[holder.sequence_id]

    def find(self, salt: bytes, token_ids: Ordered[int], limit: int, own: Holder | None = None) -> Hit | None:
        """Who remembers the most of the first `limit` tokens; None if nobody does for a whole block.

        own  the sequence that asks: what it remembers itself is where the search begins, and a hit is at least a block longer.
             Less would not be worth the copy
        """
        held = self._held.get(own.sequence_id) if own is not None else None
        links = held.links if held is not None else []
        link = links[-1] if links else self._root(salt)
        holders: dict[int, None] = {}
        block_count = len(links)
        # Whoever has a link has all before it, so the first one that nobody has ends the longest.
        while (block_count + 1) * PREFIX_BLOCK <= limit:
            link = _link(link, token_ids, block_count)
            following = self._holders.get(link)
            if following is None:
                break
            holders, block_count = following, block_count + 1
        hit = self._longest(holders, block_count, salt, token_ids, limit)
        known = own.state_len if own is not None else 0
        return hit if hit is not None and hit.length - known >= PREFIX_BLOCK else None

    def _longest(
        self, holders: dict[int, None], block_count: int, salt: bytes, token_ids: Ordered[int], limit: int
    ) -> Hit | None:
        """The best of the holders of so many blocks, token by token."""
        start = block_count * PREFIX_BLOCK
        found: list[tuple[int, Holder]] = []
        for sequence_id in itertools.islice(reversed(holders), CANDIDATES):
            holder = self._held[sequence_id].holder
            found.append((_agree(holder.token_ids, token_ids, start, min(limit, holder.state_len)), holder))
        found.sort(key=lambda each: -each[0])
        for length, holder in found:
            if holder.salt == salt and holder.token_ids[:start] == list(token_ids[:start]):
                return Hit(holder.sequence_id, length)
        return None

    def _root(self, salt: bytes) -> bytes:
        return hashlib.sha256(self._key + salt).digest()[:_LINK_BYTES]

    def _drop(self, link: bytes, sequence_id: int) -> None:
        holders = self._holders[link]
        del holders[sequence_id]
        if not holders:
            del self._holders[link]

    def check_integrity(self, holders: Iterable[Holder]) -> None:
        """Recounts: the entries are those of these sequences' states, hashed again from their ids."""
        expected: dict[bytes, set[int]] = {}
        for holder in holders:
            links = []
            link = self._root(holder.salt)
            for index in range(holder.state_len // PREFIX_BLOCK):
                link = _link(link, holder.token_ids, index)
                links.append(link)
                expected.setdefault(link, set()).add(holder.sequence_id)
            held = self._held.get(holder.sequence_id)
            assert (held.links if held is not None else []) == links, "an entry is not the state's"
            assert held is None or (held.holder is holder and links), (
                "an entry of somebody else, or of nothing"
            )
        assert {link: set(ids) for link, ids in self._holders.items()} == expected, (
            "an entry outlived its state"
        )


def _link(before: bytes, token_ids: Ordered[int], index: int) -> bytes:
    """Hash of all tokens up to the end of block `index`, given that of those before it."""
    block = token_ids[index * PREFIX_BLOCK : (index + 1) * PREFIX_BLOCK]
    return hashlib.sha256(before + _PACK(*block)).digest()[:_LINK_BYTES]


def _agree(left: Ordered[int], right: Ordered[int], start: int, end: int) -> int:
    """Up to where two lists agree from `start` on, at most `end`."""
    while start < end and left[start] == right[start]:
        start += 1
    return start
