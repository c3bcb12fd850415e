"""The loop: steps, a checkpoint every now and then, held-out judgement, and going on after a kill as if nothing had happened.

FOLDER/settings.json   what the run is
FOLDER/state.pt        weights, their running mean, optimizer, step: everything to go on from
FOLDER/draft/          the running mean as a draft that can be used
FOLDER/log.jsonl       a line now and then: losses, matches, held-out figures
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafter_service.training.loss import Judged
from drafter_service.training.order import anchors_of, step_numbers
from drafter_service.training.rounds import Rounds, match_rates, together, walk
from drafter_service.training.samples import Sample
from drafter_service.training.settings import TrainSettings
from drafter_service.training.states import StateSource
from drafter_service.training.trainees import Trainee, TrainItem

STATE_FILE = "state.pt"
LOG_FILE = "log.jsonl"


@dataclass(frozen=True, slots=True)
class TrainData:
    """What is trained on, and what is judged on; by sample number."""

    samples: Mapping[int, Sample]
    train_numbers: Sequence[int]
    held_out_numbers: Sequence[int]
    states: StateSource

    def item(self, number: int, anchors: Tensor | None = None) -> TrainItem:
        """A sample with its states; anchors: every position of the answer if None."""
        sample = self.samples[number]
        ids = torch.tensor(sample.token_ids, dtype=torch.int64)
        if anchors is None:
            anchors = torch.arange(sample.prompt_len - 1, len(sample.token_ids) - 1)
        return TrainItem(ids, anchors, self.states.read(number, sample))


@dataclass(frozen=True, slots=True)
class StepReport:
    """Of one step. matched: mean number of greedy guesses that match, at the step's anchors."""

    step: int
    loss: float
    cross_entropy: float
    l1: float
    confidence: float
    matched: float
    block_count: int


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Judgement on samples never trained on. accepted_length: of greedy rounds on greedy answers."""

    loss: float
    rounds: Rounds
    rates: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "accepted_length": self.rounds.accepted_length,
            "rounds": self.rounds.round_count,
            "rates": self.rates,
        }


class Trainer:
    """See the module. `step` counts the steps that are done."""

    def __init__(self, trainee: Trainee, settings: TrainSettings, data: TrainData, folder: Path) -> None:
        """Goes on from the folder's state if it has one."""
        self.step = 0
        self._trainee = trainee
        self._settings = settings
        self._data = data
        self._folder = folder
        self._learned = {
            name: weight for name, weight in trainee.network.named_parameters() if weight.requires_grad
        }
        self._mean = {name: weight.detach().clone() for name, weight in self._learned.items()}
        self._optimizer = torch.optim.AdamW(
            self._learned.values(),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE_FILE).exists():
            self._restore()

    def train_step(self) -> StepReport:
        """One step: forward, backward, update, and the running mean."""
        settings = self._settings
        items = [self._item(number) for number in self._numbers()]
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(self.step)
        answer = self._answer(items)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(answer.terms.total)
        nn.utils.clip_grad_norm_(self._learned.values(), settings.clip)
        self._optimizer.step()
        self.step += 1
        self._average()
        total, cross_entropy, l1, confidence = (float(term.detach()) for term in answer.terms)
        matched = float(answer.matched.float().mean())
        return StepReport(self.step, total, cross_entropy, l1, confidence, matched, len(answer.matched))

    @torch.no_grad()
    def judge(self, numbers: Iterable[int]) -> HeldOut:
        """The running mean on some samples, at every position of their answers."""
        losses, walks, all_matched = [], [], []
        with self.mean_weights():
            for number in numbers:
                answer = self._answer([self._data.item(number)])
                losses.append(float(answer.terms.total))
                if self._data.samples[number].temperature == 0.0:
                    matched = answer.matched.tolist()
                    walks.append(walk(matched))
                    all_matched += matched
        slots = 1 if self._settings.kind == "mtp" else self._settings.block_size
        return HeldOut(sum(losses) / max(len(losses), 1), together(walks), match_rates(all_matched, slots))

    def save(self) -> None:
        """Writes the state, whole or not at all."""
        unfinished = self._folder / (STATE_FILE + ".unfinished")
        record = {
            "step": self.step,
            "weights": {name: weight.detach() for name, weight in self._learned.items()},
            "mean": self._mean,
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(record, unfinished)
        unfinished.replace(self._folder / STATE_FILE)

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds a line to the run's log."""
        with (self._folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def mean_weights(self) -> _Swapped:
        """With this, the network has the running mean's weights."""
        return _Swapped(self._learned, self._mean)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _numbers(self) -> list[int]:
        settings = self._settings
        return step_numbers(self._data.train_numbers, settings.samples_per_step, self.step, settings.seed)

    def _item(self, number: int) -> TrainItem:
        settings = self._settings
        sample = self._data.samples[number]
        anchors = anchors_of(sample, settings.anchors_per_sample, settings.seed, self.step)
        return self._data.item(number, torch.from_numpy(anchors))

    def _answer(self, items: Sequence[TrainItem]) -> Judged:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._settings.bfloat16):
            return self._trainee.answer(items)

    @torch.no_grad()
    def _average(self) -> None:
        share = max(1 / (self.step + 1), 1 / self._settings.averaged_steps)
        mean, weights = list(self._mean.values()), [weight.detach() for weight in self._learned.values()]
        torch._foreach_lerp_(mean, weights, share)

    def _restore(self) -> None:
        record = torch.load(self._folder / STATE_FILE, weights_only=True)
        self.step = record["step"]
        with torch.no_grad():
            for name, weight in self._learned.items():
                weight.copy_(record["weights"][name])
                self._mean[name].copy_(record["mean"][name])
        self._optimizer.load_state_dict(record["optimizer"])


class _Swapped:
    """Exchanges two sets of weights while it is entered."""

    def __init__(self, learned: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        self._pairs = [(learned[name], others[name]) for name in learned]

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *_: object) -> None:
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for one, other in self._pairs:
            kept = one.detach().clone()
            one.copy_(other)
            other.copy_(kept)


def run(
    trainer: Trainer,
    settings: TrainSettings,
    save_every: Callable[[], bool],
    on_step: Callable[[StepReport], None],
) -> None:
    """Trains to the last step. save_every: asked after each step whether it is time to save."""
    while trainer.step < settings.steps:
        on_step(trainer.train_step())
        if save_every() or trainer.step == settings.steps:
            trainer.save()
