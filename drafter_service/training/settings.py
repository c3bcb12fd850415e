"""What a training run is to be: everything that decides its result, kept beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from drafter_service.models.dspark.config import HeadType

DraftKind = Literal["dspark", "dflash", "mtp"]


@dataclass(frozen=True, slots=True)
class LossWeights:
    """decay: slots over which a slot's weight falls to 1/e. soft: cross entropy against the target's distribution."""

    cross_entropy: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0
    soft: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """One run.

    kind                 dspark, dflash (no sequential head, no confidence, CE only) or mtp (one layer, one token)
    taps                 target layers whose outputs the draft reads
    layers               of the draft
    key_heads            of the draft's layers; 0: as many as the target's
    block_size           gamma
    rank, head           of the sequential head
    begin_with_target    start from the target's last layers instead of random ones
    begin_with_statistics start as the best bigram model of the rank (dspark, vanilla head), or as a linear model (mtp)
    kept_vocabulary      most frequent tokens that the loss is about; 0: all
    samples_per_step, anchors_per_sample
    steps                of the whole run; its last `cooldown` part lowers the learning rate to a tenth
    warmup_steps         over which it rises
    averaged_steps       the weights that are saved as the draft are a running mean over about so many steps
    seed                 of weights and order
    """

    kind: DraftKind = "dspark"
    taps: tuple[int, ...] = ()
    layers: int = 1
    key_heads: int = 0
    block_size: int = 5
    rank: int = 64
    head: HeadType = "vanilla"
    mask_token_id: int = 0
    begin_with_target: bool = False
    begin_with_statistics: bool = True
    kept_vocabulary: int = 8192
    samples_per_step: int = 8
    anchors_per_sample: int = 32
    steps: int = 10_000
    warmup_steps: int = 100
    cooldown: float = 0.2
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    averaged_steps: int = 200
    cross_entropy: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0
    soft: float = 0.0
    decay: float = 4.0
    bfloat16: bool = True
    seed: int = 1

    @property
    def weights(self) -> LossWeights:
        if self.kind == "dspark":
            return LossWeights(self.cross_entropy, self.l1, self.confidence, self.decay, self.soft)
        if self.kind == "dflash":
            return LossWeights(1.0, 0.0, 0.0, self.decay, self.soft)
        return LossWeights(self.cross_entropy, self.l1, 0.0, self.decay, self.soft)

    def learning_rate_at(self, step: int) -> float:
        """Rises, stays, and falls linearly to a tenth at the end."""
        cool_from = self.steps * (1 - self.cooldown)
        left = max(self.steps - step, 0) / max(self.steps - cool_from, 1)
        return self.learning_rate * min(1.0, (step + 1) / max(self.warmup_steps, 1), max(left, 0.1))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> TrainSettings:
        """ValueError names a field that is not known."""
        unknown = sorted(set(record) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{unknown[0]}: is no training setting")
        return cls(**{**record, "taps": tuple(record.get("taps", ()))})
