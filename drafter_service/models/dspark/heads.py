"""The sequential head and the confidence head: what makes parallel guesses a sentence, and says how far to trust it.

The parallel pass cannot know which token its neighbour slot will be. The sequential head goes through the block from left to
right and adds to the base logits of slot k a bias that depends on the token before: `logits_k = U_k + W2(features_k)`, with
`markov_rank` features that are made of W1[x_{k-1}] and, in two of the three kinds, of the slot's hidden state.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from drafter_service.models.dspark.config import DraftConfig


class SequentialHead(nn.Module):
    """The vanilla head: features are W1[previous token]. The other kinds override `step`.

    A state goes from slot to slot; only the rnn head has one, the others hand it on empty.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.rank = config.markov_rank
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.vocab_size, bias=False)

    def previous(self, token_ids: Tensor) -> Tensor:
        """W1 of the tokens before: [...] -> [..., rank]."""
        vectors: Tensor = self.markov_w1(token_ids)
        return vectors

    def first_state(self, hidden: Tensor) -> Tensor:
        """The state before the first slot of blocks whose hidden states are [blocks, slots, hidden]."""
        return hidden.new_zeros(hidden.shape[0], 0)

    def step(self, previous: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One slot of some blocks: features [blocks, rank] and the next state, of W1[x] [blocks, rank] and h [blocks, hidden]."""
        return previous, state

    def bias(self, features: Tensor, kept_ids: Tensor | None = None) -> Tensor:
        """What is added to the base logits: [..., vocab], or of the tokens `kept_ids` alone."""
        if kept_ids is not None:
            return nn.functional.linear(features, self.markov_w2.weight[kept_ids])
        bias: Tensor = self.markov_w2(features)
        return bias

    def block_features(self, previous: Tensor, hidden: Tensor) -> Tensor:
        """All slots of blocks whose tokens are known: [blocks, slots, rank] of W1[x] alike and h [blocks, slots, hidden]."""
        state = self.first_state(hidden)
        features = []
        for slot in range(hidden.shape[1]):
            feature, state = self.step(previous[:, slot], hidden[:, slot], state)
            features.append(feature)
        return torch.stack(features, dim=1)


class VanillaHead(SequentialHead):
    """logits_k = U_k + W2 W1[x_{k-1}]"""

    def block_features(self, previous: Tensor, hidden: Tensor) -> Tensor:
        return previous


class GatedHead(SequentialHead):
    """features = sigmoid(gate [h ; W1[x]]) * W1[x]"""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size + config.markov_rank, config.markov_rank)

    def step(self, previous: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self._gated(previous, hidden), state

    def block_features(self, previous: Tensor, hidden: Tensor) -> Tensor:
        return self._gated(previous, hidden)

    def _gated(self, previous: Tensor, hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.gate_proj(torch.cat([hidden, previous], dim=-1))) * previous


class RnnHead(SequentialHead):
    """A state of `rank` numbers, zero at the block's start: one linear of [s ; W1[x] ; h] gives gate, candidate and output."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        self.joint_proj = nn.Linear(2 * config.markov_rank + config.hidden_size, 3 * config.markov_rank)

    def first_state(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(hidden.shape[0], self.rank)

    def step(self, previous: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        joint = self.joint_proj(torch.cat([state, previous, hidden], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)


_KINDS = {"vanilla": VanillaHead, "gated": GatedHead, "rnn": RnnHead}


def sequential_head(config: DraftConfig) -> SequentialHead:
    """The head of the configuration's kind; only for a rank above 0."""
    return _KINDS[config.markov_head_type](config)


class ConfidenceHead(nn.Module):
    """P(token k matches given that all before it match), of the slot's hidden state and the token before it, never of itself."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self._with_markov = config.confidence_head_with_markov
        width = config.hidden_size + (config.markov_rank if self._with_markov else 0)
        self.proj = nn.Linear(width, 1)

    def forward(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """Logits [...] of h [..., hidden] and W1[x] [..., rank]."""
        rows = torch.cat([hidden, cast(Tensor, previous)], dim=-1) if self._with_markov else hidden
        logits: Tensor = self.proj(rows)
        return logits.squeeze(-1)
