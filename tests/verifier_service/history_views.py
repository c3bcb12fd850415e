"""The world of the random histories: its sessions, texts and samplings, and what callers and drafters have seen so far."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sparkrelay.sampling import Sampling
from verifier_service.events import BlockArrived, StartTurn
from verifier_service.models.toy import toy_rows_of

VOCAB = 16
SESSIONS = ("a", "b", "c", "d")
SAMPLINGS = (
    Sampling(),
    Sampling(),
    Sampling(temperature=0.8, seed=11),
    Sampling(temperature=1.3, top_k=6, top_p=0.9, min_p=0.02, seed=12),
    Sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    Sampling(temperature=0.6, min_tokens=5, logit_bias=((3, 1.5),), seed=13),
)
CONTEXT_LIMIT = 44
BLOCK_TOKENS = 4
SYSTEM_PROMPTS = [
    [(i * i + n) % (VOCAB - 1) + 1 for i in range(34)] for n in (3, 8)
]  # what many sessions begin with
SALTS = {
    "a": b"one",
    "b": b"one",
    "c": b"one",
    "d": b"two",
}  # session |-> whose it is, until a fork gives its name to others


@dataclass
class TurnView:
    """A turn as its caller sees it, with the output it must have."""

    command: StartTurn
    expected: list[int]
    accepted: bool = False
    output: list[int] = field(default_factory=list)
    next_round: int = 0


@dataclass
class MemberView:
    """A session as a drafter sees it."""

    session_id: str
    added: bool = False
    ids: list[int] = field(default_factory=list)
    turn_id: str = ""
    awaited_len: int = 0
    blocks: list[BlockArrived] = field(default_factory=list)
    rows: dict[int, bytes] | None = None
    """By position, of a drafter that reads context rows."""

    def cut(self, length: int) -> None:
        del self.ids[length:]
        if self.rows is not None:
            self.rows = {position: row for position, row in self.rows.items() if position < length}

    def take_rows(self, start: int, rows: Any) -> None:
        """Rows [n, width] of positions start ..."""
        assert (rows is None) or self.rows is not None, "rows for a drafter that reads none"
        if self.rows is not None and rows is not None:
            self.rows.update((start + index, row.tobytes()) for index, row in enumerate(rows))


def rows_of(token_ids: list[int]) -> dict[int, bytes]:
    """By position, the rows of a text that was read at one go."""
    return _rows_of(tuple(token_ids))


@functools.lru_cache(64)
def _rows_of(token_ids: tuple[int, ...]) -> dict[int, bytes]:
    return {position: row.tobytes() for position, row in enumerate(toy_rows_of(token_ids))}


def beginning(rng: random.Random, conversations: Iterable[list[int]]) -> list[int]:
    """What others have begun with, or a conversation that some session has had, up to somewhere."""
    text = rng.choice([*SYSTEM_PROMPTS, *conversations])
    return text[: rng.choice((len(text), rng.randint(0, len(text))))]
