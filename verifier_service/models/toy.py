"""Targets without weights: they ship, so that the whole house runs and is tested on any machine.

`toy`       small, surprising enough to be a language, predictable enough that an n-gram drafter is right now and then. Its
            logits come from what it remembers, so an engine that rewinds, resizes or positions wrongly gets other tokens
`toy:rows`  the same with context rows of four words, a number for all tokens so far: whoever holds them can be checked
`toy:free`  counts in a circle; its forward costs next to nothing, for measuring everything but the target
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np

from verifier_service.models import ContextInfo, ContextWords, FloatRows, ModelInfo
from verifier_service.ragged_batch import RaggedBatch, Segment

TOY_VOCAB_SIZE = 64
_FREE_VOCAB_SIZE = 16
_PAIRS = 29  # rows of logits chosen by the last two tokens: few, so that texts repeat themselves
_WHOLES = 31  # rows of logits chosen by all tokens so far
_MASK = 2**64 - 1
TOY_CONTEXT = ContextInfo(tap_layers=(0,), width=4, hash="toy-rows-1")


def toy_model(name: str) -> ToyModel | FreeToyModel:
    """The toy of this name. Raises ValueError that says which there are."""
    if name == "toy":
        return ToyModel()
    if name == "toy:rows":
        return ToyModel(context=TOY_CONTEXT)
    if name == "toy:free":
        return FreeToyModel()
    raise ValueError(f"model: is {name!r}; the toy models are toy, toy:rows and toy:free")


@dataclass(slots=True)
class _Memory:
    """token_ids, hashes: [length] what was read, and a running hash of it up to each position. capacity: tokens of room."""

    token_ids: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    capacity: int = 0


class ToyModel:
    """Logits depend on the last two tokens in three of four positions, and on all tokens so far in the fourth.

    It holds the engine to its word: a segment must begin where the memory ends, and must have room.
    """

    def __init__(
        self,
        *,
        vocab_size: int = TOY_VOCAB_SIZE,
        context_limit: int = 4096,
        block_tokens: int = 16,
        seed: int = 1,
        context: ContextInfo | None = None,
    ) -> None:
        assert vocab_size >= 8
        info = _info("toy", vocab_size, context_limit, block_tokens, (0,), f"toy-1-{vocab_size}-{seed}")
        self._info = replace(info, context=context)
        self._tables = _tables(vocab_size, seed)
        self._memories: dict[int, _Memory] = {}

    @property
    def info(self) -> ModelInfo:
        return self._info

    def open(self, sequence_id: int) -> None:
        assert sequence_id not in self._memories, "opened twice"
        self._memories[sequence_id] = _Memory()

    def resize(self, sequence_id: int, block_ids: Sequence[int]) -> None:
        memory = self._memories[sequence_id]
        memory.capacity = len(block_ids) * self._info.block_tokens
        assert len(memory.token_ids) <= memory.capacity, "room was taken from under what is remembered"

    def rewind(self, sequence_id: int, length: int) -> int:
        memory = self._memories[sequence_id]
        del memory.token_ids[length:]
        del memory.hashes[length:]
        return len(memory.token_ids)

    def fork(self, source_id: int, sequence_id: int, length: int) -> int:
        source, memory = self._memories[source_id], self._memories[sequence_id]
        assert not memory.token_ids, "forked into a sequence that remembers something"
        assert length <= len(source.token_ids), "forked from more than the source remembers"
        memory.token_ids = source.token_ids[:length]
        memory.hashes = source.hashes[:length]
        assert len(memory.token_ids) <= memory.capacity, "forked into too little room"
        return len(memory.token_ids)

    def close(self, sequence_id: int) -> None:
        del self._memories[sequence_id]

    def context_rows(self, sequence_id: int, start: int, end: int) -> ContextWords:
        return toy_rows(self._memories[sequence_id].hashes[start:end])

    def forward(self, batch: RaggedBatch) -> FloatRows:
        wanted: list[int] = []
        for segment in batch.segments:
            wanted += self._read(segment)
        return self._tables[np.array(wanted, dtype=np.int64)]

    def _read(self, segment: Segment) -> list[int]:
        """Remembers a segment's rows; returns the table row of each of its logit rows."""
        memory = self._memories[segment.sequence_id]
        assert segment.start == len(memory.token_ids), "a segment must begin where the memory ends"
        assert segment.start + segment.row_count <= memory.capacity, "a segment must have room"
        for token_id in segment.token_ids:
            assert 0 <= token_id < self._info.vocab_size, "an id outside the vocabulary"
            memory.token_ids.append(token_id)
            memory.hashes.append(_hash(memory.hashes[-1] if memory.hashes else 0, token_id))
        end = len(memory.token_ids)
        return [self._table_row(memory, position) for position in range(end - segment.logit_count, end)]

    def _table_row(self, memory: _Memory, position: int) -> int:
        mixed = memory.hashes[position] >> 33
        if mixed % 4 == 0:
            return int(_PAIRS + mixed // 4 % _WHOLES)
        last = memory.token_ids[position]
        before = memory.token_ids[position - 1] if position > 0 else 0
        return (last * 5 + before * 3) % _PAIRS


class SnapshotToyModel(ToyModel):
    """A toy that can only go back to multiples of 8, as a model with compressed state goes back to a snapshot."""

    STRIDE = 8

    def rewind(self, sequence_id: int, length: int) -> int:
        if length >= len(self._memories[sequence_id].token_ids):
            return len(self._memories[sequence_id].token_ids)
        return super().rewind(sequence_id, length // self.STRIDE * self.STRIDE)

    def fork(self, source_id: int, sequence_id: int, length: int) -> int:
        if length < len(self._memories[source_id].token_ids):
            length = length // self.STRIDE * self.STRIDE
        return super().fork(source_id, sequence_id, length)


class FreeToyModel:
    """After token t comes t + 1, round in a circle, and it never stops. It remembers nothing."""

    def __init__(
        self, *, vocab_size: int = _FREE_VOCAB_SIZE, context_limit: int = 2**20, block_tokens: int = 512
    ) -> None:
        self._info = _info(
            "toy:free", vocab_size, context_limit, block_tokens, (), f"toy-free-1-{vocab_size}"
        )
        self._table = np.full((vocab_size, vocab_size), -8.0, dtype=np.float32)
        self._table[np.arange(vocab_size), (np.arange(vocab_size) + 1) % vocab_size] = 8.0

    @property
    def info(self) -> ModelInfo:
        return self._info

    def open(self, sequence_id: int) -> None:
        pass

    def resize(self, sequence_id: int, block_ids: Sequence[int]) -> None:
        pass

    def rewind(self, sequence_id: int, length: int) -> int:
        return length

    def fork(self, source_id: int, sequence_id: int, length: int) -> int:
        return length

    def close(self, sequence_id: int) -> None:
        pass

    def context_rows(self, sequence_id: int, start: int, end: int) -> ContextWords:
        raise AssertionError("it has none")

    def forward(self, batch: RaggedBatch) -> FloatRows:
        rows: FloatRows = self._table[batch.token_ids[batch.logit_rows]]
        return rows


def _hash(before: int, token_id: int) -> int:
    return (before * 6364136223846793005 + token_id + 1442695040888963407) & _MASK


def toy_rows_of(token_ids: Sequence[int]) -> ContextWords:
    """[n, 4] the context rows of a text, from its tokens alone."""
    return toy_rows(list(accumulate(token_ids, _hash, initial=0))[1:])


def toy_rows(hashes: Sequence[int]) -> ContextWords:
    """[n, 4] 64 bits of hash each, as words."""
    return np.array(hashes, dtype="<u8").view("<u2").reshape(-1, TOY_CONTEXT.width)


def _tables(vocab_size: int, seed: int) -> FloatRows:
    """[_PAIRS + _WHOLES, vocab] peaked logits in halves; every fourth row has two best ones. The stop id 0 is rare."""
    generator = np.random.Generator(np.random.PCG64(seed))
    size = (_PAIRS + _WHOLES, vocab_size)
    tables = np.round(generator.standard_normal(size) * 3.0) / 2.0
    first, second = generator.integers(1, vocab_size, size=(2, size[0]))
    rows = np.arange(size[0])
    tables[rows, first] += 5.0
    tables[rows[::4], second[::4]] = tables[rows[::4], first[::4]]
    tables[:, 0] -= 2.0
    return tables.astype(np.float32)


def _info(
    model_id: str,
    vocab_size: int,
    context_limit: int,
    block_tokens: int,
    stop_ids: tuple[int, ...],
    numerics: str,
) -> ModelInfo:
    return ModelInfo(
        model_id=model_id,
        vocab_size=vocab_size,
        context_limit=context_limit,
        block_tokens=block_tokens,
        block_bytes=block_tokens
        * 1024,  # of the size of a small model's, so that memory settings mean something
        default_stop_ids=stop_ids,
        dtype="float32",
        exact=True,
        exact_reason="",
        numerics=numerics,
        tokenizer_hash="",
    )
