"""Bytes that are no message: refused by name over every kind of call, and a stream that brings other things goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from sparkrelay.errors import refusal_of
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.server import SERVER_INTERCEPTORS
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.v1 import verifier_service_pb2_grpc as pb2_grpc
from sparkrelay.wire import readable

SERVICE = "/sparkrelay.v1.VerifierService/"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
BROKEN = (
    b"\xff\xff\xff",
    b"\x0a\x02\xff\xfe",
    b"\x0a\x03\xed\xa0\x80",
)  # no message; no UTF-8; a lone surrogate


class Echo(pb2_grpc.VerifierServiceServicer):
    """One call of each kind: a unary one, a generator, one that writes, and a stream that counts what it could not read."""

    async def EndSession(self, request: Any, context: Any) -> Any:
        return pb2.VerifierServiceEndSessionResponse()

    async def WatchLoad(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield pb2.VerifierServiceWatchLoadResponse(epoch="1")
        yield pb2.VerifierServiceWatchLoadResponse(epoch="2")

    async def Generate(self, request: Any, context: Any) -> None:
        await context.write(pb2.VerifierServiceGenerateResponse())

    async def Speculate(self, requests: AsyncIterator[Any], context: Any) -> None:
        async for request in requests:
            try:
                sequence = readable(request).ping.sequence
            except Refusal:
                sequence = -1
            await context.write(pb2.SpeculateResponse(pong=pb2.Pong(sequence=sequence)))

    async def FeedContext(self, requests: Any, context: Any) -> None: ...
    async def Describe(self, request: Any, context: Any) -> Any: ...
    async def ForkSession(self, request: Any, context: Any) -> Any: ...


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=SERVER_INTERCEPTORS)
    pb2_grpc.add_VerifierServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await server.stop(0)


CASES = [(name, data) for name in ("EndSession", "Generate") for data in BROKEN] + [("WatchLoad", BROKEN[0])]


@pytest.mark.parametrize(("name", "data"), CASES)
async def test_a_request_that_cannot_be_read_is_an_invalid_field_with_the_callers_trace(
    channel: grpc.aio.Channel, name: str, data: bytes
) -> None:
    metadata = (("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01"),)
    call: Any
    if name == "EndSession":
        call = channel.unary_unary(SERVICE + name)(data, metadata=metadata)
    else:
        call = channel.unary_stream(SERVICE + name)(data, metadata=metadata).read()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    refusal = refusal_of(refused.value)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (refusal.reason, refusal.trace_id) == (Reason.INVALID_FIELD, TRACE_ID)
    assert refusal.violations[0].field == "request"
    assert "sparkrelay.v1" in refusal.message


async def test_calls_that_can_be_read_are_answered_as_before(channel: grpc.aio.Channel) -> None:
    stub: Any = pb2_grpc.VerifierServiceStub(channel)
    assert await stub.EndSession(pb2.VerifierServiceEndSessionRequest(session_id="s")) is not None
    reports = [each.epoch async for each in stub.WatchLoad(pb2.VerifierServiceWatchLoadRequest())]
    assert reports == ["1", "2"]
    assert len([each async for each in stub.Generate(pb2.VerifierServiceGenerateRequest())]) == 1


async def test_a_stream_goes_on_after_a_frame_that_cannot_be_read(channel: grpc.aio.Channel) -> None:
    call = channel.stream_stream(SERVICE + "Speculate", None, pb2.SpeculateResponse.FromString)()
    pongs = []
    async with asyncio.timeout(10):
        for data in (pb2.SpeculateRequest(ping=pb2.Ping(sequence=7)).SerializeToString(), *BROKEN[:2], b""):
            await call.write(data)
            pongs.append((await call.read()).pong.sequence)
    await call.done_writing()
    assert pongs == [7, -1, -1, 0]
