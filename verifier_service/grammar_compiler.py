"""From the text of a response format to a grammar: bounded in size, work and memory, and refused with the place and the reason.

Without I/O but for the tokenizer's file, and not quick: mostly a millisecond, sometimes some hundred, rarely many seconds. So
`servicer.trials` has another process try a format first, and calls it on a thread of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import llguidance

from sparkrelay.device.filters import NothingAllowed
from sparkrelay.outcomes import FieldViolation, Reason, Refusal
from sparkrelay.response_format import FormatKind, ResponseFormat
from verifier_service.grammar import Grammar, one_line

STACK_BYTES = 256 * 2**20
"""Of address space, for every thread that compiles or follows a grammar: the library goes as deep as a grammar is long."""

JSON_WHITESPACE = r"[ ]|\n[ ]{0,32}"
"""Between the tokens of JSON: nothing, one space, or a line break and up to 32 spaces. A target that may write white space
without end sometimes does."""


def _limits(items_in_row: int) -> llguidance.LLParserLimits:
    """What one grammar may cost. A turn beyond it ends; the library's own limits would let one token take seconds.

    items_in_row  parses of one prefix that are followed at once: few for grammars, where an ambiguous one costs their square
    """
    return llguidance.LLParserLimits(
        max_items_in_row=items_in_row,
        step_max_items=20_000,
        step_lexer_fuel=100_000,
        max_lexer_states=50_000,
        verbose_errors=False,
    )


_LIMITS = {
    FormatKind.JSON_SCHEMA: _limits(2000),
    FormatKind.REGEX: _limits(500),
    FormatKind.LARK_GRAMMAR: _limits(500),
}


class GrammarCompiler:
    """Compiles for one tokenizer. Safe to use from several threads.

    vocab_size  of the model; ids that the tokenizer does not know are never allowed
    """

    def __init__(self, tokenizer: llguidance.LLTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    @classmethod
    def load(cls, tokenizer_file: Path, vocab_size: int, end_ids: Sequence[int]) -> GrammarCompiler:
        """Reads a tokenizer.json. Takes about a fifth of a second. Raises OSError or ValueError.

        end_ids  the model's own stop ids
        """
        text = tokenizer_file.read_text(encoding="utf-8")
        size = max(vocab_size, _highest_id(text) + 1)
        tokenizer = llguidance.LLTokenizer(text, n_vocab=size, eos_token=list(end_ids) or None)
        return cls(tokenizer, vocab_size)

    def compile(self, wanted: ResponseFormat) -> Grammar:
        """Raises Refusal(GRAMMAR_REFUSED) for what is no grammar, is too large, or is met by no text."""
        matcher = llguidance.LLMatcher(
            self._tokenizer, _library_text(wanted), log_level=0, limits=_LIMITS[wanted.kind]
        )
        if matcher.is_error():
            _refuse(wanted, matcher.get_error())
        end_ids = self._tokenizer.eos_tokens
        grammar = Grammar(wanted, matcher, self._vocab_size, end_ids)
        try:
            grammar.begin((), end_ids).allowed()
        except NothingAllowed:
            _refuse(wanted, "no text of this model satisfies it")
        return grammar


def _library_text(wanted: ResponseFormat) -> str:
    """The constraint in the library's own notation."""
    match wanted.kind:
        case FormatKind.REGEX:
            return llguidance.LLMatcher.grammar_from_regex(wanted.text)
        case FormatKind.LARK_GRAMMAR:
            return llguidance.LLMatcher.grammar_from_lark(wanted.text)
        case FormatKind.JSON_SCHEMA:
            _check_json_object(wanted)
            return llguidance.LLMatcher.grammar_from_json_schema(
                wanted.text, defaults={"whitespace_pattern": JSON_WHITESPACE}
            )


def _check_json_object(wanted: ResponseFormat) -> None:
    """Python's reader first: its errors name line and column of what was sent."""
    try:
        schema = json.loads(wanted.text, parse_constant=_no_json)
    except RecursionError:
        _refuse(wanted, "is nested too deeply")
    except ValueError as error:
        _refuse(wanted, f"is no JSON: {error}")
    if not isinstance(schema, dict):
        _refuse(wanted, "is no JSON object")


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


def refusal_of(wanted: ResponseFormat, message: str) -> Refusal:
    """Why there is no grammar for a format."""
    violation = FieldViolation(wanted.field, message)
    return Refusal(Reason.GRAMMAR_REFUSED, f"{wanted.field}: {message}", violations=(violation,))


def _refuse(wanted: ResponseFormat, error: str) -> NoReturn:
    raise refusal_of(wanted, f"{one_line(error)}; send another {wanted.kind.value}")


def _highest_id(tokenizer_json: str) -> int:
    """The highest id that a tokenizer.json gives to a token."""
    content = json.loads(tokenizer_json)
    vocabulary = content["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = (token["id"] for token in content.get("added_tokens", ()))
    return max((*ids, *added), default=-1)
