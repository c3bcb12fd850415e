"""Requests whose bytes are no message: refused like every other bad request, by every service in the same way.

gRPC alone would answer UNKNOWN with the parser's exception in the text, and would end a stream of many sessions for one bad
frame.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from sparkrelay.errors import abort
from sparkrelay.outcomes import Refusal
from sparkrelay.telemetry import from_metadata
from sparkrelay.wire.values import invalid

T = TypeVar("T")


class Unreadable:
    """What a servicer finds in place of a request that could not be parsed."""

    __slots__ = ("refusal",)

    def __init__(self, error: DecodeError) -> None:
        # The text names the message type and what was wrong with its bytes; nothing of their content.
        self.refusal = invalid("request", f"cannot be read: {error}; send a message of this type")


def readable(request: T | Unreadable) -> T:
    """The request. Raises Refusal(INVALID_FIELD) if it could not be parsed."""
    if isinstance(request, Unreadable):
        raise request.refusal
    return request


class RefuseUnreadable(grpc.aio.ServerInterceptor):
    """Refuses unreadable requests of unary kind. Those of a stream reach the servicer as `Unreadable`, between the others."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        deserializer = _tolerant(handler.request_deserializer)
        serializer = handler.response_serializer
        if handler.stream_stream is not None and _is_async(handler.stream_stream):
            return grpc.stream_stream_rpc_method_handler(handler.stream_stream, deserializer, serializer)
        if handler.unary_stream is not None and _is_async(handler.unary_stream):
            return grpc.unary_stream_rpc_method_handler(
                _stream(handler.unary_stream), deserializer, serializer
            )
        if handler.unary_unary is not None and _is_async(handler.unary_unary):
            return grpc.unary_unary_rpc_method_handler(_call(handler.unary_unary), deserializer, serializer)
        return handler  # reflection, which is not ours and answers for itself


def _tolerant(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError as error:
            return Unreadable(error)

    return read


def _is_async(behavior: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(behavior) or inspect.isasyncgenfunction(behavior)


def _call(behavior: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def answer(request: Any, context: Any) -> Any:
        await _refuse_unreadable(request, context)
        return await behavior(request, context)

    return answer


def _stream(behavior: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """gRPC tells by the kind of function how a servicer answers, so the wrapper is of the same kind."""
    if inspect.iscoroutinefunction(behavior):
        return _call(behavior)

    async def answers(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        await _refuse_unreadable(request, context)
        async with aclosing(behavior(request, context)) as responses:
            async for response in responses:
                yield response

    return answers


async def _refuse_unreadable(request: Any, context: Any) -> None:
    if isinstance(request, Unreadable):
        await _abort(context, request.refusal)


async def _abort(context: Any, refusal: Refusal) -> None:
    trace = from_metadata(context.invocation_metadata())
    refusal.trace_id = trace.trace_id if trace is not None else ""
    await abort(context, refusal)
