"""Parse, do not validate: a request's raw values in, a ValidTurn out, or one Refusal with a sentence for the first thing wrong.

Free of stubs: the servicer copies the values of a message into a RawTurn and nothing else looks at the message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gateway.chat import Message
from gateway.texts import ModelText
from gateway.tokenizer import Tokenizer
from sparkrelay.outcomes import FieldViolation, Reason, Refusal
from sparkrelay.response_format import ResponseFormat
from sparkrelay.sampling import MAX_LOGIT_BIASES, MAX_STOP_IDS, PROTO_NAMES, InvalidField, Sampling

MAX_MESSAGES = 2048
MAX_ROLE_CHARS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_LOGPROBS = 20
MAX_DEPTH = 15
MAX_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class RawTurn:
    """A request as it came. Exactly one of text, messages and token_ids is not None in a good one.

    fixed_depth  None: the verifier's policy decides; `speculation_off` wins over it
    response_format  of a good size already; None for any text
    """

    text: str | None = None
    messages: Sequence[Message] | None = None
    token_ids: Sequence[int] | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    seed: int | None = None
    max_tokens: int = 0
    stop_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    ignore_default_stop_ids: bool = False
    speculation_off: bool = False
    fixed_depth: int | None = None
    include_rounds: bool = False
    logprob_count: int | None = None
    response_format: ResponseFormat | None = None


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a turn must fit: of the model (context_limit, vocab_size, default_stop_ids) and of this gateway.

    has_response_format  whether every verifier of the model can keep to one
    """

    context_limit: int
    vocab_size: int
    default_stop_ids: tuple[int, ...]
    default_max_tokens: int
    prompt_limit_chars: int
    has_response_format: bool = False


