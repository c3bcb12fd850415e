"""What the ids themselves say: which tokens two sides share, and what of a late block can still be used."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

CHAIN_BLOCK = 512  # ids a link of the hash chain covers
HASH_BYTES = 16


class ChainHash:
    """The chain hash of a growing token list, computed again only where the list changed.

    It keeps one link for each full block of 512 ids and never the ids: the owner of the list passes them and says when it was
    cut (`rewind`). Ids below the last cut must not change between two calls.
    """

    __slots__ = ("_links",)

    def __init__(self) -> None:
        self._links: list[bytes] = []

    def digest(self, token_ids: Sequence[int], length: int | None = None) -> bytes:
        """Hash of the first `length` ids (all if None): 16 bytes, or b"" for no ids. Cost: the blocks not seen
        before, and the tail."""
        count = len(token_ids) if length is None else length
        if not 0 <= count <= len(token_ids):
            raise ValueError(f"length {count} is outside of a list of {len(token_ids)} ids")
        links = self._links
        full = count // CHAIN_BLOCK
        for index in range(len(links), full):
            before = links[-1] if links else b""
            links.append(_link(before, token_ids[index * CHAIN_BLOCK : (index + 1) * CHAIN_BLOCK]))
        last = links[full - 1] if full else b""
        tail = token_ids[full * CHAIN_BLOCK : count]
        return _link(last, tail) if tail else last

    def rewind(self, length: int) -> None:
        """The list was cut to its first `length` ids: what follows may differ."""
        del self._links[length // CHAIN_BLOCK :]


def chain_hash(token_ids: Sequence[int]) -> bytes:
    """Identity of a token list, for keep_hash and held_hash: 16 bytes, or b"" for no ids."""
    return ChainHash().digest(token_ids)


def _link(before: bytes, token_ids: Sequence[int]) -> bytes:
    # The count of ids is part of what is hashed: a full block and a tail can never be taken for each other.
    packed = struct.pack(f"<i{len(token_ids)}i", len(token_ids), *token_ids)
    return hashlib.sha256(before + packed).digest()[:HASH_BYTES]


def match_block(base_len: int, block_ids: Sequence[int], committed_ids: Sequence[int]) -> int | None:
    """Where the usable part of a drafted block begins, or None if there is none.

    The block was drafted to follow the first `base_len` committed tokens; by now `committed_ids` are committed.
    What was committed since
    must be the block's own first ids; the block is usable from there on (offset 0: it came in time).

    None: the block is contradicted (other tokens were committed), spent (all its ids were committed), or of another history
    (base_len is beyond the committed tokens). In the first two cases it is no longer in flight.
    """
    offset = len(committed_ids) - base_len
    if not 0 <= offset < len(block_ids):
        return None
    for index in range(offset):  # nearly always 0 or 1 steps
        if block_ids[index] != committed_ids[base_len + index]:
            return None
    return offset
