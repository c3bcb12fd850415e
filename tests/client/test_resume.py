"""Streams that break and go on: by themselves, by another client, wherever they are cut; and turns that nobody listens to."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparkrelay
from sparkrelay.client import Cancelled, Generation, NotFound, ResumeLost, Unavailable
from sparkrelay.client.retries import RetryBudget, RetryPolicy
from sparkrelay.errors import refusal_of
from sparkrelay.outcomes import Reason
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import gateway_service_pb2_grpc as gateway_grpc
from tests.client.cutting_proxy import cutting_proxy
from tests.gateway.fake_verifier import continuation, running

PROMPT = (5, 9, 11)
PATIENT = RetryPolicy(lambda: 0.5, resume_pauses_s=(0.02,) * 100, budget=RetryBudget(10_000.0))
CUTS = st.lists(st.integers(1, 2000), min_size=1, max_size=8)


def blocking_turn(address: str) -> Generation:
    with sparkrelay.connect(address) as client:
        client.policy = PATIENT
        return client.generate(token_ids=PROMPT, max_tokens=100, seed=1, include_rounds=True, logprobs=0)


async def aio_turn(address: str) -> Generation:
    async with sparkrelay.aio.connect(address) as client:
        client.policy = PATIENT
        return await client.generate(
            token_ids=PROMPT, max_tokens=100, seed=1, include_rounds=True, logprobs=0
        )


def shown(whole: Generation) -> tuple[object, ...]:
    return whole.token_ids, whole.text, whole.rounds, whole.logprobs, whole.finish_reason, whole.usage.output


@given(CUTS, st.booleans())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wherever_the_connection_is_cut_the_turn_is_the_undisturbed_one_and_ran_once(
    cuts: list[int], blocking: bool
) -> None:
    async def turns() -> None:
        async with running() as stack, cutting_proxy(stack.address, cuts) as proxy:
            undisturbed = await aio_turn(stack.address)
            assert undisturbed.token_ids == continuation(PROMPT, 100)
            turn = (
                await asyncio.to_thread(blocking_turn, proxy.address)
                if blocking
                else await aio_turn(proxy.address)
            )
            assert shown(turn) == shown(undisturbed)
            assert proxy.cut_count > 0
            assert len(stack.verifier.requests) == 2

    asyncio.run(turns())


async def test_a_cut_in_the_middle_of_a_held_turn_is_resumed_from_the_token_that_is_missing() -> None:
    async with running({"hold_after": 4}) as stack, cutting_proxy(stack.address) as proxy:
        async with sparkrelay.aio.connect(proxy.address) as client:
            client.policy = PATIENT
            async with client.generate_stream(token_ids=PROMPT, max_tokens=12) as stream:
                deltas = aiter(stream)
                first = await anext(deltas)
                proxy.cut_all()
                reading = asyncio.create_task(collect(deltas))
                stack.verifier.go_on.set()
                tokens = [*first.token_ids, *await reading]
            assert tuple(tokens) == continuation(PROMPT, 12) == (await stream.result()).token_ids
        assert (proxy.cut_count, len(stack.verifier.requests)) == (1, 1)


async def collect(deltas: object) -> list[int]:
    return [token for delta in [each async for each in deltas] for token in delta.token_ids]  # type: ignore[attr-defined]


async def test_with_resume_off_a_cut_is_an_error_and_the_turn_ends_with_its_stream() -> None:
    async with (
        running({"hold_after": 4}) as stack,
        cutting_proxy(stack.address) as proxy,
        sparkrelay.aio.connect(proxy.address) as client,
    ):
        async with client.generate_stream(token_ids=PROMPT, max_tokens=12, resume=False) as stream:
            proxy.cut_all()
            with pytest.raises(Unavailable) as broken:
                await stream.result()
        assert broken.value.turn_id == stream.started.turn_id
        await stack.until(lambda: stack.verifier.cancelled == [stream.started.turn_id])


async def test_when_the_gateway_stays_away_the_error_says_that_the_turn_could_not_be_resumed() -> None:
    async with (
        running({"hold_after": 4}) as stack,
        cutting_proxy(stack.address) as proxy,
        sparkrelay.aio.connect(proxy.address) as client,
    ):
        client.policy = RetryPolicy(lambda: 0.5, resume_pauses_s=(0.01,) * 3)
        async with client.generate_stream(token_ids=PROMPT, max_tokens=12) as stream:
            proxy.target = "127.0.0.1:1"
            proxy.cut_all()
            with pytest.raises(Unavailable, match="could not be resumed") as broken:
                await stream.result()
        assert (broken.value.reason, broken.value.turn_id) == ("RESUME_LOST", stream.started.turn_id)


async def test_another_client_takes_a_turn_over_and_the_first_one_is_told() -> None:
    async with (
        running({"hold_after": 4}) as stack,
        sparkrelay.aio.connect(stack.address) as client,
        client.generate_stream(token_ids=PROMPT, max_tokens=12) as stream,
    ):
        deltas = aiter(stream)
        first = await anext(deltas)
        async with client.resume(stream.started.turn_id, stream.next_index) as second:
            assert second.started == stream.started
            with pytest.raises(Cancelled, match="Another stream") as superseded:
                _ = [delta async for delta in deltas]
            assert superseded.value.reason == "SUPERSEDED"
            stack.verifier.go_on.set()
            rest = await second.result()
        assert first.token_ids + rest.token_ids == continuation(PROMPT, 12)
        assert rest.usage.output == 12


def resume_blocking(address: str, turn_id: str, next_index: int) -> Generation:
    with sparkrelay.connect(address) as client, client.resume(turn_id, next_index) as stream:
        return stream.result


async def test_a_turn_that_is_over_is_resumed_from_any_token_for_a_while() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        whole = await client.generate(token_ids=PROMPT, max_tokens=9)
        for next_index in range(10):
            again = await asyncio.to_thread(resume_blocking, stack.address, whole.turn_id, next_index)
            assert again.token_ids == whole.token_ids[next_index:]
            assert (again.finish_reason, again.usage, again.seed) == ("length", whole.usage, whole.seed)
        with pytest.raises(ResumeLost, match="only 9 tokens"):
            await client.resume(whole.turn_id, 10).result()
        stack.desk.journal.expire(stack.desk.outside.clock_us() + 121_000_000)
        with pytest.raises(NotFound, match="same seed"):
            await client.resume(whole.turn_id).result()
        unresumable = await client.generate(token_ids=PROMPT, max_tokens=2, resume=False)
        with pytest.raises(NotFound, match="linger_ms"):
            await client.resume(unresumable.turn_id).result()


async def test_a_turn_that_failed_fails_again_when_it_is_resumed() -> None:
    async with running({"hold_after": 4}) as stack, sparkrelay.aio.connect(stack.address) as client:
        async with client.generate_stream(token_ids=PROMPT, max_tokens=12) as stream:
            await stack.verifier.die()
            with pytest.raises(Unavailable) as failed:
                await stream.result()
        with pytest.raises(Unavailable) as again:
            await client.resume(stream.started.turn_id).result()
        assert (again.value.reason, again.value.trace_id) == (failed.value.reason, failed.value.trace_id)


async def test_a_turn_that_nobody_listens_to_is_cancelled_when_its_time_is_over() -> None:
    async with running({"hold_after": 4}) as stack, sparkrelay.aio.connect(stack.address) as client:
        request = gateway_pb.GenerateRequest(tokens=gateway_pb.TokenIds(token_ids=PROMPT), linger_ms=50)
        call = client._gateway.Generate(request)
        started = (await call.read()).started
        assert started.turn_id
        call.cancel()
        await stack.until(lambda: stack.verifier.cancelled == [started.turn_id])
        with pytest.raises(Cancelled, match="nobody listened"):
            await client.resume(started.turn_id).result()
        assert (await client.get_turn(started.turn_id)).finish_reason == "cancelled"


async def test_a_resume_in_time_keeps_a_turn_alive() -> None:
    async with running({"hold_after": 4}) as stack, sparkrelay.aio.connect(stack.address) as client:
        request = gateway_pb.GenerateRequest(
            tokens=gateway_pb.TokenIds(token_ids=PROMPT),
            linger_ms=120_000,
            turn_id="a turn with a name of its own",
        )
        request.stop.max_token_count = 9
        call = client._gateway.Generate(request)
        assert (await call.read()).started.turn_id == request.turn_id
        call.cancel()
        async with client.resume(request.turn_id) as stream:
            stack.verifier.go_on.set()
            assert (await stream.result()).token_ids == continuation(PROMPT, 9)
        assert stack.verifier.cancelled == []


async def test_a_turn_is_cancelled_by_its_id_and_its_listener_is_told() -> None:
    async with running({"hold_after": 4}) as stack, sparkrelay.aio.connect(stack.address) as client:
        for resume in (True, False):
            async with client.generate_stream(token_ids=PROMPT, max_tokens=12, resume=resume) as stream:
                await client.cancel_turn(stream.started.turn_id)
                with pytest.raises(Cancelled, match="CancelTurn") as cancelled:
                    await stream.result()
                assert cancelled.value.turn_id == stream.started.turn_id
            assert (await client.get_turn(stream.started.turn_id)).finish_reason == "cancelled"
            await client.cancel_turn(stream.started.turn_id)
        assert len(stack.verifier.cancelled) == 2
        with pytest.raises(NotFound):
            await client.cancel_turn("turn-unknown")


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("linger_ms", gateway_pb.GenerateRequest(text="x", linger_ms=-1)),
        ("linger_ms", gateway_pb.GenerateRequest(text="x", linger_ms=120_001)),
        ("linger_ms", gateway_pb.GenerateRequest(resume=gateway_pb.Resume(turn_id="t"), linger_ms=120_001)),
        ("resume.turn_id", gateway_pb.GenerateRequest(resume=gateway_pb.Resume(turn_id=""))),
        (
            "resume.next_index",
            gateway_pb.GenerateRequest(resume=gateway_pb.Resume(turn_id="t", next_index=-1)),
        ),
        ("turn_id", gateway_pb.GenerateRequest(text="x", turn_id="too short")),
        ("turn_id", gateway_pb.GenerateRequest(text="x", turn_id="too short", linger_ms=5)),
    ],
)
async def test_bad_fields_of_a_resumable_turn_are_named(
    field: str, request_: gateway_pb.GenerateRequest
) -> None:
    async with running() as stack, grpc.aio.insecure_channel(stack.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway_grpc.GatewayServiceStub(channel).Generate(request_).read()
        refusal = refusal_of(refused.value)
        assert refusal.reason is Reason.INVALID_FIELD
        assert [violation.field for violation in refusal.violations] == [field]


async def test_an_id_that_is_known_is_not_taken_twice() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        whole = await client.generate(token_ids=PROMPT, max_tokens=2)
        request = gateway_pb.GenerateRequest(
            tokens=gateway_pb.TokenIds(token_ids=PROMPT), turn_id=whole.turn_id
        )
        for linger_ms in (0, 10):
            request.linger_ms = linger_ms
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await client._gateway.Generate(request).read()
            assert refusal_of(refused.value).violations[0].field == "turn_id"
        assert len(stack.verifier.requests) == 1
