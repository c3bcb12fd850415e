"""What a trained draft would have drafted at every position of answers that are known, without any service.

The blocks are the drafting form's: the sequential head goes on from its own tokens, over the whole vocabulary, chosen greedily or
with the very noise that the answer was sampled with. So matches here are matches there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drafter_service.models.dspark.network import DSparkNetwork
from drafter_service.models.dspark.packed import PackedSequence, packed_hidden
from drafter_service.models.mtp.network import MtpNetwork, MtpSequence, sequences_hidden
from drafter_service.training.rounds import Rounds, match_rates, together, walk
from drafter_service.training.samples import Sample
from drafter_service.training.trainees import TrainItem
from sparkrelay import noise
from sparkrelay.device import noise as device_noise

ANCHORS_AT_ONCE = 32
"""Blocks of one pass: their logits over the whole vocabulary must fit into memory."""


class Observed(NamedTuple):
    """Of one sample. matched [anchors]: tokens that match; doubts [anchors, slots]: the confidence head's logits, or none."""

    temperature: float
    matched: npt.NDArray[np.int64]
    doubts: npt.NDArray[np.float64] | None


@torch.inference_mode()
def observe(network: DSparkNetwork | MtpNetwork, sample: Sample, item: TrainItem) -> Observed:
    """The draft at every anchor of the item."""
    if isinstance(network, MtpNetwork):
        return Observed(sample.temperature, _observe_mtp(network, sample, item), None)
    taps = item.states.taps.to(network.norm.weight.dtype)
    matched, doubts = [], []
    for anchors in torch.split(item.anchors, ANCHORS_AT_ONCE):
        hidden = packed_hidden(network, [PackedSequence(taps, item.token_ids, anchors)])
        chosen, doubt = _draft(network, hidden, sample, item.token_ids, anchors)
        matched.append(_matches(chosen, item.token_ids, anchors))
        doubts.append(doubt)
    with_head = network.confidence_head is not None
    return Observed(
        sample.temperature,
        torch.cat(matched).numpy(),
        torch.cat(doubts).double().numpy() if with_head else None,
    )


def _draft(
    network: DSparkNetwork, hidden: Tensor, sample: Sample, token_ids: Tensor, anchors: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens and confidence logits [anchors, slots], each slot after the one chosen before it."""
    head = network.markov_head
    base = network.base_logits(hidden).float()
    state = None if head is None else head.first_state(hidden)
    before, chosen, doubts = token_ids[anchors], [], []
    for slot in range(hidden.shape[1]):
        rows, previous = base[:, slot], None
        if head is not None and state is not None:
            previous = head.previous(before)
            features, state = head.step(previous, hidden[:, slot], state)
            rows = rows + head.bias(features).float()
        if network.confidence_head is not None:
            doubts.append(network.confidence_head(hidden[:, slot], previous))
        before = _choose(rows, sample, anchors + slot + 1)
        chosen.append(before)
    return torch.stack(chosen, dim=1), torch.stack(doubts, dim=1) if doubts else hidden.new_zeros(0)


def _observe_mtp(network: MtpNetwork, sample: Sample, item: TrainItem) -> npt.NDArray[np.int64]:
    sequence = MtpSequence(item.states.final[:-1].to(network.norm.weight.dtype), item.token_ids[1:-1])
    hidden = sequences_hidden(network, [sequence])[item.anchors - 1]
    chosen = _choose(network.base_logits(hidden).float(), sample, item.anchors + 1)
    found: npt.NDArray[np.int64] = _matches(chosen[:, None], item.token_ids, item.anchors).numpy()
    return found


def _choose(rows: Tensor, sample: Sample, positions: Tensor) -> Tensor:
    """int64 [n]: the tokens at these positions, from logits [n, vocab] and the answer's own rule and noise."""
    if sample.temperature == 0.0:
        return device_noise.greedy(rows)
    keys = device_noise.keys([sample.seed] * len(rows), positions.tolist())
    inverse_t = torch.full((len(rows),), float(noise.inverse_temperature(sample.temperature)))
    return device_noise.choose(rows, inverse_t, keys)


def _matches(chosen: Tensor, token_ids: Tensor, anchors: Tensor) -> Tensor:
    """int64 [anchors]: how many tokens [anchors, slots] are the answer's; what would stand behind its end matches nothing."""
    positions = anchors[:, None] + 1 + torch.arange(chosen.shape[1])
    known = positions < len(token_ids)
    wanted = token_ids[positions.clamp(max=len(token_ids) - 1)]
    return ((chosen == wanted) & known).long().cumprod(dim=1).sum(dim=1)


class Summary(NamedTuple):
    """Of some answers: accepted length of their rounds, and P(slot k matches given that all before it match)."""

    rounds: Rounds
    rates: list[float]


def summarize(observed: Iterable[Observed], slot_count: int) -> Summary:
    """All answers together."""
    matched = [one.matched.tolist() for one in observed]
    return Summary(
        together(walk(values) for values in matched),
        match_rates((m for values in matched for m in values), slot_count),
    )


def confidence_data(observed: Sequence[Observed]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Logits [n, slots] and matches [n] of all anchors, for `calibrate`. ValueError if the draft has no confidence head."""
    doubts = [one.doubts for one in observed if one.doubts is not None]
    if not doubts:
        raise ValueError("this draft has no confidence head")
    return np.concatenate(doubts), np.concatenate([one.matched for one in observed])
