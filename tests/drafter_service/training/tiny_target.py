"""A tiny random target that writes, and a tokenizer for it: what the tests of training need of the world."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drafter_service.training.prompts import ChatFormat
from drafter_service.training.writer import WriterRules
from sparkrelay.cli.loops import loop_start

VOCAB = 96
STOP = 2
HIDDEN = 32


def save_target(folder: Path, layers: int = 4) -> Path:
    """A checkpoint whose answers are lively: large weights make its choices far from uniform."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.4,
        eos_token_id=STOP,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rules(**changes: Any) -> WriterRules:
    fields: dict[str, Any] = {
        "format": ChatFormat((1, 5, 6), (STOP, 7, 8)),
        "stop_ids": frozenset({STOP}),
        "loop_start": loop_start,
        "seed": 9,
        "prompt_temperature": 1.5,
        "min_prompt_tokens": 2,
        "max_prompt_tokens": 60,
        "token_limit": 90,
        "min_answer_tokens": 4,
    }
    return WriterRules(**{**fields, **changes})


class WordTokenizer:
    """Words and marks as ids, with a chat template around them."""

    def __init__(self, template: str = "<s>user: {}</s>assistant:") -> None:
        self._template = template
        self._ids: dict[str, int] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        words = re.findall(r"</?s>|\w+|[^\w\s]", text)
        return [self._ids.setdefault(word, len(self._ids)) for word in words]

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert add_generation_prompt and not tokenize
        return self._template.format(*(turn["content"] for turn in conversation))


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of one word an id, with a chat template, beside the target."""
    words = {f"w{number}": number for number in range(9, VOCAB)}
    marks = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": STOP,
        "<a>": 3,
        "<b>": 4,
        "user": 5,
        ":": 6,
        "assistant": 7,
        "<c>": 8,
    }
    tokenizer = Tokenizer(WordLevel({**marks, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<a>", "<c>"],
    )
    fast.chat_template = "<s> user : {{ messages[0]['content'] }} </s> assistant :"
    fast.save_pretrained(folder)
