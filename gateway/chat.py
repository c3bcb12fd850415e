"""Messages to the text that a model was trained to read: its chat template, or an encoder where a model ships one instead.

Templates come with the model and are code by somebody else: they run in jinja2's sandbox and cannot change what they are given.
The environment is the one that templates are written for (transformers' own names): raise_exception, strftime_now, tojson,
loop controls, the `generation` tag, trimmed blocks.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2

from gateway.chat_sandbox import ChatEnvironment, TooMuch
from sparkrelay.outcomes import Refusal, field_refusal


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str


Encoder = Callable[[Sequence[Message]], str]
Clock = Callable[[], datetime.datetime]

# model_type of config.json -> encoder, for models that ship code instead of a template. It wins over a template.
ENCODERS: dict[str, Encoder] = {}


class ChatTemplate:
    """A compiled template with the model's special tokens, which it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], now: Clock) -> None:
        """Raises ValueError, with the line, if the template cannot be compiled."""
        self._environment = ChatEnvironment()
        self._environment.filters["tojson"] = _tojson
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        self._template = self._environment.compiled(source)
        self._special_tokens = dict(special_tokens)

    def __call__(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the model's answer begins. Raises Refusal for what the template does not take."""
        values = {
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
            **self._special_tokens,
        }
        try:
            return self._environment.rendered(self._template, values)
        except TooMuch as error:
            raise _unfit(f"are more than the model's chat template can do: {error}") from error
        except Exception as error:  # a template may do anything that Python can, so it may fail in any way
            why = str(error) or type(error).__name__
            raise _unfit(f"do not fit the model's chat template: {why}") from error


def load_chat(folder: Path, now: Clock) -> Encoder | None:
    """What turns messages into text for the model in `folder`, None if it has nothing. Raises OSError or ValueError."""
    encoder = ENCODERS.get(str(_read_json(folder / "config.json").get("model_type", "")))
    if encoder is not None:
        return encoder
    config = _read_json(folder / "tokenizer_config.json")
    source = _template_source(folder, config)
    return ChatTemplate(source, _special_tokens(config), now) if source else None


def _template_source(folder: Path, config: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    written = config.get("chat_template", "")
    if isinstance(written, list):  # several, by name
        named = {each.get("name"): each.get("template", "") for each in written if isinstance(each, dict)}
        written = named.get("default", "")
    return written if isinstance(written, str) else ""


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on, written as text or as {"content": text}."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return content


def _unfit(message: str) -> Refusal:
    return field_refusal("chat.messages", f"{message}. Send other messages, or plain text")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False
) -> str:
    """jinja2's own would escape for HTML, which no model was trained on."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)
