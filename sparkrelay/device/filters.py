"""The filters between a row of logits and the choice of a token, in their one fixed order.

    logit bias, min_tokens mask, repetition / presence / frequency penalties, grammar mask, temperature,
    top-k, top-p, min-p

The order and the meaning of each are those of Hugging Face transformers' logits processors, with two
differences that make the result a function of the row: tokens tied with the last one kept are kept too (top-p
included), and min-p compares logits, (l - l_max)/T >= ln(min_p), where transformers compares two rounded
probabilities.

One row at a time, in numpy: a row's result never depends on which other rows were checked with it. A filter
that is off costs nothing. The vocabulary is never sorted.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparkrelay import noise
from sparkrelay.device.token_counts import TokenCounts
from sparkrelay.noise import FloatRow, IdRow
from sparkrelay.sampling import Sampling

BoolRow = npt.NDArray[np.bool_]

NUCLEUS_SORTED = 1024  # at most so many logits are ever sorted
_MASKED = np.float32(-np.inf)


class NothingAllowed(noise.NoCandidate):
    """The grammar leaves no token: what was written cannot be continued to what was asked for."""


@dataclass(frozen=True, slots=True)
class Support:
    """The tokens that may be chosen.

    ids     [n] int64, ascending; None: the whole vocabulary, 0 .. n-1
    logits  [n] float32, after bias, masks and penalties, before the division by the temperature. May be the
            row itself: read only.
    """

    ids: IdRow | None
    logits: FloatRow


def needs_counts(sampling: Sampling) -> bool:
    """Whether any penalty is on, so that the history must be counted."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def filter_row(
    logits: FloatRow,
    sampling: Sampling,
    counts: TokenCounts | None,
    stop_ids: Collection[int],
    produced_count: int,
    mask: BoolRow | None = None,
) -> Support:
    """What is left of a row after every filter.

    logits          [vocab] float32, as the model gave them; never written to
    counts          of the sequence before this token; may be None where `needs_counts` is False
    stop_ids        ids that min_tokens masks
    produced_count  output tokens of this turn before this one
    mask            [vocab] bool, True where the grammar allows the token, at least one; None allows all

    Greedy decoding skips temperature, top-k, top-p and min-p: they never remove the best token.
    Raises noise.NoCandidate where top-k, top-p or min-p meet a row without a finite best logit.
    """
    row = adjusted_row(logits, sampling, counts, stop_ids, produced_count, mask)
    if sampling.greedy or not _narrows(sampling):
        return Support(None, row)
    kept = np.flatnonzero(_kept(row, sampling))
    return Support(kept, row[kept])


def adjusted_row(
    logits: FloatRow,
    sampling: Sampling,
    counts: TokenCounts | None,
    stop_ids: Collection[int],
    produced_count: int,
    mask: BoolRow | None = None,
) -> FloatRow:
    """The filters that change single logits: bias, min_tokens, penalties, grammar. The row itself if none is on.

    Where the grammar allows nothing but stop ids the text is complete, and min_tokens gives way: there is no other token.
    """
    too_early_to_stop = produced_count < sampling.min_tokens and len(stop_ids) > 0
    if too_early_to_stop and mask is not None:
        too_early_to_stop = not allows_only(mask, stop_ids)
    penalised = needs_counts(sampling)
    if not (sampling.logit_bias or too_early_to_stop or penalised or mask is not None):
        return logits
    row = logits.copy()
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        np.add.at(row, np.array(ids, dtype=np.int64), np.array(biases, dtype=np.float32))
    if too_early_to_stop:
        row[np.fromiter(stop_ids, dtype=np.int64)] = _MASKED
    if penalised:
        if counts is None:
            raise ValueError("counts: is None; penalties need the counts of the sequence")
        _penalise(row, sampling, counts)
    if mask is not None:
        np.copyto(row, _MASKED, where=~mask)
    return row


def allows_only(mask: BoolRow, token_ids: Collection[int]) -> bool:
    """Whether a mask allows no token but these."""
    among_these = np.count_nonzero(mask[np.fromiter(token_ids, dtype=np.int64)])
    return bool(among_these == np.count_nonzero(mask))


def _penalise(row: FloatRow, sampling: Sampling, counts: TokenCounts) -> None:
    """In place: repetition over the whole sequence, then presence and frequency over this turn's output."""
    if sampling.repetition_penalty != 1.0:
        ids = counts.sequence_ids
        penalty = np.float32(sampling.repetition_penalty)
        seen = row[ids]
        row[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
    if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
        ids, occurrences = counts.output
        frequency = np.float32(sampling.frequency_penalty) * occurrences
        row[ids] -= np.float32(sampling.presence_penalty) + frequency


def _narrows(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _kept(row: FloatRow, sampling: Sampling) -> BoolRow:
    """[vocab] bool: what top-k, top-p and min-p leave.

    Each of them keeps the tokens from some scaled logit upwards (that is what keeping ties means), so the
    three together are one threshold, and the vocabulary is compared once.
    """
    l_max = row.max()
    if not math.isfinite(l_max):
        raise noise.NoCandidate(
            f"logits: the best one is {l_max}; a row needs a finite best logit and no NaN"
        )
    with np.errstate(over="ignore"):
        scaled = (row - l_max) * noise.inverse_temperature(sampling.temperature)
    lowest = np.finfo(np.float32).min  # finite: a masked token is never kept
    left = scaled
    if 0 < sampling.top_k < scaled.size:
        cut = scaled.size - sampling.top_k
        lowest = max(lowest, np.partition(scaled, cut)[cut])
        left = scaled[scaled >= lowest]
    if sampling.top_p < 1.0:
        lowest = max(lowest, nucleus_edge(left, sampling.top_p))
    if sampling.min_p > 0.0:
        lowest = max(lowest, np.float32(math.log(sampling.min_p)))
    kept: BoolRow = scaled >= lowest
    return kept


def nucleus_edge(scaled: FloatRow, top_p: float) -> np.float32:
    """The lowest scaled logit of the smallest best set whose probability reaches top_p.

    scaled  [n] float32, (l - l_max)/T: the best is 0; the probabilities are its softmax over all n

    A quickselect by weight: the candidates are split into a better and a worse part, and the part in which the goal is
    reached is split again, until it is small enough to sort. The first split takes the few best, where it mostly is.
    """
    to_reach = top_p * float(np.exp(scaled).sum(dtype=np.float64))
    candidates, better_count = scaled, NUCLEUS_SORTED
    while candidates.size > NUCLEUS_SORTED:
        split = np.partition(candidates, candidates.size - better_count)
        worse, better = split[:-better_count], split[-better_count:]
        weight = float(np.exp(better).sum(dtype=np.float64))
        if weight >= to_reach:
            candidates = better
        else:
            candidates = worse
            to_reach -= weight
        better_count = candidates.size // 2
    best_first = np.sort(candidates)[::-1]
    reached = np.exp(best_first).astype(np.float64).cumsum()
    last_kept = min(int(np.searchsorted(reached, to_reach)), best_first.size - 1)
    return np.float32(best_first[last_kept])
