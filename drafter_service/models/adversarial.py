"""For tests: a drafter that lies about everything. No lie may change one token of anybody's text, nor touch another session.

Two kinds of lies. Those of the model are ordinary blocks with wrong ids and absurd confidences; a bit of truth is mixed
in, so that the verifier goes on listening. Those on the wire (`WireLies`) break the rules: wrong places, unknown
handles, blocks sent twice, blocks of turns that are over, ids that do not exist, blocks without end. They cost the
membership, so each begins truthfully.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

from drafter_service.models import DraftedBlock, DraftRequest, LoadedModel, ModelOptions
from drafter_service.models.ngram import NgramModel
from sparkrelay.frames import Block, Fingerprint

TRUTHFUL_BLOCKS = 8
"""Blocks of a membership before its first lie on the wire."""
_LIE_ON_THE_WIRE = 1 / 16
_KEPT_BLOCKS = 64
_CONFIDENCES = (1.0, 0.0, -1.0, 2.0, math.nan, math.inf, -math.inf, 1e-300)
_INT32_MAX = 2**31 - 1


class AdversarialModel:
    """Blocks whose ids are right, wrong from somewhere on, or all wrong, with confidences that mean nothing."""

    def __init__(self, lookup: NgramModel, seed: int) -> None:
        self.fingerprint = Fingerprint(block_size=lookup.fingerprint.block_size, proposal_kind="adversarial")
        self.vocab_size = 0
        self._lookup = lookup
        self._random = random.Random(seed)

    def draft(self, requests: Sequence[DraftRequest]) -> list[DraftedBlock]:
        guesses = self._lookup.draft(requests)
        return [self._lie(request, guess) for request, guess in zip(requests, guesses, strict=True)]

    def forget(self, session_key: int) -> None:
        self._lookup.forget(session_key)

    def _lie(self, request: DraftRequest, guess: DraftedBlock) -> DraftedBlock:
        dice, largest = self._random, max(request.ids)
        true_count = dice.choice((0, 1, len(guess.token_ids)))
        lies = [
            dice.choice((0, largest, dice.randint(0, largest)))
            for _ in range(request.token_limit - true_count)
        ]
        token_ids = [*guess.token_ids[:true_count], *lies]
        return DraftedBlock(token_ids, [dice.choice(_CONFIDENCES) for _ in token_ids])


class WireLies:
    """Rewrites blocks just before they are sent. Everything it makes can be encoded; next to nothing of it should be believed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._sent: Counter[int] = Counter()
        self._earlier: list[Block] = []

    def __call__(self, blocks: Sequence[Block]) -> list[Block]:
        told: list[Block] = []
        for block in blocks:
            self._sent[block.handle] += 1
            if self._sent[block.handle] > TRUTHFUL_BLOCKS and self._random.random() < _LIE_ON_THE_WIRE:
                told += self._lies_about(block)
            else:
                told.append(block)
        self._earlier = [*self._earlier, *blocks][-_KEPT_BLOCKS:]
        return told

    def _lies_about(self, block: Block) -> list[Block]:
        dice = self._random
        base_len, handle = block.base_len, block.handle
        elsewhere = (base_len + 1, base_len - 1, 1, 0, -1, _INT32_MAX)
        return dice.choice(
            (
                [block._replace(base_len=dice.choice(elsewhere))],
                [block._replace(handle=dice.choice((0, -1, handle + 1000, _INT32_MAX)))],
                [_with_ids(block, [dice.choice((_INT32_MAX, -1, -(2**31)))] * len(block.token_ids))],
                [_with_ids(block, list(block.token_ids) * 100)],
                [
                    block._replace(
                        assumed_count=dice.choice((1, -1, _INT32_MAX)),
                        round=-5,
                        draft_us=-1,
                        queue_us=_INT32_MAX,
                    )
                ],
                [block, block],
                [block, dice.choice(self._earlier)],
                [dice.choice(self._earlier)._replace(base_len=base_len)],
            )
        )


def _with_ids(block: Block, token_ids: Sequence[int]) -> Block:
    return block._replace(token_ids=tuple(token_ids), confidences=b"\xff" * len(token_ids))


def load(options: ModelOptions) -> LoadedModel:
    """The seed alone decides which lie is told when."""
    lookup = NgramModel(options.block_size, options.ngram_min, options.ngram_max)
    return LoadedModel(AdversarialModel(lookup, options.seed), WireLies(options.seed))
