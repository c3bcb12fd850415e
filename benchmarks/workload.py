"""What users ask in a benchmark: the project's own prompts as token ids, other ones for every user and repeat."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.chat import Message, load_chat
from gateway.tokenizer import Tokenizer

PROMPTS = Path(__file__).parent / "prompts"
PROMPT_SETS = ("chat", "arithmetic", "code")
# Templates may write today's date: a benchmark's prompts do not change with it.
A_DAY = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts as token ids, never empty."""

    prompts: tuple[tuple[int, ...], ...]

    def take(self, repeat: int, user_count: int) -> list[tuple[int, ...]]:
        """The users' prompts of one repeat; the next repeat goes on where this one ends, round and round."""
        start = repeat * user_count
        return [self.prompts[(start + user) % len(self.prompts)] for user in range(user_count)]


def read_prompts(files: Iterable[Path]) -> list[str]:
    """First user messages, one of each file in turn. Raises ValueError that names the file and line."""
    columns = [_read_file(file) for file in files]
    return [text for row in itertools.zip_longest(*columns) for text in row if text is not None]


def default_prompts() -> list[str]:
    """All of `benchmarks/prompts`."""
    return read_prompts(PROMPTS / f"{name}.jsonl" for name in PROMPT_SETS)


def as_tokens(texts: Sequence[str], model_folder: Path) -> Workload:
    """What the gateway would send for each text: in the model's chat template where it has one. Raises OSError or ValueError."""
    tokenizer = Tokenizer.from_folder(model_folder)
    chat = load_chat(model_folder, lambda: A_DAY)
    if chat is None:
        return Workload(tuple(tokenizer.encode(text, add_special_tokens=True) for text in texts))
    rendered = [chat([Message("user", text)]) for text in texts]
    return Workload(tuple(tokenizer.encode(text, add_special_tokens=False) for text in rendered))


def _read_file(file: Path) -> list[str]:
    texts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            texts.append(str(json.loads(line)["turns"][0]))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f'{file}, line {number}: is not {{"turns": [text, ...]}}: {error}') from error
    return texts
