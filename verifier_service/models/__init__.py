"""What the engine asks of a target model.

The engine knows tokens, lengths and blocks; a model knows what it must remember of a sequence. For most models that is a
key and a value per position, but nothing here says so: DeepSeek-V4 remembers sliding windows, compressed entries and
buffers, and may only be able to go back to a snapshot. So a sequence's memory is opened, resized, rewound and closed by
number, and `rewind` says how far back the model really had to go; the engine recomputes from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from verifier_service.ragged_batch import RaggedBatch

FloatRows = npt.NDArray[np.float32]
ContextWords = npt.NDArray[np.uint16]
"""Context rows as the wire carries them: [n, width], bfloat16 as 16-bit words."""


@dataclass(frozen=True, slots=True)
class ContextInfo:
    """What makes a target's context rows: the names are those of `frames.Fingerprint`.

    tap_layers  whose outputs are read, in this order
    width       elements of a row
    hash        sha256 of the projector, hex; a draft was trained with one of them
    """

    tap_layers: tuple[int, ...]
    width: int
    hash: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded target is, for `Describe`, the drafters' fingerprint check and the engine's limits.

    model_id              the name users ask for
    vocab_size            rows of the embedding; ids at or above it are refused
    context_limit         the most tokens a sequence may have
    block_tokens          tokens per state block: room is given in these units (512 on a CPU)
    block_bytes           memory of one block, all layers
    default_stop_ids      end-of-turn ids of the model's own generation config
    dtype                 "bfloat16" | "float32" | ...
    exact                 True if a row's logits do not depend on what else is in the batch, as probed on this machine
    exact_reason          why not, if not
    numerics              hash of a fixed forward's logits: equal hashes, equal bits
    tokenizer_hash        sha256 of tokenizer.json, "" for a model without text
    context               what drafters may read of it beside the tokens; None: nothing
    """

    model_id: str
    vocab_size: int
    context_limit: int
    block_tokens: int
    block_bytes: int
    default_stop_ids: tuple[int, ...]
    dtype: str
    exact: bool
    exact_reason: str
    numerics: str
    tokenizer_hash: str
    context: ContextInfo | None = None


class TargetModel(Protocol):
    """A target behind the engine. One thread calls it; nothing here blocks on anything but the device."""

    @property
    def info(self) -> ModelInfo: ...

    def open(self, sequence_id: int) -> None:
        """Starts the memory of a new sequence: length 0, no room."""

    def resize(self, sequence_id: int, block_ids: Sequence[int]) -> None:
        """Gives the sequence exactly these blocks, in order; what it remembers below their capacity is kept.

        Paged models store where the ids point; slab models only count them.
        """

    def rewind(self, sequence_id: int, length: int) -> int:
        """Forgets everything from position `length` on; returns the length that is really left (at most `length`)."""

    def fork(self, source_id: int, sequence_id: int, length: int) -> int:
        """Copies the memory of the first `length` tokens to `sequence_id`; returns the length it got (at most `length`).

        The copy is open, has room and remembers nothing yet. The source is left as it was. As with `rewind`, a model that
        cannot begin just anywhere copies less.
        """

    def close(self, sequence_id: int) -> None:
        """Forgets the sequence and its room."""

    def context_rows(self, sequence_id: int, start: int, end: int) -> ContextWords:
        """[end - start, width] a copy of the context rows of these positions, all of which it remembers.

        Only of a model whose info has a context. Rows live and die with the memory of their positions.
        """

    def forward(self, batch: RaggedBatch) -> FloatRows:
        """Runs every row, remembers it, and returns the float32 logits of the batch's logit rows: [len(logit_rows), vocab]."""
