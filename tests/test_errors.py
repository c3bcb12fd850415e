"""Refusals cross the wire whole, over both kinds of stubs; foreign errors become the nearest reason."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from sparkrelay.errors import STATUS_OF, abort, refusal_of
from sparkrelay.outcomes import FieldViolation, Reason, Refusal
from sparkrelay.v1 import errors_pb2


def identity(data: bytes) -> bytes:
    return data


@asynccontextmanager
async def refusing(refusal: Refusal | None) -> AsyncIterator[str]:
    """A server whose one call aborts with the refusal, or raises if there is none; its address."""

    async def call(request: bytes, context: Any) -> bytes:
        if refusal is None:
            raise ZeroDivisionError
        await abort(context, refusal)

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(call, identity, identity)  # type: ignore[arg-type]
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.T", {"Call": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def failure(address: str, method: str = "/test.T/Call") -> grpc.RpcError:
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await channel.unary_unary(method, identity, identity)(b"")
    return caught.value


def blocking_failure(address: str) -> grpc.RpcError:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/test.T/Call", identity, identity)(b"", timeout=5)
    return caught.value


REFUSAL = Refusal(
    Reason.OVERLOADED,
    "busy; try again",
    violations=(FieldViolation("stop.max_token_count", "is 0"), FieldViolation("turn_id", "is empty")),
    retry_after_ms=1500,
    turn_id="turn-7",
    trace_id="ab" * 16,
)


async def test_a_refusal_arrives_with_all_it_says_at_both_kinds_of_stubs() -> None:
    async with refusing(REFUSAL) as address:
        errors = [await failure(address), await asyncio.to_thread(blocking_failure, address)]
    for error in errors:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
        assert vars(refusal_of(error)) == vars(REFUSAL)


async def test_a_huge_refusal_is_cut_and_still_arrives() -> None:
    violations = tuple(FieldViolation("f" * 100, "m" * 10_000) for _ in range(100))
    async with refusing(Refusal(Reason.INVALID_FIELD, "x" * 100_000, violations=violations)) as address:
        refusal = refusal_of(await failure(address))
    assert refusal.reason is Reason.INVALID_FIELD and refusal.message.startswith("xxx") and refusal.violations


async def test_errors_that_are_not_ours_become_the_nearest_reason() -> None:
    async with refusing(None) as address:
        assert refusal_of(await failure(address)).reason is Reason.INTERNAL
        assert refusal_of(await failure(address, "/test.T/Nothing")).reason is Reason.NOT_IMPLEMENTED
    gone = refusal_of(await failure(address))
    assert gone.reason is Reason.UNSPECIFIED and gone.message
    assert refusal_of(grpc.RpcError()).reason is Reason.INTERNAL


class Foreign(grpc.RpcError):
    """An error with details that are not ours."""

    def __init__(self, trailing: Any) -> None:
        self._trailing = trailing

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.DEADLINE_EXCEEDED

    def details(self) -> str:
        return "late"

    def trailing_metadata(self) -> Any:
        return self._trailing


GARBAGE: list[Any] = [
    None,
    (),
    (("grpc-status-details-bin", b"\xff\xff\xff"),),
    (("grpc-status-details-bin", b""),),
    (("grpc-status-details-bin", "text"),),
]


@pytest.mark.parametrize("trailing", GARBAGE)
def test_details_that_cannot_be_read_leave_the_status(trailing: Any) -> None:
    refusal = refusal_of(Foreign(trailing))
    assert refusal.reason is Reason.DEADLINE_EXCEEDED and refusal.message == "late"


def test_every_reason_has_a_status_and_a_number_of_the_proto() -> None:
    assert set(STATUS_OF) == set(Reason)
    assert {reason.name: reason.value for reason in Reason} == {
        name.removeprefix("REASON_"): number for name, number in errors_pb2.Reason.items()
    }