@dataclass(frozen=True, slots=True)
class ValidTurn:
    """A turn that can be run.

    prompt_ids  the whole input, at least one id
    stop_ids    those the request adds; `hidden_ids` are all that end the turn, the model's own included, and are never shown
    max_tokens  positive; `ends_with_context` says that the context limit set it, not the caller
    fixed_depth None: the policy decides; 0: plain decoding
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    ends_with_context: bool
    stop_ids: tuple[int, ...]
    hidden_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    ignore_default_stop_ids: bool
    speculation_off: bool
    fixed_depth: int | None
    include_rounds: bool
    logprob_count: int | None
    response_format: ResponseFormat | None


def parse_turn(raw: RawTurn, limits: ModelLimits, text: ModelText, draw_seed: int) -> ValidTurn:
    """Raises Refusal. `draw_seed` is used if the request brings none. Takes as long as the tokenizer takes for the input."""
    sampling = _sampling(raw, limits.vocab_size, draw_seed)
    _check_stop(raw, limits.vocab_size, text)
    _check_counts(raw)
    if raw.response_format is not None and not limits.has_response_format:
        message = "cannot be kept: a verifier of this model has no text or no grammar compiler; leave it out"
        raise invalid("response_format", message)
    prompt_ids = _prompt_ids(raw, limits, text)
    max_tokens, ends_with_context = _output_limit(raw.max_tokens, len(prompt_ids), limits)
    default_stop_ids = () if raw.ignore_default_stop_ids else limits.default_stop_ids
    return ValidTurn(
        prompt_ids=prompt_ids,
        sampling=sampling,
        max_tokens=max_tokens,
        ends_with_context=ends_with_context,
        stop_ids=tuple(raw.stop_ids),
        hidden_ids=frozenset((*raw.stop_ids, *default_stop_ids)),
        stop_strings=tuple(raw.stop_strings),
        ignore_default_stop_ids=raw.ignore_default_stop_ids,
        speculation_off=raw.speculation_off,
        fixed_depth=0 if raw.speculation_off else raw.fixed_depth,
        include_rounds=raw.include_rounds,
        logprob_count=raw.logprob_count,
        response_format=raw.response_format,
    )


def check_id(name: str, value: str) -> str:
    """An id of ours in a request: 1 to 128 printable characters."""
    if not 1 <= len(value) <= MAX_ID_CHARS or not value.isprintable():
        raise invalid(name, f"is not an id of ours; send 1 to {MAX_ID_CHARS} printable characters")
    return value


def invalid(name: str, message: str, reason: Reason = Reason.INVALID_FIELD) -> Refusal:
    """A refusal that names one field."""
    return Refusal(reason, f"{name}: {message}.", violations=(FieldViolation(name, message),))


def _sampling(raw: RawTurn, vocab_size: int, draw_seed: int) -> Sampling:
    if len(raw.logit_bias) > MAX_LOGIT_BIASES:
        raise invalid(
            "sampling.logit_bias", f"has {len(raw.logit_bias)} entries; send at most {MAX_LOGIT_BIASES}"
        )
    sampling = Sampling(
        temperature=raw.temperature,
        top_k=raw.top_k,
        top_p=1.0 if raw.top_p is None else raw.top_p,
        min_p=raw.min_p,
        repetition_penalty=1.0 if raw.repetition_penalty is None else raw.repetition_penalty,
        presence_penalty=raw.presence_penalty,
        frequency_penalty=raw.frequency_penalty,
        logit_bias=tuple(sorted(raw.logit_bias.items())),
        min_tokens=raw.min_tokens,
        seed=draw_seed if raw.seed is None else raw.seed,
    )
    try:
        sampling.check(vocab_size)
    except InvalidField as error:
        raise invalid(f"sampling.{PROTO_NAMES.get(error.field, error.field)}", error.message) from error
    return sampling


def _check_stop(raw: RawTurn, vocab_size: int, text: ModelText) -> None:
    if len(raw.stop_ids) > MAX_STOP_IDS:
        raise invalid("stop.stop_token_ids", f"has {len(raw.stop_ids)} ids; send at most {MAX_STOP_IDS}")
    _check_ids("stop.stop_token_ids", raw.stop_ids, vocab_size)
    if len(raw.stop_strings) > MAX_STOP_STRINGS:
        raise invalid(
            "stop.stop_strings", f"has {len(raw.stop_strings)} strings; send at most {MAX_STOP_STRINGS}"
        )
    for string in raw.stop_strings:
        if not 1 <= len(string) <= MAX_STOP_STRING_CHARS:
            raise invalid(
                "stop.stop_strings",
                f"has one of {len(string)} characters; send 1 to {MAX_STOP_STRING_CHARS} characters each",
            )
    if raw.stop_strings and text.tokenizer is None:
        raise invalid("stop.stop_strings", f"cannot be found: {text.reason}; send stop_token_ids")


def _check_counts(raw: RawTurn) -> None:
    if raw.logprob_count is not None and not 0 <= raw.logprob_count <= MAX_LOGPROBS:
        raise invalid("logprob_count", f"is {raw.logprob_count}; send 0 to {MAX_LOGPROBS}, or leave it out")
    if raw.fixed_depth is not None and not 0 <= raw.fixed_depth <= MAX_DEPTH:
        raise invalid("speculation.fixed_depth", f"is {raw.fixed_depth}; send 0 to {MAX_DEPTH}")
    if raw.max_tokens < 0:
        raise invalid(
            "stop.max_token_count", f"is {raw.max_tokens}; send a positive number, or 0 for the default"
        )


def _prompt_ids(raw: RawTurn, limits: ModelLimits, text: ModelText) -> tuple[int, ...]:
    if raw.token_ids is not None:
        if len(raw.token_ids) > limits.context_limit:
            raise _too_long(len(raw.token_ids), limits.context_limit)
        _check_ids("tokens.token_ids", raw.token_ids, limits.vocab_size)
        ids, name = tuple(raw.token_ids), "tokens.token_ids"
    elif raw.messages is not None:
        ids, name = _chat_ids(raw.messages, limits, text), "chat.messages"
    elif raw.text is not None:
        _check_chars("text", len(raw.text), limits.prompt_limit_chars)
        ids, name = _tokenizer("text", text).encode(raw.text, add_special_tokens=True), "text"
        _check_ids(name, ids, limits.vocab_size)
    else:
        raise invalid("input", "is not set; send text, chat or tokens")
    if not ids:
        raise invalid(name, "gives no token; send at least one")
    return ids


def _chat_ids(messages: Sequence[Message], limits: ModelLimits, text: ModelText) -> tuple[int, ...]:
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise invalid("chat.messages", f"has {len(messages)} messages; send 1 to {MAX_MESSAGES}")
    for index, message in enumerate(messages):
        role = message.role
        if not 1 <= len(role) <= MAX_ROLE_CHARS or not role.replace("_", "a").isalnum():
            raise invalid(
                f"chat.messages[{index}].role",
                f"is {role[:MAX_ROLE_CHARS]!r}; send 1 to {MAX_ROLE_CHARS} letters, digits or underscores",
            )
    _check_chars(
        "chat.messages", sum(len(message.content) for message in messages), limits.prompt_limit_chars
    )
    tokenizer = _tokenizer("chat", text)
    if text.chat is None:
        raise invalid("chat", f"cannot be used: {text.chat_reason}; send text or tokens")
    ids = tokenizer.encode(text.chat(messages), add_special_tokens=False)
    _check_ids("chat.messages", ids, limits.vocab_size)
    return ids


def _tokenizer(name: str, text: ModelText) -> Tokenizer:
    if text.tokenizer is None:
        raise invalid(name, f"cannot be used: {text.reason}; send tokens")
    return text.tokenizer


def _output_limit(asked: int, prompt_count: int, limits: ModelLimits) -> tuple[int, bool]:
    room = limits.context_limit - prompt_count
    if room < 1:
        raise _too_long(prompt_count, limits.context_limit)
    if asked > room:
        raise invalid(
            "stop.max_token_count",
            f"is {asked}, but after {prompt_count} prompt tokens the context limit of {limits.context_limit} leaves "
            f"{room}; send at most {room}, or 0",
            Reason.CONTEXT_EXCEEDED,
        )
    if asked:
        return asked, False
    return min(room, limits.default_max_tokens), room <= limits.default_max_tokens


def _too_long(prompt_count: int, context_limit: int) -> Refusal:
    message = f"has {prompt_count} tokens, but the model's context limit is {context_limit}, output included; send a shorter one"
    return invalid("input", message, Reason.CONTEXT_EXCEEDED)


def _check_chars(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise invalid(name, f"has {count} characters; send at most {limit}", Reason.TOO_LARGE)


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    # min and max run in C: the common, good case costs no Python a token.
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        bad = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise invalid(name, f"names token {bad}; send ids of the vocabulary, 0 to {vocab_size - 1}")
