"""Any causal language model with the target's tokenizer as the draft model, one token after another.

All sessions that want a block are drafted together: a first ragged forward reads what each has not read yet and gives
its first token, every further forward gives each session one more. Tokens are chosen by the very lines that the
verifier chooses with, under the turn's own sampling and noise; so the target as its own draft model is right every time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast, get_args

import numpy as np
import torch

from drafter_service.models import (
    NOTHING,
    CannotLoad,
    DraftedBlock,
    DraftRequest,
    LoadedModel,
    ModelOptions,
    TurnRules,
)
from drafter_service.models.ngram import common_prefix
from sparkrelay.device.choice import Chooser
from sparkrelay.device.flat_batch import FlatBatch, FlatEntry
from sparkrelay.device.flat_model import DtypeName, FlatCausalLM, UnsupportedModel
from sparkrelay.device.slab import BLOCK_TOKENS, SlabState, round_up
from sparkrelay.frames import Fingerprint
from sparkrelay.noise import NOISE_VERSION, FloatRow, NoCandidate
from sparkrelay.store import StoreError, resolve

READ_ROWS = 128
"""Unread ids in one call beyond which sessions wait for the next: a long prompt must not hold up everybody's blocks."""
_FEW_ROWS = 32
"""A session with at most so many unread ids is in the middle of a turn and never waits."""


class FlatModel(Protocol):
    """What this file uses of FlatCausalLM."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_limit(self) -> int: ...

    def new_state(self) -> SlabState: ...

    def forward(self, batch: FlatBatch) -> torch.Tensor: ...


@dataclass(slots=True)
class _Cache:
    """A session at this model.

    state    keys and values of positions 0 .. state.length - 1
    ids      the ids at those positions
    chooser  of the turn with these rules; stands behind the committed ids of the last call
    """

    state: SlabState
    ids: list[int] = field(default_factory=list)
    chooser: Chooser | None = None
    rules: TurnRules | None = None


class _Draft:
    """One session's block while it grows. next_ids: what the model must read before it can give the next token."""

    def __init__(self, request: DraftRequest, cache: _Cache, chooser: Chooser) -> None:
        self.cache = cache
        self.next_ids = list(request.ids[cache.state.length :])
        self._token_ids: list[int] = []
        self._confidences: list[float] = []
        self.over = False
        self._chooser = chooser
        self._base_len = len(request.ids)
        self._token_limit = request.token_limit
        self._stop_ids = request.turn.stop_ids

    def has_read(self, count: int) -> None:
        """The first `count` of next_ids are in the state."""
        self.cache.ids += self.next_ids[:count]
        del self.next_ids[:count]

    def take(self, row: FloatRow) -> None:
        """Adds the token that follows, from its logits: [vocab] float32."""
        try:
            token_id, probability = self._chooser.choose_with_probability(row)
        except NoCandidate:
            self.over = True  # the target's own row may still have one
            return
        self._chooser.append(token_id)
        self._token_ids.append(token_id)
        self._confidences.append(probability)
        self.next_ids = [token_id]
        self.over = len(self._token_ids) >= self._token_limit or token_id in self._stop_ids

    def finish(self) -> DraftedBlock:
        """The block; the chooser goes back behind the committed ids."""
        self._chooser.truncate(self._base_len)
        return DraftedBlock(self._token_ids, self._confidences)


