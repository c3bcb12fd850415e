"""Training: the loss, the order, and a run that is killed and goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafter_service.models.dspark.checkpoint import target_tensor
from drafter_service.models.dspark.layers import DraftLayer
from drafter_service.models.dspark.network import DSparkNetwork
from drafter_service.training.order import HELD_OUT_EVERY, anchors_of, frequent_ids, is_held_out, step_numbers
from drafter_service.training.pipeline import new_trainee
from drafter_service.training.rounds import Rounds, match_rates, walk
from drafter_service.training.samples import Sample
from drafter_service.training.settings import TrainSettings
from drafter_service.training.states import ComputedStates
from drafter_service.training.trainees import Trainee
from drafter_service.training.trainer import TrainData, Trainer
from drafter_service.training.writer import Assignment, Writer
from sparkrelay.device.flat_model import FlatCausalLM
from tests.drafter_service.training.tiny_target import VOCAB, rules, save_target

TAPS = (0, 2)
SETTINGS = TrainSettings(
    taps=TAPS,
    block_size=3,
    rank=8,
    kept_vocabulary=VOCAB,
    samples_per_step=4,
    anchors_per_sample=6,
    steps=1000,
    warmup_steps=5,
    learning_rate=3e-3,
    averaged_steps=10,
)


class World:
    """A target, samples that it wrote, and drafts for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = save_target(folder)
        target = FlatCausalLM.load(folder, dtype="bfloat16")
        assignments = iter(Assignment(n, (1, 5, 10 + n, 2, 7), 0.0) for n in range(24))
        outcomes = Writer(target, rules(token_limit=60), 8).write(assignments)
        self.samples = {o.number: o.sample for o in outcomes if o.sample is not None}
        numbers = sorted(self.samples)
        self.data = TrainData(self.samples, numbers[4:], numbers[:4], ComputedStates(target, TAPS))

    def trainee(self, settings: TrainSettings) -> Trainee:
        return new_trainee(self.folder, settings, self.data)

    def trainer(self, settings: TrainSettings, folder: Path) -> Trainer:
        return Trainer(self.trainee(settings), settings, self.data, folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize("kind", ["dspark", "dflash", "mtp"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(world: World, tmp_path: Path, kind: str) -> None:
    settings = replace(SETTINGS, kind=kind)
    straight = world.trainer(settings, tmp_path / "straight")
    reports = [straight.train_step() for _ in range(7)]

    first = world.trainer(settings, tmp_path / "killed")
    for _ in range(3):
        first.train_step()
    first.save()
    first.train_step()  # lost
    second = world.trainer(settings, tmp_path / "killed")
    assert second.step == 3
    assert [second.train_step() for _ in range(4)] == reports[3:]
    assert second.judge(world.data.held_out_numbers) == straight.judge(world.data.held_out_numbers)


@pytest.mark.parametrize("kind", ["dspark", "dflash", "mtp"])
@pytest.mark.parametrize("beginning", [(False, False), (True, False), (False, True)])
def test_training_makes_the_draft_better(
    world: World, tmp_path: Path, kind: str, beginning: tuple[bool, bool]
) -> None:
    with_target, with_statistics = beginning
    settings = replace(
        SETTINGS, kind=kind, begin_with_target=with_target, begin_with_statistics=with_statistics
    )
    trainer = world.trainer(settings, tmp_path)
    before = trainer.judge(world.data.train_numbers)
    for _ in range(60):
        report = trainer.train_step()
    after = trainer.judge(world.data.train_numbers)
    assert after.loss < 0.98 * before.loss
    assert after.rounds.accepted_length > before.rounds.accepted_length + 0.02
    assert report.block_count == 4 * 6
    slots = 1 if kind == "mtp" else 3
    assert len(after.rates) == slots
    assert 1.0 < after.rounds.accepted_length <= slots + 1


def test_a_draft_that_begins_with_the_target_s_last_layer_has_its_weights(world: World) -> None:
    network = world.trainee(replace(SETTINGS, begin_with_target=True)).network
    assert isinstance(network, DSparkNetwork)
    layer = network.layers[0]
    assert isinstance(layer, DraftLayer)
    assert torch.equal(
        layer.mlp.up_proj.weight, target_tensor(world.folder, "layers.3.mlp.up_proj.weight").float()
    )
    item = world.data.item(world.data.train_numbers[0])
    rows = network.context_rows(item.states.taps.float())
    own_input = layer.input_layernorm(item.states.taps[:, 32:].float())
    assert torch.nn.functional.cosine_similarity(rows, own_input).min() > 0.9


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_rounds_commit_every_token_once(matched: list[int]) -> None:
    rounds = walk(matched)
    assert rounds.committed_count == len(matched)
    assert 1 <= rounds.round_count <= len(matched)
    assert walk([0] * len(matched)) == Rounds(len(matched), len(matched))
    rates = match_rates(matched, 5)
    survival = np.cumprod(rates)
    assert survival[0] == pytest.approx(np.mean(np.array(matched) > 0))
    assert survival.sum() == pytest.approx(np.mean(matched))


def test_a_walk_goes_on_behind_the_target_s_own_token() -> None:
    assert walk([2, 0, 0, 1, 5, 0]) == Rounds(3, 6)  # anchors 0, 3, 5
    assert walk([2, 0, 0, 1, 5, 0]).accepted_length == 2.0


@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 3))
def test_every_sample_comes_once_a_pass(count: int, per_step: int, seed: int) -> None:
    numbers = [3 * number for number in range(count)]
    passed = [n for step in range(count) for n in step_numbers(numbers, per_step, step, seed)]
    for turn in range(per_step):
        assert sorted(passed[turn * count : (turn + 1) * count]) == numbers
    assert step_numbers(numbers, per_step, count - 1, seed) == passed[-per_step:]


def test_every_pass_has_an_order_of_its_own() -> None:
    passes = [tuple(step_numbers(range(30), 30, step, 1)) for step in range(5)]
    assert len(set(passes)) == 5
    assert passes[0] != tuple(step_numbers(range(30), 30, 0, 2))


def test_anchors_stand_before_the_answer_s_tokens() -> None:
    sample = Sample(tuple(range(50)), 20, 0.0, False, False)
    assert anchors_of(sample, 99, 0, 0).tolist() == list(range(19, 49))
    some = anchors_of(sample, 7, 0, 0)
    assert len(set(some.tolist())) == 7 and some.min() >= 19 and some.max() <= 48
    assert some.tolist() == anchors_of(sample, 7, 0, 0).tolist() != anchors_of(sample, 7, 0, 1).tolist()


def test_the_kept_vocabulary_is_the_answers_most_frequent_ids() -> None:
    samples = [Sample((9, 9, 9, 5, 5, 3), 3, 0.0, False, False), Sample((1, 4, 3, 3), 1, 0.0, False, False)]
    assert frequent_ids(samples, 2, 12).tolist() == [3, 5]
    assert frequent_ids(samples, 4, 12).tolist() == [0, 3, 4, 5]
    assert frequent_ids(samples, 12, 12).tolist() == list(range(12))


def test_held_out_samples_are_few_and_fixed() -> None:
    held_out = [number for number in range(10 * HELD_OUT_EVERY) if is_held_out(number)]
    assert len(held_out) == 10


def test_the_learning_rate_rises_stays_and_falls() -> None:
    settings = TrainSettings(steps=1000, warmup_steps=10, cooldown=0.2, learning_rate=1.0)
    rates = [settings.learning_rate_at(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[799] == 1.0
    assert rates[900] == pytest.approx(0.5) and rates[999] == pytest.approx(0.1)


def test_settings_come_back_and_unknown_ones_are_named() -> None:
    assert TrainSettings.from_json(SETTINGS.to_json()) == SETTINGS
    with pytest.raises(ValueError, match="momentum: is no training setting"):
        TrainSettings.from_json({"momentum": 1})
