"""The byte-level BPE tokenizer of a GGUF file as the files that `tokenizers` and `transformers` read.

A GGUF stores ids, merges and a nickname of the text splitter ("pre"), not the splitter itself; the nicknames that this
converter knows are in PRE_TOKENIZERS. The result is what the model's makers publish as tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sparkrelay.store.errors import UnsupportedFile

Json = dict[str, Any]

# GGUF's token types: 1 normal, 3 control. Only these two occur in byte-level BPE vocabularies.
NORMAL_TOKEN: Final = 1
CONTROL_TOKEN: Final = 3

_BYTE_LEVEL: Final[Json] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}

# "smollm" cuts every digit into a token of its own, then does as GPT-2 does.
PRE_TOKENIZERS: Final[Mapping[str, Json]] = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    },
    "gpt-2": _BYTE_LEVEL,
}


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """What a GGUF says about its tokenizer. Ids are indices into `tokens`."""

    pre: str
    tokens: Sequence[str]
    token_types: Sequence[int]
    merges: Sequence[str]
    bos_id: int
    eos_id: int
    unknown_id: int
    padding_id: int
    chat_template: str | None
    context_length: int

    def check(self) -> None:
        """Raises UnsupportedFile for the first thing that cannot be converted faithfully."""
        if self.pre not in PRE_TOKENIZERS:
            raise _unsupported(f"its text splitter is {self.pre!r}; known are {', '.join(PRE_TOKENIZERS)}")
        if len(self.token_types) != len(self.tokens):
            raise _unsupported(f"it has {len(self.tokens)} tokens but {len(self.token_types)} token types")
        if len(set(self.tokens)) != len(self.tokens):
            raise _unsupported("two of its tokens have the same text")
        strange = set(self.token_types) - {NORMAL_TOKEN, CONTROL_TOKEN}
        if strange:
            raise _unsupported(f"its token types {sorted(strange)} have no byte-level counterpart")
        for field in ("bos_id", "eos_id", "unknown_id", "padding_id"):
            if not 0 <= getattr(self, field) < len(self.tokens):
                raise _unsupported(f"its {field} {getattr(self, field)} is outside the vocabulary")


def tokenizer_json(data: TokenizerData) -> Json:
    """The content of tokenizer.json."""
    added = [
        _added_token(token_id, text)
        for token_id, (text, kind) in enumerate(zip(data.tokens, data.token_types, strict=True))
        if kind == CONTROL_TOKEN
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[data.pre],
        "post_processor": None,
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: token_id for token_id, text in enumerate(data.tokens)},
            "merges": [_merge_pair(merge) for merge in data.merges],
        },
    }


def tokenizer_config(data: TokenizerData) -> Json:
    """The content of tokenizer_config.json, chat template included."""
    control = [
        text for text, kind in zip(data.tokens, data.token_types, strict=True) if kind == CONTROL_TOKEN
    ]
    named = {data.tokens[i] for i in (data.bos_id, data.eos_id, data.unknown_id, data.padding_id)}
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": data.context_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "bos_token": data.tokens[data.bos_id],
        "eos_token": data.tokens[data.eos_id],
        "unk_token": data.tokens[data.unknown_id],
        "pad_token": data.tokens[data.padding_id],
        "additional_special_tokens": [text for text in control if text not in named],
    }
    if data.chat_template is not None:
        config["chat_template"] = data.chat_template
    return config


def _added_token(token_id: int, text: str) -> Json:
    return {
        "id": token_id,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _merge_pair(merge: str) -> list[str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise _unsupported(f"its merge {merge!r} is not two tokens")
    return [left, right]


def _unsupported(why: str) -> UnsupportedFile:
    return UnsupportedFile(
        f"This GGUF's tokenizer cannot be converted: {why}.", "Use the model's original files."
    )
