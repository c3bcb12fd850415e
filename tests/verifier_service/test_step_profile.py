"""What the engine says of where its steps' time went."""

from __future__ import annotations

import itertools

from sparkrelay.device.step_profile import Stopwatch
from tests.verifier_service.driver import turn
from verifier_service.depth_policies import parse_depth_policy
from verifier_service.engine import Engine, EngineSettings
from verifier_service.models.toy import ToyModel


def new_engine(stopwatch: Stopwatch | None) -> Engine:
    return Engine(ToyModel(), EngineSettings(block_count=64), parse_depth_policy("off"), stopwatch=stopwatch)


def test_a_step_that_computes_says_where_its_time_went_and_one_that_does_not_says_nothing() -> None:
    ticks = itertools.count(0, 10_000)
    engine = new_engine(Stopwatch(lambda: next(ticks)))
    first = engine.step([turn("s", "t"), turn("s2", "t2", (4, 5))], 0)
    assert first.events and first.profile is None, "this step only told what has begun"
    profile = engine.step([], 0).profile
    assert profile is not None
    assert (profile.row_count, profile.session_count) == (5, 2)
    assert (profile.scheduling_us, profile.other_us, profile.choice_us) == (10, 10, 10)
    while (result := engine.step([], 0)).next_due_us is not None:
        assert result.profile is not None and result.profile.row_count == 2
    assert engine.step([], 0).profile is None


def test_an_engine_without_a_stopwatch_says_nothing() -> None:
    engine = new_engine(None)
    engine.step([turn("s", "t")], 0)
    result = engine.step([], 0)
    assert result.events and result.profile is None
