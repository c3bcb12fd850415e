"""Which models can be spoken to in text, and why the others cannot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gateway.chat import Clock, Encoder, load_chat
from gateway.tokenizer import Tokenizer
from sparkrelay.store import StoreError, resolve


@dataclass(frozen=True, slots=True)
class ModelText:
    """What text needs of one model.

    tokenizer  None: only token ids; `reason` says why
    chat       None: no messages; `chat_reason` says why
    """

    tokenizer: Tokenizer | None = None
    chat: Encoder | None = None
    reason: str = ""
    chat_reason: str = ""


def load_text(model: str, source: str, expected_hash: str, now: Clock) -> ModelText:
    """Finds and reads a model's tokenizer and chat template; never raises: without them the model is served by token ids.

    source         folder, catalogue name or hub id; empty: the model's own name
    expected_hash  of tokenizer.json as the verifier has it; empty for a model without text
    """
    if not expected_hash:
        return _without(f"{model} has no text")
    try:
        folder = _folder(source or model)
        tokenizer = Tokenizer.from_folder(folder)
    except (StoreError, OSError, ValueError) as error:
        return _without(f"the gateway cannot read the tokenizer of {model}: {error}")
    if tokenizer.content_hash != expected_hash:
        return _without(
            f"the tokenizer in {folder} is not the one of the verifier's {model} "
            f"(sha256 {tokenizer.content_hash[:12]} and {expected_hash[:12]})"
        )
    try:
        chat = load_chat(folder, now)
    except (OSError, ValueError) as error:
        return ModelText(tokenizer, None, chat_reason=str(error))
    return ModelText(tokenizer, chat, chat_reason="" if chat else f"{model} comes without a chat template")


def _folder(source: str) -> Path:
    folder = Path(source).expanduser()
    return folder if (folder / "tokenizer.json").is_file() else resolve(source).path


def _without(reason: str) -> ModelText:
    return ModelText(reason=reason, chat_reason=reason)
