"""What a slab remembers, and what it never holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.device.slab import (
    BLOCK_TOKENS,
    KVLayout,
    LayerPlace,
    SlabKind,
    SlabPool,
    SlabState,
    round_up,
)

CPU = torch.device("cpu")
LAYOUT = KVLayout(
    kinds=(SlabKind(2, 4, 4), SlabKind(1, 8, 6)),
    layer_counts=(3, 1),
    places=(
        LayerPlace(0, 0, True, None),
        LayerPlace(1, 0, True, 16),
        LayerPlace(0, 1, True, None),
        LayerPlace(0, 2, True, None),
        LayerPlace(1, 0, False, 16),
    ),
)


def new_state() -> SlabState:
    return SlabState(SlabPool(LAYOUT, torch.float32, CPU))


def write(state: SlabState, start: int, stop: int) -> None:
    """Gives every slab the position as its value at start .. stop - 1."""
    state.reserve(stop)
    values = torch.arange(start, stop, dtype=torch.float32)
    for slab in (*state.keys, *state.values):
        slab[:, :, start:stop] = values[None, None, :, None]
    state.length = stop


def remembered(state: SlabState) -> bool:
    wanted = torch.arange(state.length, dtype=torch.float32)
    return all(
        bool((slab[:, :, : state.length] == wanted[None, None, :, None]).all())
        for slab in (*state.keys, *state.values)
    )


@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "rewind", "resize", "fork"]), st.integers(0, 1400)), max_size=12
    )
)
def test_whatever_happens_the_valid_positions_are_kept_and_nothing_is_ever_nan(
    steps: list[tuple[str, int]],
) -> None:
    state = new_state()
    for what, number in steps:
        if what == "write":
            write(state, state.length, state.length + number % 700 + 1)
        elif what == "rewind":
            state.rewind(min(number, state.length))
        elif what == "resize":
            state.resize(round_up(number, BLOCK_TOKENS))
        else:
            state = state.fork()
        assert remembered(state)
        assert state.length <= state.capacity and state.capacity % BLOCK_TOKENS == 0
        assert state.byte_count == sum(slab.nbytes for slab in (*state.keys, *state.values))
        assert all(bool(torch.isfinite(slab).all()) for slab in (*state.keys, *state.values))


def test_a_new_slab_is_all_zeros_behind_its_length() -> None:
    state = new_state()
    write(state, 0, 5)
    write(state, 5, 513)
    assert state.capacity == 1024
    assert all(not slab[:, :, 513:].any() for slab in (*state.keys, *state.values))


def test_a_fork_shares_nothing() -> None:
    state = new_state()
    write(state, 0, 10)
    other = state.fork()
    other.keys[0].fill_(-1.0)
    assert remembered(state)


def test_only_layers_that_write_cost_bytes() -> None:
    assert LAYOUT.bytes_per_token(torch.bfloat16) == 2 * (3 * 2 * (4 + 4) + 1 * 1 * (8 + 6))


def test_forgetting_more_than_there_is_says_how_much_there_is() -> None:
    state = new_state()
    write(state, 0, 7)
    with pytest.raises(ValueError, match="cannot rewind to 8: the state holds 7 positions"):
        state.rewind(8)
    with pytest.raises(ValueError, match="cannot copy 8 positions: the source holds 7"):
        new_state().copy_from(state, 8)


def test_a_closed_slab_holds_no_bytes() -> None:
    state = new_state()
    write(state, 0, 7)
    state.close()
    assert (state.length, state.byte_count) == (0, 0)
