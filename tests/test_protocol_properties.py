"""The conversation under every order of arrival: thousands of random histories of two drafters and a verifier."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.protocol import ChainHash, chain_hash, match_block
from tests.protocol_world import World

HISTORIES = 1500
STEPS = 120


def run(seeds: range, *, hostile: bool) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        world = World(seed, hostile=hostile)
        try:
            for _ in range(STEPS):
                world.step()
            world.settle()
            world.check_settled()
        except Exception as error:
            raise AssertionError(f"history {seed}: {error!r}") from error
        counts += world.counts
    return counts


@pytest.mark.parametrize("part", range(2))
def test_honest_sides_agree_on_all_ids_whatever_is_delayed_overtaken_or_lost(part: int) -> None:
    counts = run(range(part * HISTORIES, (part + 1) * HISTORIES), hostile=False)
    for what in (
        "used",
        "rebased",
        "accepted",
        "rewound",
        "kept",
        "lost",
        "Ignored",
        "ended for context",
        "MembershipOver",
    ):
        assert counts[what] > 0, f"no history had {what}"
    assert counts["EndMembership"] == 0


def test_a_hostile_drafter_loses_its_own_memberships_and_nothing_else() -> None:
    counts = run(range(HISTORIES), hostile=True)
    assert counts["EndMembership"] > 0 and counts["RefuseJoin"] > 0
    assert counts["used"] > 0 and counts["accepted"] > 0


@given(st.lists(st.integers(0, 9), max_size=12), st.lists(st.integers(0, 9), max_size=12), st.integers(0, 14))
def test_match_block_finds_exactly_the_part_that_follows_what_was_committed(
    committed: list[int], block: list[int], base_len: int
) -> None:
    offset = match_block(base_len, block, committed)
    fits = [
        k for k in range(len(block)) if base_len + k == len(committed) and committed[base_len:] == block[:k]
    ]
    assert ([] if offset is None else [offset]) == fits


@given(st.lists(st.integers(0, 2**31 - 1), max_size=2000), st.data())
def test_the_chain_hash_of_a_list_that_grows_and_is_cut_is_that_of_the_list(
    ids: list[int], data: st.DataObject
) -> None:
    chain = ChainHash()
    for _ in range(4):
        length = data.draw(st.integers(0, len(ids)))
        assert chain.digest(ids, length) == chain_hash(ids[:length])
        cut = data.draw(st.integers(0, len(ids)))
        chain.rewind(cut)
        ids = ids[:cut] + data.draw(st.lists(st.integers(0, 9), max_size=600))
    assert chain.digest(ids) == chain_hash(ids)


def test_chain_hashes_tell_lists_apart() -> None:
    lists = [
        [],
        [0],
        [0, 0],
        [0] * 511,
        [0] * 512,
        [0] * 513,
        [0] * 1024,
        [0] * 1025,
        [1] * 512,
        [*[0] * 512, 1],
    ]
    assert len({chain_hash(ids) for ids in lists}) == len(lists)
    assert chain_hash([]) == b"" and len(chain_hash([5])) == 16
