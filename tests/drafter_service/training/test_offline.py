"""Offline judgement: what it says would match is what drafting really gives, greedy and sampled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from drafter_service.calibration import Calibration
from drafter_service.context_rows import ContextRows
from drafter_service.models import DraftModel, DraftRequest, TurnRules
from drafter_service.models.dspark.checkpoint import load_draft, load_mtp, save_draft, target_vocabulary
from drafter_service.models.dspark.drafter import BlockModel, projector_hash
from drafter_service.models.dspark.network import DSparkNetwork
from drafter_service.models.mtp.drafter import MtpModel
from drafter_service.models.mtp.network import MtpNetwork
from drafter_service.training.offline import confidence_data, observe, summarize
from drafter_service.training.pipeline import new_trainee
from drafter_service.training.samples import Sample
from drafter_service.training.settings import TrainSettings
from drafter_service.training.states import ComputedStates
from drafter_service.training.trainer import TrainData, Trainer
from drafter_service.training.writer import Assignment, Writer
from sparkrelay.device.flat_model import FlatCausalLM
from sparkrelay.sampling import Sampling
from tests.drafter_service.training.tiny_target import VOCAB, rules, save_target

TAPS = (0, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def data(folder: Path) -> TrainData:
    """Six prompts, each answered greedily and sampled; a draft may learn them by heart."""
    target = FlatCausalLM.load(folder, dtype="bfloat16")
    assignments = iter(Assignment(n, (1, 5, 40 + n // 2, 2, 7), 0.9 * (n % 2)) for n in range(12))
    written = Writer(target, rules(token_limit=40), 8).write(assignments)
    samples = {o.number: o.sample for o in written if o.sample is not None}
    assert {sample.temperature for sample in samples.values()} == {0.0, 0.9}
    return TrainData(samples, sorted(samples), [], ComputedStates(target, TAPS))


def trained(
    folder: Path, data: TrainData, work: Path, kind: str, steps: int = 80
) -> DSparkNetwork | MtpNetwork:
    settings = TrainSettings(
        kind=kind,  # type: ignore[arg-type]
        taps=TAPS,
        block_size=4,
        rank=8,
        kept_vocabulary=VOCAB,
        samples_per_step=6,
        steps=1000,
        warmup_steps=5,
        learning_rate=5e-3,
        averaged_steps=5,
    )
    trainee = new_trainee(folder, settings, data)
    trainer = Trainer(trainee, settings, data, work)
    for _ in range(steps):
        trainer.train_step()
    network = trainee.network
    assert isinstance(network, DSparkNetwork | MtpNetwork)
    with trainer.mean_weights():
        save_draft(network, work, {}, with_vocabulary=False, dtype=torch.float32)
    load = load_mtp if kind == "mtp" else load_draft
    return load(work, torch.float32, target_vocabulary(folder))


def drafted_match(
    network: DSparkNetwork | MtpNetwork, model: DraftModel, data: TrainData, number: int, anchor: int
) -> int:
    """How many tokens match of the block that the kind drafts when the session has got to this anchor."""
    sample = data.samples[number]
    states = data.states.read(number, sample)
    if isinstance(network, DSparkNetwork):
        rows = network.context_rows(states.taps[:anchor].float()).bfloat16()
    else:
        rows = states.final[:anchor]
    kept = ContextRows(rows.shape[1])
    kept.put(0, rows.contiguous().view(torch.int16).numpy().view(np.uint16))
    sampling = Sampling(temperature=sample.temperature, seed=sample.seed)
    turn = TurnRules("turn", sampling, sample.prompt_len, frozenset(), 1)
    ids = list(sample.token_ids[: anchor + 1])
    # A block may reach the turn's output only: before it, the prompt's last token is the output's start.
    turn = turn if len(ids) >= sample.prompt_len else TurnRules("turn", sampling, len(ids), frozenset(), 1)
    (block,) = model.draft([DraftRequest(number, ids, 0, 4, turn, kept)])
    assert block is not None
    matched = 0
    for token_id, wanted in zip(block.token_ids, sample.token_ids[anchor + 1 :], strict=False):
        if token_id != wanted:
            break
        matched += 1
    return matched


@pytest.mark.parametrize("kind", ["dspark", "dflash", "mtp"])
def test_what_is_said_to_match_is_what_drafting_gives(
    folder: Path, data: TrainData, tmp_path: Path, kind: str
) -> None:
    network = trained(folder, data, tmp_path, kind)
    model: DraftModel
    if isinstance(network, MtpNetwork):
        model = MtpModel(network, "", 2**30)
    else:
        model = BlockModel(network, Calibration(), "", 7, 2**30, projector_hash(network))
    compared, same, matches = 0, 0, {0.0: 0, 0.9: 0}
    for number, sample in data.samples.items():
        item = data.item(number)
        observed = observe(network, sample, item)
        for anchor, matched in zip(item.anchors.tolist(), observed.matched.tolist(), strict=True):
            compared += 1
            same += matched == drafted_match(network, model, data, number, anchor)
            matches[sample.temperature] += matched
    assert min(matches.values()) > 20  # it has learnt them, so there is something to compare
    assert same >= 0.97 * compared  # rows travel as bfloat16, so a near tie may fall otherwise


def test_answers_are_summed_up(folder: Path, data: TrainData, tmp_path: Path) -> None:
    network = trained(folder, data, tmp_path, "dspark", steps=40)
    observed = [observe(network, data.samples[number], data.item(number)) for number in data.train_numbers]
    summary = summarize(observed, 4)
    answers = sum(len(sample.token_ids) - sample.prompt_len for sample in data.samples.values())
    assert summary.rounds.committed_count == answers
    assert 1.0 < summary.rounds.accepted_length < 5.0 and len(summary.rates) == 4
    logits, matched = confidence_data(observed)
    assert logits.shape == (answers, 4) and matched.shape == (answers,)
    with pytest.raises(ValueError, match="no confidence head"):
        confidence_data([observed[0]._replace(doubts=None)])


def test_a_sample_without_an_end_matches_nothing_behind_it(
    folder: Path, data: TrainData, tmp_path: Path
) -> None:
    network = trained(folder, data, tmp_path, "dflash", steps=1)
    number = data.train_numbers[0]
    sample = data.samples[number]
    short = Sample(sample.token_ids[:-3], sample.prompt_len, 0.0, False, False)
    item = data.item(number)
    cut = item._replace(token_ids=item.token_ids[:-3], anchors=item.anchors[:-3])
    observed = observe(network, short, cut)
    left = len(short.token_ids) - 1 - cut.anchors.numpy()
    assert (observed.matched <= left).all() and left.min() == 1
