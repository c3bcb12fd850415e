"""A model's tokenizer from its tokenizer.json. transformers' own classes would bring torch along."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HubTokenizer

from gateway.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer, gpt2_byte_of_char


class Tokenizer:
    """Text to ids and back.

    content_hash  sha256 of tokenizer.json, hex: what verifiers and drafters compare
    """

    def __init__(self, content: bytes) -> None:
        """Raises ValueError if `content` is no tokenizer.json."""
        try:
            self._tokenizer = HubTokenizer.from_buffer(content)
            decoder = json.loads(content).get("decoder")
        except Exception as error:
            raise ValueError(f"this is no tokenizer.json: {error}") from error
        self.content_hash = hashlib.sha256(content).hexdigest()
        self._byte_level = isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"
        self._special_ids = frozenset(
            token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        self._byte_of_char = gpt2_byte_of_char() if self._byte_level else {}
        self._bytes_by_id: dict[
            int, bytes
        ] = {}  # filled as tokens come; no larger than the model's vocabulary

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Raises OSError or ValueError."""
        return cls((folder / "tokenizer.json").read_bytes())

    @property
    def vocab_size(self) -> int:
        """Ids with a token; the model's embedding may have more rows."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """add_special_tokens: what the tokenizer itself puts around plain text; a chat template has written it already."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all ids at once, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def detokenizer(self) -> Detokenizer:
        """A new one, for one turn's output."""
        if self._byte_level:
            return ByteLevelDetokenizer(self._bytes_of)
        return WindowDetokenizer(self.decode, self._shown_token)

    def _shown_token(self, token_id: int) -> str | None:
        token: Any = None if token_id in self._special_ids else self._tokenizer.id_to_token(token_id)
        return None if token is None else str(token)

    def _bytes_of(self, token_id: int) -> bytes:
        known = self._bytes_by_id.get(token_id)
        if known is None:
            known = self._bytes_by_id[token_id] = self._spelled(token_id)
        return known

    def _spelled(self, token_id: int) -> bytes:
        token = self._shown_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(self._byte_of_char[char] for char in token)
        except KeyError:  # an added token that is written as plain text
            return token.encode()
