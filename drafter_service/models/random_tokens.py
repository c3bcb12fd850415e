"""For tests: a drafter that is right by chance. Each token is a coin's choice between what prompt lookup says and any id.

So of every run some tokens are accepted and some rejected, whatever the target.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from drafter_service.models import DraftedBlock, DraftRequest, LoadedModel, ModelOptions
from drafter_service.models.ngram import NgramModel
from sparkrelay.frames import Fingerprint


class RandomModel:
    """See the module. The ids are those the session has shown to exist: 0 up to its largest. Confidences are random too."""

    def __init__(self, lookup: NgramModel, seed: int) -> None:
        self.fingerprint = Fingerprint(block_size=lookup.fingerprint.block_size, proposal_kind="random")
        self.vocab_size = 0
        self._lookup = lookup
        self._random = random.Random(seed)

    def draft(self, requests: Sequence[DraftRequest]) -> list[DraftedBlock]:
        guesses = self._lookup.draft(requests)
        return [self._shuffled(request, guess) for request, guess in zip(requests, guesses, strict=True)]

    def forget(self, session_key: int) -> None:
        self._lookup.forget(session_key)

    def _shuffled(self, request: DraftRequest, guess: DraftedBlock) -> DraftedBlock:
        dice, largest = self._random, max(request.ids)
        token_ids = [token if dice.random() < 0.5 else dice.randint(0, largest) for token in guess.token_ids]
        return DraftedBlock(token_ids, [dice.random() for _ in token_ids])


def load(options: ModelOptions) -> LoadedModel:
    """The seed alone decides the coins."""
    lookup = NgramModel(options.block_size, options.ngram_min, options.ngram_max)
    return LoadedModel(RandomModel(lookup, options.seed))
