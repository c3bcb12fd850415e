"""Structured output: which tokens keep a turn's text on the way to what was asked for.

The parsing is llguidance's (JSON schemas, regular expressions, Lark grammars; about a tenth of a millisecond a token). Here is
what a turn needs of it: a state that follows the turn's output token by token, goes back when asked to, and says as a mask
over the vocabulary what may come next. Which token ends the text is the turn's matter, not the tokenizer's: the turn's stop
ids are allowed exactly when the text is complete, and a stop id is never part of the text.

Acceptance looks at a position only when every draft token before it was the target's own, so the one state of a turn is always
that of the very prefix that is looked at: nothing is copied for a block, and nothing has to be taken back after a rejection.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import llguidance
import numpy as np

from sparkrelay.device.filters import BoolRow, NothingAllowed
from sparkrelay.response_format import ResponseFormat


class Grammar:
    """A response format, compiled for one tokenizer. Made by `grammar_compiler`; states of many turns share what it has learned.

    matcher     at the beginning of the text, without an error; only copied
    vocab_size  of the model: the length of a mask
    end_ids     what the tokenizer holds for the end of a text; a mask has them only where the turn has
    """

    def __init__(
        self, source: ResponseFormat, matcher: llguidance.LLMatcher, vocab_size: int, end_ids: Iterable[int]
    ) -> None:
        self.source = source
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_ids = np.array(sorted(end_ids), dtype=np.int64)

    def begin(self, output_ids: Iterable[int], stop_ids: Collection[int]) -> GrammarState:
        """The state behind the output a turn has already, for one that is replayed; behind nothing for a new one."""
        state = GrammarState(self._matcher, self._vocab_size, self._end_ids, stop_ids)
        for token_id in output_ids:
            state.append(token_id)
        return state


class GrammarState:
    """Where one turn's output stands in its grammar. See `sparkrelay.device.choice.TokenMask`.

    Tokens that do not fit can be appended: from there on nothing is allowed, until they are taken back.
    """

    __slots__ = ("_beginning", "_end_ids", "_fitting", "_length", "_matcher", "_stop_ids", "_vocab_size")

    def __init__(
        self,
        beginning: llguidance.LLMatcher,
        vocab_size: int,
        end_ids: np.typing.NDArray[np.int64],
        stop_ids: Collection[int],
    ) -> None:
        self._beginning = beginning
        self._matcher = beginning.deep_copy()
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._stop_ids = np.array(sorted(stop_ids), dtype=np.int64)
        self._length = 0  # tokens of output
        self._fitting: list[int] = []  # the first of them, which the matcher has taken

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return len(self._fitting) == self._length and self._matcher.is_accepting()

    def allowed(self) -> BoolRow:
        if len(self._fitting) < self._length:
            raise NothingAllowed(
                self._error()
                or f"response_format: token {len(self._fitting)} of the output is not one that it allows; "
                "replay what the turn has produced, nothing else"
            )
        if self._matcher.is_stopped():
            mask = np.zeros(self._vocab_size, dtype=np.bool_)
        else:
            words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            mask = np.unpackbits(words, count=self._vocab_size, bitorder="little").view(np.bool_)
        if error := self._error():
            raise NothingAllowed(error)
        mask[self._end_ids] = False
        mask[self._stop_ids] = self._matcher.is_accepting()
        if not mask.any():
            raise NothingAllowed(_explain("no token of this model continues the text", self._length))
        return mask

    def append(self, token_id: int, /) -> None:
        fits = len(self._fitting) == self._length and token_id not in self._stop_ids
        if fits and self._matcher.try_consume_tokens([token_id]):
            self._fitting.append(token_id)
        self._length += 1

    def truncate(self, count: int, /) -> None:
        assert 0 <= count <= self._length, "a state goes back, not forward"
        taken_back = len(self._fitting) - count
        if taken_back > 0:
            del self._fitting[count:]
        if self._matcher.is_error():  # which is for good
            self._matcher = self._beginning.deep_copy()
            self._matcher.try_consume_tokens(self._fitting)
        elif taken_back > 0:
            self._matcher.rollback(taken_back)
        self._length = count

    def _error(self) -> str:
        """Why the matcher cannot go on, "" if it can: a dead end, or a limit."""
        error = self._matcher.get_error()
        return _explain(error, self._length) if error else ""


def _explain(error: str, length: int) -> str:
    """A library's error, one line, as the end of a turn."""
    return (
        f"response_format: after {length} tokens of output nothing can follow ({one_line(error)}); "
        "allow more, or make it simpler"
    )


def one_line(error: str, limit: int = 600) -> str:
    """An error of the library without its markup, newlines and what is too long to read."""
    text = " ".join(error.replace("<non-verbose/>", "").split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
