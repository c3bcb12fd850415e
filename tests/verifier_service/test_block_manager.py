"""State blocks: all or nothing, never twice, never lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from verifier_service.block_manager import BlockManager

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(("extend", "shrink", "free")), st.integers(0, 4), st.integers(0, 60)),
    max_size=40,
)


@given(block_count=st.integers(1, 12), block_tokens=st.integers(1, 8), operations=OPERATIONS)
def test_blocks_are_never_lost_shared_or_given_in_part(
    block_count: int, block_tokens: int, operations: list[tuple[str, int, int]]
) -> None:
    manager = BlockManager(block_count, block_tokens)
    expected: dict[int, list[int]] = {owner: [] for owner in range(5)}  # a plain twin: what each should hold
    for operation, owner, token_count in operations:
        held = expected[owner]
        needed = -(-token_count // block_tokens)
        before = manager.blocks_of(owner)
        if operation == "extend":
            lacks = manager.lacks(owner, token_count)
            granted = manager.extend(owner, token_count)
            assert (
                granted
                == (lacks <= 0)
                == (needed - len(held) <= block_count - sum(map(len, expected.values())))
            )
            assert manager.blocks_of(owner)[: len(before)] == before, "blocks in use moved"
            expected[owner] = list(manager.blocks_of(owner))
            assert len(expected[owner]) == (max(len(held), needed) if granted else len(held))
        elif operation == "shrink":
            assert manager.shrink(owner, token_count) == (needed < len(held))
            expected[owner] = held[:needed]
        else:
            manager.free(owner)
            expected[owner] = []
        manager.check_integrity()
        for who, blocks in expected.items():
            assert manager.blocks_of(who) == tuple(blocks)
            assert manager.holds(who, len(blocks) * block_tokens) == bool(blocks)
            assert not manager.holds(who, len(blocks) * block_tokens + 1)
        assert manager.used_count + manager.free_count == block_count


def test_room_is_counted_in_whole_blocks() -> None:
    manager = BlockManager(4, 512)
    assert manager.extend(7, 513)
    assert (manager.used_count, manager.holds(7, 1024), manager.holds(7, 1025)) == (2, True, False)
    assert manager.capacity_tokens == 2048
    assert not manager.extend(8, 1025), "three blocks of two"
    assert manager.used_count == 2, "a refusal changed something"
