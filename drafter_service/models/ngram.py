"""Prompt lookup: what followed the last few ids when they last occurred in this session. No weights.

The index grows with the session and never looks back: for each position and each n it holds where the n-gram that ends there
occurred before. So the longest match of the current end is read off directly, whatever the prompt's length, and a cut takes the
entries back one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

from drafter_service.models import DraftedBlock, DraftRequest, LoadedModel, ModelOptions
from drafter_service.models.hit_rates import HitRates, Label
from sparkrelay.frames import Fingerprint

NOWHERE = -1


class NgramIndex:
    """Where the n-grams of one growing sequence occurred, for n from n_min to n_max."""

    __slots__ = ("_before", "_latest", "_n_max", "_n_min", "ids")

    def __init__(self, n_min: int, n_max: int) -> None:
        self._n_min = n_min
        self._n_max = n_max
        self.ids: list[int] = []
        # By n - n_min. latest: n-gram |-> its last position; before: position |-> where its n-gram was before that.
        self._latest: list[dict[tuple[int, ...], int]] = [{} for _ in range(n_min, n_max + 1)]
        self._before: list[list[int]] = [[] for _ in range(n_min, n_max + 1)]

    def extend(self, token_ids: Sequence[int]) -> None:
        """Appends ids."""
        ids = self.ids
        start = len(ids)
        ids += token_ids
        for n, latest, before in zip(
            range(self._n_min, self._n_max + 1), self._latest, self._before, strict=True
        ):
            for end in range(start, len(ids)):
                if end + 1 < n:
                    before.append(NOWHERE)
                    continue
                gram = tuple(ids[end + 1 - n : end + 1])
                before.append(latest.get(gram, NOWHERE))
                latest[gram] = end

    def truncate(self, length: int) -> None:
        """Takes back the ids from `length` on."""
        ids = self.ids
        for n, latest, before in zip(
            range(self._n_min, self._n_max + 1), self._latest, self._before, strict=True
        ):
            for end in range(len(ids) - 1, max(length, n - 1) - 1, -1):
                gram = tuple(ids[end + 1 - n : end + 1])
                if before[end] == NOWHERE:
                    del latest[gram]
                else:
                    latest[gram] = before[end]
            del before[length:]
        del ids[length:]

    def longest_match(self) -> tuple[int, int]:
        """(n, position behind the match) for the longest n-gram at the end that occurred before; its most recent occurrence.

        (0, 0) if there is none.
        """
        for n in range(self._n_max, self._n_min - 1, -1):
            before = self._before[n - self._n_min]
            if before and before[-1] != NOWHERE:
                return n, before[-1] + 1
        return 0, 0

    def continuation(self, start: int, count: int) -> list[int]:
        """`count` ids from `start` on; past the end the copy goes on with itself, as a loop in the text does."""
        ids = self.ids
        found = ids[start : start + count]
        period = len(ids) - start
        while len(found) < count:
            found.append(found[-period])
        return found

    def catch_up(self, ids: Sequence[int]) -> None:
        """Makes the index that of `ids`, keeping the longest common prefix."""
        common = common_prefix(self.ids, ids)
        self.truncate(common)
        self.extend(ids[common:])


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids are equal."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])


class _Session:
    """Index and the last block's label of one session."""

    __slots__ = ("cut_count", "index", "label")

    def __init__(self, index: NgramIndex, cut_count: int) -> None:
        self.index = index
        self.cut_count = cut_count
        self.label: Label | None = None


class NgramModel:
    """See the module. Confidences are how often a match of that length went on to be right so far.

    Where nothing matches it repeats the last id once, with the little confidence that this has earned: a verifier that asked for
    a block is better served by a poor one than by waiting for one that never comes.
    """

    def __init__(self, block_size: int, n_min: int, n_max: int) -> None:
        self.fingerprint = Fingerprint(block_size=block_size, proposal_kind="ngram")
        self.vocab_size = 0
        self._n_min = n_min
        self._n_max = n_max
        self._sessions: dict[int, _Session] = {}
        self._rates = HitRates(n_max)

    def draft(self, requests: Sequence[DraftRequest]) -> list[DraftedBlock]:
        return [self._draft_one(request) for request in requests]

    def forget(self, session_key: int) -> None:
        self._sessions.pop(session_key, None)

    def _draft_one(self, request: DraftRequest) -> DraftedBlock:
        session = self._caught_up(request)
        index = session.index
        n, start = index.longest_match()
        token_ids = index.continuation(start, request.token_limit) if n else [index.ids[-1]]
        session.label = Label(n, len(index.ids), token_ids)
        return DraftedBlock(token_ids, self._rates.confidences(n, len(token_ids)))

    def _caught_up(self, request: DraftRequest) -> _Session:
        """The session's cache, brought to the request's ids; what was committed labels the last block."""
        ids = request.ids
        session = self._sessions.get(request.session_key)
        if session is None:
            session = self._sessions[request.session_key] = _Session(
                NgramIndex(self._n_min, self._n_max), request.cut_count
            )
        if session.cut_count != request.cut_count:
            session.cut_count = request.cut_count
            session.label = None
            session.index.catch_up(ids)
            return session
        session.index.extend(ids[len(session.index.ids) :])
        if session.label is not None:
            self._rates.learn(session.label, ids)
        return session


def load(options: ModelOptions) -> LoadedModel:
    """Prompt lookup needs nothing but its lengths."""
    return LoadedModel(NgramModel(options.block_size, options.ngram_min, options.ngram_max))
