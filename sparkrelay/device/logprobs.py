"""Log-probabilities for the user: log_softmax of the model's own logits in float32, before every filter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one position.

    chosen  of the token that was chosen
    top     (id, log-probability) of the most likely tokens, best first, lowest id among equals
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def logprobs_row(raw_logits: npt.NDArray[np.float32], chosen_id: int, top_n: int) -> TokenLogprobs:
    """The log-probability of a chosen token and of the `top_n` most likely ones.

    raw_logits  [vocab] float32, of the row that the token was chosen from (also when it came from an accepted
                block)
    top_n       0 or more; no more than the vocabulary has are returned

    A row is summed alone, in one order, so its numbers do not depend on what else was in the batch.
    """
    shifted = raw_logits - raw_logits.max()
    logprobs = shifted - np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))
    top_ids = _best_ids(logprobs, min(top_n, logprobs.size))
    return TokenLogprobs(float(logprobs[chosen_id]), tuple((i, float(logprobs[i])) for i in top_ids))


def _best_ids(values: npt.NDArray[np.float32], count: int) -> list[int]:
    """The ids of the `count` highest values, best first, lowest id among equals, by partial selection."""
    if count == 0:
        return []
    cut = values.size - count
    candidates = np.flatnonzero(values >= np.partition(values, cut)[cut])
    order = np.argsort(-values[candidates], kind="stable")[:count]
    return [int(i) for i in candidates[order]]
