"""Which prompts the users of a benchmark send."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.floor import floor_ms
from benchmarks.measuring import busy_share
from benchmarks.workload import Workload, default_prompts, read_prompts


@given(st.integers(1, 50), st.integers(1, 40), st.integers(0, 8))
def test_no_two_users_of_a_repeat_share_a_prompt_while_there_are_enough(
    prompt_count: int, user_count: int, repeat: int
) -> None:
    workload = Workload(tuple((number,) for number in range(prompt_count)))
    taken = workload.take(repeat, user_count)
    assert len(taken) == user_count
    assert len(set(taken)) == min(user_count, prompt_count)
    if 2 * user_count <= prompt_count:
        assert not set(taken) & set(workload.take(repeat + 1, user_count))


def test_the_projects_prompts_are_mixed_kind_by_kind() -> None:
    texts = default_prompts()
    assert len(texts) == 120 == len(set(texts))
    assert "sky" in texts[0] and "bakery" in texts[1] and "Python" in texts[2]


def test_a_prompt_file_that_is_none_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"turns": ["one"]}\n{"text": "two"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2: is not"):
        read_prompts([file])


def test_the_floor_is_bytes_over_speed() -> None:
    assert floor_ms(270_000_000, 27e9) == pytest.approx(10)


def test_the_cores_use_is_what_is_not_idle(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu 10 0 10 60 20 0 0 0 0 0\n", encoding="ascii")
    assert busy_share(0.0, stat) is None, "no time has passed"
    assert busy_share(0.0, tmp_path / "missing") is None
    busy = busy_share(0.05)
    assert busy is None or 0 <= busy <= 1
