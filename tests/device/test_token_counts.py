"""Token counts against a plain count of the same list, through any sequence of advances and roll-backs."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.device.token_counts import TokenCounts

IDS = st.integers(0, 6)
STEPS = st.lists(st.one_of(st.lists(IDS, min_size=1, max_size=80), st.floats(0.0, 1.0)), max_size=12)


@given(start=st.lists(IDS, max_size=20), prompt_share=st.floats(0.0, 1.0), steps=STEPS)
def test_counts_are_those_of_the_list_after_any_advances_and_roll_backs(
    start: list[int], prompt_share: float, steps: list[list[int] | float]
) -> None:
    output_start = int(prompt_share * len(start))
    counts, model = TokenCounts(start, output_start), list(start)
    for step in steps:
        if isinstance(step, list):
            counts.extend(step)
            model.extend(step)
        else:  # roll back to a share of the length, also into the prompt
            del model[int(step * len(model)) :]
            counts.truncate(len(model))
        assert len(counts) == len(model)
        assert sorted(counts.sequence_ids.tolist()) == sorted(set(model))
        ids, occurrences = counts.output
        assert dict(zip(ids.tolist(), occurrences.tolist(), strict=True)) == Counter(model[output_start:])


def test_many_distinct_ids_fit() -> None:
    counts = TokenCounts([], 0)
    counts.extend(range(1000))
    counts.truncate(500)
    counts.extend(range(2000, 2600))
    assert sorted(counts.sequence_ids.tolist()) == [*range(500), *range(2000, 2600)]


@pytest.mark.parametrize("length", [-1, 4])
def test_a_length_outside_the_sequence_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="length"):
        TokenCounts([1, 2, 3], 0).truncate(length)


def test_an_output_start_outside_the_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="output_start"):
        TokenCounts([1, 2, 3], 4)
