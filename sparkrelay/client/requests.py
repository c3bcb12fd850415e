"""From what a caller writes to a request of the gateway; what cannot be sent is refused here, in the gateway's own words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparkrelay.client.errors import InvalidRequest
from sparkrelay.client.formats import response_format_pb
from sparkrelay.outcomes import FieldViolation, Reason
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import generation_pb2 as generation_pb

Message = Mapping[str, str]

# How long a turn goes on without its stream, so that it can be resumed.
LINGER_MS = 30_000


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Everything a turn may be asked for. Zero and None are neutral: greedy decoding without filters.

    prompt, messages, token_ids  exactly one of them; messages are {"role": ..., "content": ...}
    model          empty if only one is served
    max_tokens     0: as many as the context allows, at most the gateway's default
    seed           None: the gateway draws one and reports it
    stop           strings that end the turn and are not shown
    speculation    "auto", "off" or "fixed:K" with K from 0 to 15
    logprobs       None for none, else how many most likely tokens to report at each position, 0 to 20
    include_rounds True: every delta carries the rounds that committed its tokens
    response_format  what shape the text must have: json_schema(...), regex(...), lark(...), or a pydantic model class
    resume         True: when the connection breaks, the turn goes on and the stream is taken up again by itself; False: the turn
                   ends with its stream
    timeout        seconds for the whole turn, None for the client's
    """

    prompt: str | None = None
    messages: Sequence[Message] | None = None
    token_ids: Sequence[int] | None = None
    model: str = ""
    max_tokens: int = 0
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
    stop: Sequence[str] | str = ()
    stop_token_ids: Sequence[int] = ()
    ignore_default_stop_ids: bool = False
    speculation: str = "auto"
    logprobs: int | None = None
    include_rounds: bool = False
    response_format: Mapping[str, Any] | type | None = None
    resume: bool = True
    timeout: float | None = None


def generate_request(options: GenerateOptions, session_id: str = "") -> gateway_pb.GenerateRequest:
    """Raises InvalidRequest, naming the field, for what no request can hold."""
    request = gateway_pb.GenerateRequest(
        model=options.model,
        session_id=session_id,
        include_rounds=options.include_rounds,
        linger_ms=LINGER_MS if options.resume else 0,
    )
    _set_input(request, options)
    try:
        request.sampling.CopyFrom(_sampling(options))
        request.stop.CopyFrom(_stop(options))
        if options.logprobs is not None:
            request.logprob_count = options.logprobs
    except (ValueError, TypeError) as error:
        raise _invalid("sampling", f"cannot be sent: {error}") from error
    request.speculation.CopyFrom(_speculation(options.speculation))
    _set_format(request, options)
    return request


def _set_format(request: gateway_pb.GenerateRequest, options: GenerateOptions) -> None:
    try:
        message = response_format_pb(options.response_format)
    except (ValueError, TypeError) as error:  # text that UTF-8 cannot hold
        raise _invalid("response_format", f"cannot be sent: {error}") from error
    if message is not None:
        request.response_format.CopyFrom(message)


def resume_request(turn_id: str, next_index: int) -> gateway_pb.GenerateRequest:
    """Asks for the rest of a turn."""
    try:
        resume = gateway_pb.Resume(turn_id=turn_id, next_index=next_index)
    except (ValueError, TypeError) as error:
        raise _invalid("resume", f"cannot be sent: {error}") from error
    return gateway_pb.GenerateRequest(resume=resume, linger_ms=LINGER_MS)


def chat_messages(message: str | Sequence[Message], earlier: Sequence[Message] = ()) -> list[Message]:
    """A conversation and what comes next in it: a user's message, or messages as they are."""
    if isinstance(message, str):
        return [*earlier, {"role": "user", "content": message}]
    return [*earlier, *message]


def _set_input(request: gateway_pb.GenerateRequest, options: GenerateOptions) -> None:
    given = [options.prompt is not None, options.messages is not None, options.token_ids is not None]
    if sum(given) != 1:
        raise _invalid("input", "give exactly one of prompt, messages and token_ids")
    try:
        if options.prompt is not None:
            request.text = options.prompt
        elif options.messages is not None:
            request.chat.messages.extend(_chat_messages(options.messages))
        elif options.token_ids is not None:
            request.tokens.token_ids.extend(options.token_ids)
            request.tokens.SetInParent()
    except (ValueError, TypeError) as error:
        raise _invalid("input", f"cannot be sent: {error}") from error


def _chat_messages(messages: Iterable[Message]) -> list[gateway_pb.ChatMessage]:
    result = []
    for index, message in enumerate(messages):
        if set(message) != {"role", "content"}:
            raise _invalid(
                f"chat.messages[{index}]", "has other keys than role and content; send just these two"
            )
        result.append(gateway_pb.ChatMessage(role=message["role"], content=message["content"]))
    return result


def _sampling(options: GenerateOptions) -> generation_pb.Sampling:
    return generation_pb.Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=options.logit_bias,
        min_token_count=options.min_tokens,
        seed=options.seed,
    )


def _stop(options: GenerateOptions) -> generation_pb.StopConditions:
    return generation_pb.StopConditions(
        max_token_count=options.max_tokens,
        stop_token_ids=options.stop_token_ids,
        stop_strings=[options.stop] if isinstance(options.stop, str) else options.stop,
        ignore_default_stop_ids=options.ignore_default_stop_ids,
    )


def _speculation(text: str) -> generation_pb.Speculation:
    name, _, depth = text.partition(":")
    if text == "auto":
        return generation_pb.Speculation(mode=generation_pb.Speculation.MODE_AUTO)
    if text == "off":
        return generation_pb.Speculation(mode=generation_pb.Speculation.MODE_OFF)
    if name == "fixed" and depth.isascii() and depth.isdigit() and int(depth) <= 15:
        return generation_pb.Speculation(mode=generation_pb.Speculation.MODE_FIXED, fixed_depth=int(depth))
    raise _invalid("speculation", f"is {text!r}; send auto, off, or fixed:K with K from 0 to 15")


def _invalid(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name}: {message}", reason=Reason.INVALID_FIELD.name, violations=(FieldViolation(name, message),)
    )
