"""Which samples and anchors a step takes: a function of the seed and the step, so a resumed run goes on as if never stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from drafter_service.training.samples import Sample

HELD_OUT_EVERY = 40
"""Samples whose number is a multiple of it are never trained on."""

Ids = npt.NDArray[np.int64]


def is_held_out(number: int) -> bool:
    """Whether the sample with this number is for judging only."""
    return number % HELD_OUT_EVERY == 0


def step_numbers(numbers: Sequence[int], per_step: int, step: int, seed: int) -> list[int]:
    """The samples of a step: the numbers are gone through in a new order each time."""
    chosen = []
    for place in range(step * per_step, (step + 1) * per_step):
        turn, index = divmod(place, len(numbers))
        order = np.random.default_rng([seed, turn]).permutation(len(numbers))
        chosen.append(numbers[order[index]])
    return chosen


def anchors_of(sample: Sample, count: int, seed: int, step: int) -> Ids:
    """Positions of at most `count` anchors, ascending; each stands before a token of the answer."""
    first, last = sample.prompt_len - 1, len(sample.token_ids) - 2
    candidates = np.arange(first, last + 1)
    if len(candidates) <= count:
        return candidates
    generator = np.random.default_rng([seed, step, len(sample.token_ids), sum(sample.token_ids)])
    return np.sort(generator.choice(candidates, count, replace=False))


def frequent_ids(samples: Sequence[Sample], count: int, vocab_size: int) -> Ids:
    """The `count` ids that the answers have most often, ascending; the whole vocabulary if it has no more. Ties: the lower id."""
    if count >= vocab_size:
        return np.arange(vocab_size)
    seen = Counter(token_id for sample in samples for token_id in sample.token_ids[sample.prompt_len :])
    ranked = sorted(range(vocab_size), key=lambda token_id: (-seen[token_id], token_id))
    return np.sort(np.array(ranked[:count], dtype=np.int64))
