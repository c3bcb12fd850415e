"""What a turn asks of the choice of its tokens.

The gateway fills it, the verifier obeys it, and a drafter may copy it, so its fields and their neutral values stand here once.
The order in which the filters apply is fixed: `sparkrelay.device.filters` (logit bias, min_tokens, penalties, grammar,
temperature, top-k, top-p, min-p).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

MAX_SEED = 2**64 - 1
MAX_STOP_IDS = 256
MAX_LOGIT_BIASES = 1024
MIN_REPETITION_PENALTY = 1 / 128  # a power of two is the same number as a float32
MAX_REPETITION_PENALTY = 100.0


# Sampling's own field names -> the proto's.
PROTO_NAMES = {"min_tokens": "min_token_count"}


class InvalidField(ValueError):
    """A value that cannot be served: which field, and what to send instead."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one turn's tokens are chosen. Every default is neutral: greedy decoding without filters.

    temperature        0 is greedy (no noise); otherwise logits are divided by it before the noise is added
    top_k              keep the k best tokens and all tied with the last one kept; 0 keeps all
    top_p              keep the smallest best set whose probability reaches it, and all tied; 1 keeps all
    min_p              keep tokens with probability >= min_p * the best one's; 0 keeps all
    repetition_penalty divides positive logits of every id in the sequence (multiplies negative ones); 1 is off
    presence_penalty   subtracted once from ids that occur since the turn's output began
    frequency_penalty  subtracted once per such occurrence
    logit_bias         (token id, added value) pairs, added first
    min_tokens         stop ids are masked until the turn has produced so many tokens
    seed               of the coupled noise, 64 bits; the same seed gives the same tokens
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def check(self, vocab_size: int) -> None:
        """Raises InvalidField for the first value that cannot be served."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidField(field.name, f"is {value}; send a finite number")
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidField(
                "top_p", f"is {self.top_p}; send a number above 0 and at most 1 (1 turns it off)"
            )
        _within("min_p", self.min_p, 0.0, 1.0)
        # A penalty near 0 would divide logits beyond what a float32 holds, and infinities have no order.
        if not MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY:
            raise InvalidField(
                "repetition_penalty",
                f"is {self.repetition_penalty}; send a number from {MIN_REPETITION_PENALTY:g} to "
                f"{MAX_REPETITION_PENALTY:g} (1 is off)",
            )
        _within("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _within("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _within("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _within("seed", self.seed, 0, MAX_SEED)
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InvalidField(
                "logit_bias", f"has {len(self.logit_bias)} entries; send at most {MAX_LOGIT_BIASES}"
            )
        for token_id, bias in self.logit_bias:
            if not 0 <= token_id < vocab_size:
                raise InvalidField(
                    "logit_bias", f"names token {token_id}; send ids of the vocabulary, 0 to {vocab_size - 1}"
                )
            if not -1000.0 <= bias <= 1000.0:
                raise InvalidField(
                    "logit_bias", f"of token {token_id} is {bias}; send a number from -1000 to 1000"
                )


def _within(field: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise InvalidField(field, f"is {value}; send a number from {lowest:g} to {highest:g}")
