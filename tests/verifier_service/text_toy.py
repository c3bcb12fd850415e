"""A toy target with text: a vocabulary of characters, byte halves and pieces that span JSON's own tokens, and its compiler."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import llguidance

from sparkrelay.response_format import FormatKind, ResponseFormat
from verifier_service.grammar import Grammar
from verifier_service.grammar_compiler import GrammarCompiler
from verifier_service.models.toy import ToyModel

STOP = 0
OTHER_STOP = 1
_PIECES = (
    '{"',
    '":',
    '", "',
    '":"',
    '"}',
    "},",
    "[1",
    "]}",
    "true",
    "false",
    "null",
    "12",
    "ab",
    "an",
    "e ",
    "\n  ",
)
TOKENS: list[bytes] = [
    b"<stop>",
    b"<other>",
    *(bytes([code]) for code in range(32, 127)),
    b"\n",
    "é".encode(),
    b"\xc3",
    b"\xa9",
    *(piece.encode() for piece in _PIECES),
]
VOCAB_SIZE = len(TOKENS) + 3  # embedding tables are padded: the last ids stand for nothing


class _Words:
    """What llguidance asks of a tokenizer that is not a file."""

    eos_token_id = STOP
    bos_token_id = None
    tokens = TOKENS
    special_token_ids = (STOP, OTHER_STOP)

    def __call__(self, text: bytes) -> list[int]:
        return encode(text)


def encode(text: bytes | str) -> list[int]:
    """The longest piece first."""
    rest, ids = text.encode() if isinstance(text, str) else text, []
    while rest:
        best = max(range(2, len(TOKENS)), key=lambda i: len(TOKENS[i]) if rest.startswith(TOKENS[i]) else 0)
        assert rest.startswith(TOKENS[best]), f"no token begins {rest!r}"
        ids.append(best)
        rest = rest[len(TOKENS[best]) :]
    return ids


def decode_text(token_ids: Iterable[int]) -> str:
    """The text of ids; a stop id has none. Fails on half a character."""
    return b"".join(TOKENS[i] for i in token_ids if i not in (STOP, OTHER_STOP)).decode()


@cache
def compiler() -> GrammarCompiler:
    words = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Words()), n_vocab=VOCAB_SIZE)
    return GrammarCompiler(words, VOCAB_SIZE)


def grammar(kind: FormatKind, text: str) -> Grammar:
    return compiler().compile(ResponseFormat(kind, text))


def text_toy(seed: int = 1) -> ToyModel:
    return ToyModel(vocab_size=VOCAB_SIZE, context_limit=4096, seed=seed)
