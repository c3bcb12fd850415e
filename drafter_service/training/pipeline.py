"""A whole training run, put together: a target's folder and some settings in, a draft out.

FOLDER/data             samples; shared by all runs of a folder
FOLDER/states-<taps>    the target's states of them
FOLDER/runs/<name>      a run; its `draft` is the result
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafter_service.models.dspark.checkpoint import (
    read_config,
    save_draft,
    target_tensor,
    target_vocabulary,
)
from drafter_service.models.dspark.config import LayerShape, draft_of, shape_of
from drafter_service.models.dspark.heads import VanillaHead
from drafter_service.models.dspark.layers import RMSNorm
from drafter_service.models.dspark.network import DSparkNetwork
from drafter_service.models.mtp.network import MtpNetwork, mtp_of
from drafter_service.training.beginnings import begin_at_random, begin_with_target
from drafter_service.training.order import frequent_ids, is_held_out
from drafter_service.training.samples import read_samples
from drafter_service.training.settings import TrainSettings
from drafter_service.training.states import StateFolder, StateSource
from drafter_service.training.statistics import begin_as_linear, begin_with_bigrams, mean_states
from drafter_service.training.trainees import BlockTrainee, MtpTrainee, TargetHead, Trainee
from drafter_service.training.trainer import TrainData, Trainer

SETTINGS_FILE = "settings.json"
STATISTICS_SAMPLES = 4000
"""Samples that a beginning's statistics are of; more would take longer than they are worth."""
_STATE_BYTES = 2
_OPTIMIZER_COPIES = 5
"""float32 numbers a learned weight: itself, its gradient, its running mean and two moments."""