class CausalModel:
    """See the module.

    state_limit_bytes  of all sessions' keys and values; the least recently drafted sessions go first
    bytes_per_token    of keys and values of one position
    """

    def __init__(
        self,
        model: FlatModel,
        block_size: int,
        tokenizer_hash: str,
        state_limit_bytes: int,
        bytes_per_token: int,
    ) -> None:
        self._model = model
        self._caches: OrderedDict[int, _Cache] = OrderedDict()
        self._state_limit_bytes = state_limit_bytes
        self._bytes_per_token = bytes_per_token
        self.vocab_size = model.vocab_size
        self.fingerprint = Fingerprint(
            tokenizer_hash=tokenizer_hash,
            # Models of one tokenizer may pad their embeddings differently; without one only the size tells them apart.
            vocab_size=0 if tokenizer_hash else model.vocab_size,
            block_size=block_size,
            noise_versions=(NOISE_VERSION,),
            proposal_kind="causal_lm",
        )

    @property
    def state_bytes(self) -> int:
        """Memory of all sessions' keys and values."""
        return sum(cache.state.byte_count for cache in self._caches.values())

    def draft(self, requests: Sequence[DraftRequest]) -> list[DraftedBlock | None]:
        drafts = self._admit(requests)
        running = self._read(list(drafts.values()))
        read = set(running)
        while running := [draft for draft in running if not draft.over]:
            self._forward([(draft, 1) for draft in running])
        answers: list[DraftedBlock | None] = []
        for request in requests:
            draft = drafts.get(request.session_key)
            if draft is None:
                answers.append(NOTHING)
            else:
                answers.append(draft.finish() if draft in read else None)
        return answers

    def forget(self, session_key: int) -> None:
        cache = self._caches.pop(session_key, None)
        if cache is not None:
            cache.state.close()

    # ---- before the first forward --------------------------------------------------------------------------------------------

    def _admit(self, requests: Sequence[DraftRequest]) -> dict[int, _Draft]:
        """The sessions, by key, that fit into the memory and the model's context; others make room for them."""
        fitting: list[DraftRequest] = []
        promised_bytes = 0
        for request in requests:
            end = len(request.ids) + request.token_limit
            needed_bytes = round_up(end, BLOCK_TOKENS) * self._bytes_per_token
            if end <= self._model.context_limit and promised_bytes + needed_bytes <= self._state_limit_bytes:
                promised_bytes += needed_bytes
                fitting.append(request)
        self._evict(self._state_limit_bytes - promised_bytes, {request.session_key for request in fitting})
        return {request.session_key: self._begin(request) for request in fitting}

    def _evict(self, limit_bytes: int, needed: set[int]) -> None:
        """Forgets sessions that are not drafted now, the least recently drafted first, until these take at most the limit."""
        others = [(key, cache.state.byte_count) for key, cache in self._caches.items() if key not in needed]
        excess = sum(size for _, size in others) - limit_bytes
        for key, size in others:
            if excess <= 0:
                return
            self.forget(key)
            excess -= size

    def _begin(self, request: DraftRequest) -> _Draft:
        key, ids = request.session_key, request.ids
        cache = self._caches.get(key)
        if cache is None:
            cache = self._caches[key] = _Cache(self._model.new_state())
        self._caches.move_to_end(key)
        # The anchor is read even if it was read before: its row gives the first token.
        common = min(common_prefix(cache.ids, ids), len(ids) - 1)
        cache.state.rewind(common)
        del cache.ids[common:]
        return _Draft(request, cache, _chooser_behind(cache, request))

    # ---- forwards ------------------------------------------------------------------------------------------------------------

    def _read(self, drafts: Sequence[_Draft]) -> list[_Draft]:
        """The first forward: every session reads, as far as READ_ROWS goes. Those that have read all get their first token."""
        left = READ_ROWS
        parts: list[tuple[_Draft, int]] = []
        for draft in sorted(drafts, key=lambda draft: len(draft.next_ids)):
            count = len(draft.next_ids)
            if count > _FEW_ROWS:
                count = min(count, left)
                left -= count
            if count:
                parts.append((draft, count))
        return self._forward(parts)

    def _forward(self, parts: Sequence[tuple[_Draft, int]]) -> list[_Draft]:
        """One forward: each session reads `count` of its next ids. Returns those that have read all; they got a token."""
        if not parts:
            return []
        token_ids: list[int] = []
        entries: list[FlatEntry] = []
        kept_rows: list[int] = []
        whole: list[_Draft] = []
        for draft, count in parts:
            token_ids += draft.next_ids[:count]
            entries.append(FlatEntry(draft.cache.state, draft.cache.state.length, count))
            if count == len(draft.next_ids):
                kept_rows.append(len(token_ids) - 1)
                whole.append(draft)
        batch = FlatBatch(
            np.array(token_ids, dtype=np.int64), tuple(entries), np.array(kept_rows, dtype=np.int64)
        )
        rows = self._model.forward(batch).cpu().numpy()
        for draft, count in parts:
            draft.has_read(count)
        for draft, row in zip(whole, rows, strict=True):
            draft.take(row)
        return whole


def _chooser_behind(cache: _Cache, request: DraftRequest) -> Chooser:
    """A chooser that stands behind the committed ids. It is kept through a turn: counting a long session anew is dear."""
    rules, ids = request.turn, request.ids
    if cache.chooser is None or cache.rules is not rules:
        cache.rules = rules
        cache.chooser = Chooser(rules.sampling, rules.stop_ids, ids, rules.output_start)
    else:
        cache.chooser.extend(ids[cache.chooser.length :])
    return cache.chooser


def load(options: ModelOptions) -> LoadedModel:
    """Loads the model named by `model` from the store, a folder or the hub. CannotLoad tells why not."""
    if not options.model:
        raise CannotLoad("model: the kind causal_lm needs one; name a catalogue model, a folder or a hub id")
    if options.dtype not in get_args(DtypeName):
        raise CannotLoad(f"dtype: is {options.dtype!r}; choose one of {', '.join(get_args(DtypeName))}")
    torch.set_num_threads(options.threads)
    try:
        path = resolve(options.model).path
        flat = FlatCausalLM.load(path, dtype=cast(DtypeName, options.dtype), exact=options.exact)
    except (StoreError, UnsupportedModel, OSError) as error:
        raise CannotLoad(f"model: {error}") from error
    return LoadedModel(
        CausalModel(
            flat,
            options.block_size,
            tokenizer_hash_of(path),
            options.state_memory_mib * 2**20,
            flat.layout.bytes_per_token(flat.dtype),
        )
    )


def tokenizer_hash_of(path: Path) -> str:
    """sha256 of the folder's tokenizer.json, hex; empty without one."""
    file = path / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
