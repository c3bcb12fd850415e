"""From hidden states to tokens and confidences, slot by slot, each chosen as the target will choose: same noise, same filters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drafter_service.models.dspark.network import DSparkNetwork
from sparkrelay.device.choice import Chooser
from sparkrelay.noise import NoCandidate


class Growing:
    """A block while it grows.

    confidence_logits  of the confidence head, one a token; without a head, `probabilities` says how probable each token was
    """

    def __init__(self, chooser: Chooser, anchor_id: int, token_limit: int, stop_ids: frozenset[int]) -> None:
        self.token_ids: list[int] = []
        self.confidence_logits: list[float] = []
        self.probabilities: list[float] = []
        self.previous_id = anchor_id
        self.over = token_limit < 1
        self._chooser = chooser
        self._token_limit = token_limit
        self._stop_ids = stop_ids

    def take(self, row: npt.NDArray[np.float32], confidence_logit: float, *, want_probability: bool) -> None:
        """Chooses the next token from its logits [vocab]."""
        try:
            if want_probability:
                token_id, probability = self._chooser.choose_with_probability(row)
                self.probabilities.append(probability)
            else:
                token_id = self._chooser.choose(row)
        except NoCandidate:
            self.over = True  # the target's own row may still have one
            return
        self._chooser.append(token_id)
        self.token_ids.append(token_id)
        self.confidence_logits.append(confidence_logit)
        self.previous_id = token_id
        self.over = len(self.token_ids) >= self._token_limit or token_id in self._stop_ids


def grow(network: DSparkNetwork, hidden: Tensor, blocks: Sequence[Growing]) -> None:
    """Fills the blocks from their slots' final hidden states [blocks, gamma, hidden]."""
    head, confidence_head = network.markov_head, network.confidence_head
    base = network.base_logits(hidden).float()
    state = None if head is None else head.first_state(hidden)
    for slot in range(hidden.shape[1]):
        if all(block.over for block in blocks):
            return
        rows, here, previous = base[:, slot], hidden[:, slot], None
        if head is not None and state is not None:
            previous = head.previous(torch.tensor([block.previous_id for block in blocks]))
            features, state = head.step(previous, here, state)
            rows = rows + head.bias(features).float()
        doubts = [0.0] * len(blocks) if confidence_head is None else confidence_head(here, previous).tolist()
        for block, row, doubt in zip(blocks, rows.numpy(), doubts, strict=True):
            if not block.over:
                block.take(row, doubt, want_probability=confidence_head is None)