class CannotTrain(ValueError):
    """A run that cannot be as it is asked for. The message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folders of one target's runs."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def states(self, taps: tuple[int, ...]) -> Path:
        return self.folder / ("states-" + "-".join(str(layer) for layer in taps))

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


def with_defaults(settings: TrainSettings, target: Path) -> TrainSettings:
    """Fills in what follows from the target: which layers are tapped, and the mask's id."""
    shape = _shape(target)
    if not settings.taps:
        last = shape.num_target_layers - 2
        settings = replace(settings, taps=tuple(sorted({last // 3, last * 3 // 4, last})))
    if not settings.mask_token_id:
        settings = replace(settings, mask_token_id=_unused_id(target, shape.vocab_size))
    return settings


def settled(settings: TrainSettings, run: Path) -> TrainSettings:
    """The settings of a run that is begun or goes on; a run that goes on may have more steps, nothing else. CannotTrain."""
    file = run / SETTINGS_FILE
    if file.exists():
        before = TrainSettings.from_json(json.loads(file.read_text(encoding="utf-8")))
        if replace(before, steps=settings.steps) != settings:
            old, new = before.to_json(), settings.to_json()
            name = next(name for name in old if name != "steps" and old[name] != new[name])
            raise CannotTrain(
                f"{name}: is {new[name]}, but {run} was begun with {old[name]}; give the run another name"
            )
    run.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings.to_json(), indent=2) + "\n", encoding="utf-8")
    return settings


def train_data(workspace: Workspace, states: StateSource) -> TrainData:
    """All samples of a workspace that have states; some of them are held out. CannotTrain if there are too few."""
    kept = {number: sample for number, sample in read_samples(workspace.data) if _has(states, number)}
    held_out = [number for number in kept if is_held_out(number)]
    train = [number for number in kept if not is_held_out(number)]
    if not train or not held_out:
        raise CannotTrain(f"{workspace.data}: has {len(kept)} samples with states; write more samples first")
    return TrainData(kept, train, held_out, states)


def new_trainee(target: Path, settings: TrainSettings, data: TrainData) -> Trainee:
    """The network that is to be trained, as it begins."""
    network = new_network(target, settings)
    vocabulary = target_vocabulary(target)
    begin_at_random(network, vocabulary, settings.seed)
    if settings.begin_with_target:
        begin_with_target(network, target)
    shape = network.config
    norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps, shape.family.norm_offset)
    norm.weight = nn.Parameter(target_tensor(target, "norm.weight"), requires_grad=False)
    samples = [data.samples[number] for number in data.train_numbers]
    kept_ids = frequent_ids(samples, settings.kept_vocabulary or shape.vocab_size, shape.vocab_size)
    head = TargetHead(norm, vocabulary.lm_head, torch.from_numpy(kept_ids))
    if settings.begin_with_statistics:
        _begin_with_statistics(network, data, norm, vocabulary.lm_head)
    if isinstance(network, MtpNetwork):
        return MtpTrainee(network, head, settings.weights)
    return BlockTrainee(network, head, settings.weights)


def _begin_with_statistics(
    network: DSparkNetwork | MtpNetwork, data: TrainData, norm: RMSNorm, lm_head: Tensor
) -> None:
    items = (data.item(number) for number in data.train_numbers[:STATISTICS_SAMPLES])
    if isinstance(network, MtpNetwork):
        begin_as_linear(network, items, norm)
    elif isinstance(network.markov_head, VanillaHead):
        means = mean_states(items, norm, network.config.vocab_size)
        begin_with_bigrams(network.markov_head, means, lm_head)


def new_network(target: Path, settings: TrainSettings) -> DSparkNetwork | MtpNetwork:
    """A network of the settings' shape for this target; its weights mean nothing yet."""
    config = read_config(target)
    if settings.kind == "mtp":
        return MtpNetwork(mtp_of(config))
    with_heads = settings.kind == "dspark"
    more = {"num_key_value_heads": settings.key_heads} if settings.key_heads else {}
    return DSparkNetwork(
        draft_of(
            config,
            num_hidden_layers=settings.layers,
            target_layer_ids=settings.taps,
            mask_token_id=settings.mask_token_id,
            block_size=settings.block_size,
            markov_rank=settings.rank if with_heads else 0,
            markov_head_type=settings.head,
            enable_confidence_head=with_heads,
            **more,
        )
    )


def save_result(
    trainer: Trainer, trainee: Trainee, settings: TrainSettings, target: Mapping[str, str], folder: Path
) -> None:
    """Writes the running mean as a draft in bfloat16, with the run's settings and the target's fingerprint in its config.json."""
    network = trainee.network
    assert isinstance(network, DSparkNetwork | MtpNetwork)
    about = {
        "training": {**settings.to_json(), "steps_done": trainer.step},
        "target": dict(target),
    }
    with trainer.mean_weights():
        save_draft(network, folder, about, with_vocabulary=False, dtype=torch.bfloat16)


def target_fingerprint(name: str, target: Path) -> dict[str, str]:
    """What a draft must find again in the target that it drafts for: hashes of its tokenizer and weights."""
    weights = hashlib.sha256()
    for file in sorted(target.glob("*.safetensors")):
        with file.open("rb") as content:
            weights.update(hashlib.file_digest(content, "sha256").digest())
    tokenizer = target / "tokenizer.json"
    return {
        "name": name,
        "tokenizer_hash": hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else "",
        "weights_hash": weights.hexdigest(),
    }


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will take, before it takes it."""

    state_bytes: int
    memory_bytes: int
    draft_bytes: int


def estimate(target: Path, settings: TrainSettings, token_count: int) -> Estimate:
    """For samples of so many tokens together. Time cannot be known before it is measured."""
    shape = _shape(target)
    with torch.device("meta"):
        network = new_network(target, settings)
    vocabulary = {"embed_tokens.weight", "lm_head.weight"}
    learned = sum(weight.numel() for name, weight in network.named_parameters() if name not in vocabulary)
    rows = settings.samples_per_step * settings.anchors_per_sample * settings.block_size
    logits = (
        rows * (settings.kept_vocabulary or shape.vocab_size) * 4 * 5
    )  # draft, target, and what backward keeps
    frozen = shape.vocab_size * shape.hidden_size * 6  # the embedding in float32, the LM head in bfloat16
    return Estimate(
        state_bytes=token_count * shape.hidden_size * (len(settings.taps) + 1) * _STATE_BYTES,
        memory_bytes=learned * 4 * _OPTIMIZER_COPIES + logits + frozen,
        draft_bytes=learned * 2,
    )


def _has(states: StateSource, number: int) -> bool:
    return not isinstance(states, StateFolder) or number in states


def _shape(target: Path) -> LayerShape:
    return LayerShape(**shape_of(read_config(target)))


def _unused_id(target: Path, vocab_size: int) -> int:
    """An id that no text has: the last special token that begins or ends nothing; the last id of all without a tokenizer.json."""
    file = target / "tokenizer.json"
    if not file.is_file():
        return vocab_size - 1
    added: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")).get("added_tokens", [])
    busy = _ids_in_use(target)
    free = [token["id"] for token in added if token["special"] and token["id"] not in busy]
    return max(free, default=vocab_size - 1)


def _ids_in_use(target: Path) -> set[int]:
    """Beginning, end and padding of the configurations."""
    used: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (target / name).is_file():
            config = json.loads((target / name).read_text(encoding="utf-8"))
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value = config.get(key)
                used.update(value if isinstance(value, list) else [value] if value is not None else [])
    return used
