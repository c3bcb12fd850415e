"""The steps of a run before the training itself: the target, its samples, its states. Each goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from drafter_service.training.data import DataPlan, write_samples
from drafter_service.training.pipeline import CannotTrain, Workspace, train_data
from drafter_service.training.prompts import STARTERS, chat_format, prompt_ids, read_prompts
from drafter_service.training.samples import SampleFolder, read_samples
from drafter_service.training.settings import TrainSettings
from drafter_service.training.states import ComputedStates, StateFolder, write_states
from drafter_service.training.trainer import TrainData
from drafter_service.training.writer import LoopRule, Writer, WriterRules
from sparkrelay.device.flat_model import FlatCausalLM, UnsupportedModel

OnProgress = Callable[[int, str], None]
"""Is told how much is done, and a few words."""

_SEED = 1


@dataclass(frozen=True, slots=True)
class DataWish:
    """Which samples a run wants; see `DataPlan`. sequences: written at once."""

    sample_count: int
    prompt_files: Sequence[Path]
    greedy_share: float
    temperature: float
    sequences: int


def open_target(folder: Path, threads: int) -> FlatCausalLM:
    """Loads the target; threads: of torch, 0 for its own choice. CannotTrain if it cannot be served."""
    if threads:
        torch.set_num_threads(threads)
    try:
        return FlatCausalLM.load(folder)
    except UnsupportedModel as error:
        raise CannotTrain(str(error)) from error


def have_samples(
    model: FlatCausalLM,
    target: Path,
    workspace: Workspace,
    wish: DataWish,
    loop_start: LoopRule,
    on_progress: OnProgress,
) -> None:
    """Has the samples written that are missing. UnusablePrompts names what is wrong with a file or a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    rules = WriterRules(chat_format(tokenizer), frozenset(model.stop_ids), loop_start, _SEED)
    plan = DataPlan(
        [prompt_ids(tokenizer, message) for message in read_prompts(wish.prompt_files)],
        [tuple(tokenizer.encode(words, add_special_tokens=False)) for words in STARTERS],
        wish.sample_count,
        wish.greedy_share,
        wish.temperature,
        _SEED,
    )

    def tell(samples: SampleFolder) -> None:
        on_progress(
            len(samples.numbers),
            f"{samples.answer_token_count} answer tokens, {samples.loop_count} loops cut",
        )

    write_samples(plan, SampleFolder(workspace.data), Writer(model, rules, wish.sequences), tell)


def have_states(
    model: FlatCausalLM,
    workspace: Workspace,
    settings: TrainSettings,
    keep: bool,
    on_progress: OnProgress,
) -> TrainData:
    """What to train on. keep: compute the states that are missing and keep them on disk; if not, each step computes its own."""
    computed = ComputedStates(model, settings.taps)
    if not keep:
        return train_data(workspace, computed)
    states = StateFolder(workspace.states(settings.taps), settings.taps)
    write_states(computed, read_samples(workspace.data), states, lambda done: on_progress(done, "samples"))
    return train_data(workspace, states)
