"""The chat format in token ids, and prompts from files.

A model that was tuned on conversations writes a user's message as well as an answer: given the ids that stand before one
(`opening`), it goes on with a question of its own. So training data needs no download. Left alone it asks what it was tuned on;
the first words in STARTERS lead it to arithmetic and code as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

MESSAGE = "sparkrelay-message"
"""Stands in for a user's message to see what a chat template puts before and behind one."""


STARTERS = (
    "Write a Python function that",
    "Write a Python function to",
    "Write a function `",
    "Write a Python script that",
    "Write a Python class that",
    "Fix the bug in this code:\n```python\n",
    "Explain what this code does:\n```python\n",
    "How do I write a loop in Python that",
    "Write a program that",
    "Write a SQL query that",
    "Write a bash command that",
    "Write unit tests for",
    "What does this Python code print?\n```python\n",
    "Complete this function:\n```python\ndef",
    "Rewrite this in JavaScript:\n```python\n",
    "A shop sells",
    "A farmer has",
    "A train leaves",
    "If a recipe needs",
    "Tom has",
    "Anna buys",
    "How many",
    "How much does",
    "What is 1",
    "Calculate",
    "Solve the equation",
    "A rectangle has",
    "A car travels",
    "There are",
    "The price of",
    "A tank holds",
    "In a class of",
    "What percentage of",
    "Find the area of",
    "Convert",
    "Explain",
    "Write a short story about",
    "Write a letter to",
    "Write an email to",
    "Give me five",
    "What is the difference between",
    "Summarize",
    "What are the advantages of",
    "How can I",
    "Describe",
    "List",
    "Tell me about",
    "Why do",
    "Plan a",
    "Suggest",
    "Give me advice on",
    "What happens when",
    "Compare",
    "Rewrite this sentence",
    "Translate",
)
"""First words of messages; the target writes the rest."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


class UnusablePrompts(ValueError):
    """A prompt file or a chat template that cannot be used. The message names it and says what is wrong."""


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A conversation's frame.

    opening  ids up to where a user's first message begins
    closing  ids from the end of that message to where the answer begins
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...]


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """The frame that the tokenizer's chat template puts around a message; UnusablePrompts if it changes messages."""
    before, after = _around(tokenizer)
    return ChatFormat(
        tuple(tokenizer.encode(before, add_special_tokens=False)),
        tuple(tokenizer.encode(after, add_special_tokens=False)),
    )


def prompt_ids(tokenizer: Tokenizer, message: str) -> tuple[int, ...]:
    """The ids of a conversation that begins with this message, up to where the answer begins."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    return tuple(tokenizer.encode(rendered, add_special_tokens=False))


def _around(tokenizer: Tokenizer) -> tuple[str, str]:
    conversation = [{"role": "user", "content": MESSAGE}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    before, found, after = rendered.partition(MESSAGE)
    if not found or MESSAGE in after:
        raise UnusablePrompts("the chat template does not put a user's message into the text once, as it is")
    return before, after


def read_prompts(files: Sequence[Path]) -> list[str]:
    """First user messages of files of JSON lines `{"turns": ["...", ...]}`, each once. UnusablePrompts names file and line."""
    messages: dict[str, None] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                messages[_first_turn(line, f"{file}, line {number}")] = None
    return list(messages)


def _first_turn(line: str, where: str) -> str:
    try:
        turn = json.loads(line)["turns"][0]
    except (ValueError, KeyError, IndexError, TypeError):
        turn = None
    if not isinstance(turn, str) or not turn.strip():
        raise UnusablePrompts(f'{where}: expected {{"turns": ["a user\'s message", ...]}}')
    return turn
