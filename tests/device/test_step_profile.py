"""Where a step's time went: every part is measured once, and together they are the step."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from sparkrelay.device.flat_model import FlatCausalLM
from sparkrelay.device.step_profile import Stopwatch
from tests.device.ragged import Line, step
from tests.device.tiny_models import COMMON, save_tiny

spans = st.integers(0, 50_000)


@given(spans, spans, spans, spans, spans)
def test_the_parts_of_a_step_are_apart_and_together_the_whole(
    scheduling: int, linear: int, attention: int, other: int, choice: int
) -> None:
    now = 7_000
    watch = Stopwatch(lambda: now * 1000)
    watch.begin()
    now += scheduling
    watch.begin_forward()
    watch.linear_ns += linear * 1000
    watch.attention_ns += attention * 1000
    now += linear + attention + other
    watch.begin_choice()
    now += choice
    profile = watch.profile(row_count=3, session_count=2)
    assert profile is not None
    assert (profile.scheduling_us, profile.linear_us, profile.attention_us) == (scheduling, linear, attention)
    assert (profile.other_us, profile.choice_us) == (other, choice)
    assert profile.total_us == now - 7_000
    assert (profile.row_count, profile.session_count) == (3, 2)


def test_a_step_begins_at_nothing() -> None:
    ticks = itertools.count(0, 1000)
    watch = Stopwatch(lambda: next(ticks))
    for _ in range(2):
        watch.begin()
        watch.linear_ns += 5000
        watch.begin_forward()
        watch.begin_choice()
        profile = watch.profile(1, 1)
        assert profile is not None and profile.linear_us == 5


def test_without_a_clock_there_is_no_profile() -> None:
    watch = Stopwatch()
    watch.begin()
    watch.begin_forward()
    watch.begin_choice()
    assert watch.profile(1, 1) is None


def test_a_model_tells_the_stopwatch_of_its_products_and_its_attention(tmp_path: Path) -> None:
    ticks = itertools.count(0, 1000)
    watch = Stopwatch(lambda: next(ticks))
    model = FlatCausalLM.load(save_tiny(LlamaConfig(**COMMON), tmp_path), dtype="float32", stopwatch=watch)
    ids = np.arange(1, 9)
    line = Line(ids, model.new_state())
    watch.begin()
    watch.begin_forward()
    step(model, [(line, len(ids))])
    watch.begin_choice()
    profile = watch.profile(8, 1)
    assert profile is not None
    layers = model.layer_count
    assert profile.attention_us == layers, "one span of one tick a layer"
    assert profile.linear_us in (0, 4 * layers + 1), (
        "four products a layer and the head, where they are packed"
    )
