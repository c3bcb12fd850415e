"""For benchmarks: a text that repeats itself for ever, predicted at no cost, so that what is measured is the house around it.

The period is looked up once in a session; as long as the last id is what the period says, a block is one slice of the ids.
"""

from __future__ import annotations

from collections.abc import Sequence

from drafter_service.models import NOTHING, DraftedBlock, DraftRequest, LoadedModel, ModelOptions
from sparkrelay.frames import Fingerprint

_SURE = tuple((1.0,) * count for count in range(64))


class CycleModel:
    """See the module. Says nothing while the last id has not occurred before."""

    def __init__(self, block_size: int) -> None:
        self.fingerprint = Fingerprint(block_size=block_size, proposal_kind="cycle")
        self.vocab_size = 0
        self._periods: dict[int, int] = {}

    def draft(self, requests: Sequence[DraftRequest]) -> list[DraftedBlock]:
        return [self._draft_one(request) for request in requests]

    def forget(self, session_key: int) -> None:
        self._periods.pop(session_key, None)

    def _draft_one(self, request: DraftRequest) -> DraftedBlock:
        ids, limit = request.ids, request.token_limit
        length = len(ids)
        period = self._periods.get(request.session_key, 0)
        if not 0 < period < length or ids[-1 - period] != ids[-1]:
            period = _distance_to_same(ids)
            if not period:
                return NOTHING
            self._periods[request.session_key] = period
        start = length - period
        token_ids = ids[start : start + limit]
        while period < limit and len(token_ids) < limit:
            token_ids = [*token_ids, *token_ids][:limit]
        return DraftedBlock(token_ids, _SURE[limit])


def _distance_to_same(ids: Sequence[int]) -> int:
    """How far back the last id occurred before; 0 if it did not."""
    last = ids[-1]
    return next((back for back in range(1, len(ids)) if ids[-1 - back] == last), 0)


def load(options: ModelOptions) -> LoadedModel:
    """Needs nothing but the block's size."""
    return LoadedModel(CycleModel(options.block_size))
