"""Slots of an arena: who gets which, what a view of neighbours shows, what is left of a sequence that has gone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.device import slab_arena
from sparkrelay.device.slab import KVLayout, LayerPlace, SlabKind, SlabPool, SlabState
from sparkrelay.device.slab_arena import SlabArena

CPU = torch.device("cpu")
LAYOUT = KVLayout((SlabKind(2, 8, 4),), (3,), tuple(LayerPlace(0, i, True, None) for i in range(3)))


def new_arena(slot_count: int) -> SlabArena:
    return SlabArena(LAYOUT, torch.float32, CPU, 512, slot_count)


@given(st.lists(st.integers(0, 9), max_size=40))
def test_a_slot_has_one_owner_and_the_lowest_free_one_is_taken_first(choices: list[int]) -> None:
    arena = new_arena(6)
    held: list[int] = []
    for choice in choices:
        if choice < 6 and choice < len(held):
            arena.give_back(held.pop(choice))
            continue
        slot = arena.take()
        free = sorted(set(range(6)) - set(held))
        assert slot == (free[0] if free else None)
        held += [] if slot is None else [slot]
    assert len(set(held)) == len(held)


@pytest.mark.parametrize("can_forget", [True, False])
def test_a_slot_that_was_given_back_is_all_zeros(can_forget: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_arena, "_CAN_FORGET", can_forget and slab_arena._CAN_FORGET)
    arena = new_arena(3)
    assert [arena.take() for _ in range(3)] == [0, 1, 2]
    for slabs in (*arena.keys, *arena.values):
        slabs.fill_(7.0)
    arena.give_back(1)
    assert arena.take() == 1
    for slabs in (*arena.keys, *arena.values):
        assert not slabs[:, 1].any()
        assert bool((slabs[:, [0, 2]] == 7.0).all())


def test_neighbours_are_one_view_and_a_view_made_once_shows_what_is_written_later() -> None:
    arena = new_arena(4)
    first = arena.span(0, range(1, 3), range(64, 192))
    arena.keys[0].copy_(torch.arange(arena.keys[0].numel()).view_as(arena.keys[0]))
    assert arena.span(0, range(1, 3), range(64, 192)) is first
    assert len(first) == 3
    for layer, (keys, values) in enumerate(first):
        assert torch.equal(keys, arena.keys[0][layer, 1:3, :, 64:192].reshape(4, 128, 8))
        assert keys.data_ptr() == arena.keys[0][layer, 1, 0, 64].data_ptr(), "a copy"
        assert values.shape == (4, 128, 4)


def test_an_arena_remembers_a_bounded_number_of_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_arena, "KEPT_SPANS", 5)
    arena = new_arena(4)
    for stop in range(64, 512, 64):
        arena.span(0, range(1), range(stop))
    assert len(arena._spans) == 5
    assert arena.span(0, range(1), range(64))[0][0].shape == (2, 64, 8)


def test_a_system_that_promises_little_gets_smaller_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SlabArena.__init__

    def refuse(self: SlabArena, *arguments: object) -> None:
        if int(str(arguments[-1])) > 2:
            raise OSError(12, "Cannot allocate memory")
        whole(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SlabArena, "__init__", refuse)
    pool = SlabPool(LAYOUT, torch.float32, CPU)
    states = [SlabState(pool) for _ in range(5)]
    for state in states:
        state.reserve(1)
    assert [state.slot for state in states] == [0, 1, 0, 1, 0]
    assert len({id(state.arena) for state in states}) == 3


def test_a_state_that_nobody_holds_any_more_gives_its_slot_back() -> None:
    pool = SlabPool(LAYOUT, torch.float32, CPU)
    state, other = SlabState(pool), SlabState(pool)
    state.reserve(1)
    other.reserve(1)
    assert (state.slot, other.slot) == (0, 1)
    del state
    third = SlabState(pool)
    third.reserve(1)
    assert third.slot == 0 and third.arena is other.arena
