"""Token ids to text while they come, never half a character, and in the end exactly the text of all ids at once.

Two kinds of tokenizers need two ways:
* byte-level (GPT-2 and all that followed): a token is bytes. An incremental UTF-8 decoder holds back at most three of them.
* all others: a token's text may depend on its neighbours (a leading space, a run of byte tokens), so a window that begins with
  tokens already shown is decoded twice, without and with the new ones, and what was added is new text. Of a run of byte tokens
  nothing is known before the run ends: one bad byte turns all of it into replacement characters.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Protocol

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer(Protocol):
    """One turn's output on its way to text; special tokens are not shown."""

    def add(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        ...

    @property
    def pending(self) -> bool:
        """True while tokens were taken in whose text is not known yet."""
        ...

    def finish(self) -> str:
        """No more tokens: the rest of the text, with U+FFFD for bytes that are no characters."""
        ...


def gpt2_byte_of_char() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class ByteLevelDetokenizer:
    """bytes_of gives a token's bytes: nothing for special tokens and ids without one."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes_of(token_id))

    @property
    def pending(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Text by windows.

    decode    the text of ids, special tokens left out
    token_of  an id's token; None for special ones and for ids without one
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], token_of: Callable[[int], str | None]) -> None:
        self._decode = decode
        self._token_of = token_of
        self._shown: list[
            int
        ] = []  # the window's ids whose text is out; their text is never empty once any was shown
        self._waiting: list[int] = []

    def add(self, token_id: int) -> str:
        token = self._token_of(token_id)
        if token is None:
            return ""
        self._waiting.append(token_id)
        return "" if _BYTE_TOKEN.fullmatch(token) else self._show()

    @property
    def pending(self) -> bool:
        return bool(self._waiting)

    def finish(self) -> str:
        return self._show() if self._waiting else ""

    def _show(self) -> str:
        shown_text = self._decode(self._shown) if self._shown else ""
        text = self._decode(self._shown + self._waiting)
        new_text = text[len(shown_text) :]
        if shown_text and new_text:
            self._shown = self._waiting
        else:
            self._shown = self._shown + self._waiting
        self._waiting = []
        return new_text
