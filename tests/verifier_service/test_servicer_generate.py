"""Generate, Describe, WatchLoad and EndSession over a real server, with the toy model and no drafter."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from sparkrelay import wire
from sparkrelay.errors import refusal_of
from sparkrelay.outcomes import BlockState, Reason
from sparkrelay.sampling import Sampling
from sparkrelay.telemetry import new_trace_context, to_metadata
from sparkrelay.v1 import generation_pb2
from sparkrelay.v1 import verifier_service_pb2 as pb2
from tests.verifier_service.servicer_rig import (
    RawDrafter,
    Rig,
    SlowToyModel,
    request,
    rig,
    rounds,
    token_ids,
)
from verifier_service.events import Committed, Round, TokenLogprob
from verifier_service.models.toy import ToyModel
from verifier_service.servicer import FRAME_LIMIT_BYTES, VerifierIdentity
from verifier_service.servicer.generate import COMMIT_LIMIT, _responses
from verifier_service.servicer.validation import LOGPROB_LIMIT


async def refused(rig: Rig, message: Any, **call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.generate(message, **call)
    return refusal_of(caught.value)


async def rest_of(call: Any) -> list[pb2.VerifierServiceGenerateResponse]:
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def test_a_turn_starts_commits_without_gaps_and_finishes() -> None:
    async with rig() as verifier:
        trace = new_trace_context()
        responses = await verifier.generate(request(max_tokens=9), metadata=to_metadata(trace))
    assert responses[0].started.turn_id == "t1" and responses[0].started.epoch == "epoch"
    assert responses[0].started.trace_id == trace.trace_id and responses[0].started.prompt_token_count == 3
    starts = [(c.start, len(c.token_ids)) for each in responses for c in wire.commits(each.committed)]
    assert [start for start, _ in starts] == [3 + sum(n for _, n in starts[:i]) for i in range(len(starts))]
    assert len(token_ids(responses)) == 9
    assert [each.index for each in rounds(responses)] == list(range(8))
    finished = responses[-1].finished
    assert finished.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    assert (finished.usage.output_token_count, finished.session_token_count) == (9, 12)


async def test_the_next_turn_goes_on_from_the_kept_tokens() -> None:
    async with rig() as verifier:
        first = token_ids(await verifier.generate(request(max_tokens=5)))
        second = await verifier.generate(request("t2", kept=[1, 2, 3, *first[:2]], ids=[7], max_tokens=4))
        alone = await verifier.generate(
            request("t3", session="s2", ids=[1, 2, 3, *first[:2], 7], max_tokens=4)
        )
    assert second[0].started.cached_token_count == 5
    assert token_ids(second) == token_ids(alone)


async def test_log_probabilities_come_with_their_tokens() -> None:
    async with rig() as verifier:
        responses = await verifier.generate(request(max_tokens=3, logprob_count=2))
    logprobs = [each for r in responses for c in wire.commits(r.committed) for each in c.logprobs]
    assert [each.token_id for each in logprobs] == token_ids(responses)
    assert all(len(each.top) == 2 and each.top[0].logprob >= each.top[1].logprob for each in logprobs)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("session_id", {"session": ""}),
        ("session_id", {"session": "x" * 129}),
        ("turn_id", {"turn": ""}),
        ("append_token_ids", {"ids": ()}),
        ("append_token_ids", {"ids": (1, 64)}),
        ("append_token_ids", {"ids": (-1,)}),
        ("stop.max_token_count", {"max_tokens": 0}),
        ("sampling.temperature", {"sampling": Sampling(temperature=101.0)}),
        ("sampling.temperature", {"sampling": Sampling(temperature=float("nan"))}),
        ("drafter_ids", {"drafters": ["d"] * 17}),
        ("noise_version", {"noise_version": 2}),
        ("logprob_count", {"logprob_count": 21}),
        ("speculation.fixed_depth", {"speculation": 16}),
    ],
)
async def test_a_field_that_cannot_be_served_is_named(field: str, change: dict[str, Any]) -> None:
    if isinstance(change.get("speculation"), int):
        mode = generation_pb2.Speculation.MODE_FIXED
        change["speculation"] = generation_pb2.Speculation(mode=mode, fixed_depth=change["speculation"])
    async with rig() as verifier:
        trace = new_trace_context()
        refusal = await refused(verifier, request(**change), metadata=to_metadata(trace))
    assert refusal.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in refusal.violations] == [field]
    assert refusal.trace_id == trace.trace_id and refusal.turn_id == change.get("turn", "t1")


async def test_what_only_the_engine_knows_is_refused_with_its_reason() -> None:
    async with rig() as verifier:
        unknown = await refused(verifier, request(kept=[1, 2]))
        await verifier.generate(request("t2"))
        mismatch = await refused(verifier, request("t3", kept=[3, 2, 1]))
        long = await refused(verifier, request("t4", ids=[1] * 4096))
    assert unknown.reason is Reason.SESSION_NOT_FOUND and unknown.turn_id == "t1"
    assert mismatch.reason is Reason.PREFIX_MISMATCH
    assert long.reason is Reason.CONTEXT_EXCEEDED


async def test_a_turn_and_a_session_run_once_at_a_time() -> None:
    async with rig(model=SlowToyModel()) as verifier:
        running = verifier.stub.Generate(request(max_tokens=4000))
        await running.read()
        same_turn = await refused(verifier, request("t1", session="s2"))
        same_session = await refused(verifier, request("t2"))
        running.cancel()
    assert same_turn.reason is Reason.SESSION_BUSY and same_session.reason is Reason.SESSION_BUSY


async def test_a_cancelled_or_late_call_frees_its_session() -> None:
    async with rig(model=SlowToyModel()) as verifier:
        running = verifier.stub.Generate(request(max_tokens=4000))
        await running.read()
        running.cancel()
        await verifier.load_where(lambda load: load.session_count == 1 and load.active_turn_count == 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await verifier.generate(request("t2", session="s2", max_tokens=4000), timeout=0.05)
        assert refusal_of(caught.value).reason is Reason.DEADLINE_EXCEEDED
        await verifier.load_where(lambda load: load.active_turn_count == 0)
        assert token_ids(await verifier.generate(request("t3", session="s2")))


async def test_ending_a_session_forgets_it_and_an_unknown_one_is_no_error() -> None:
    async with rig() as verifier:
        await verifier.generate(request())
        for session in ("s1", "s1", "never"):
            await verifier.stub.EndSession(pb2.VerifierServiceEndSessionRequest(session_id=session))
        await verifier.load_where(lambda load: load.session_count == 0 and load.used_block_count == 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await verifier.stub.EndSession(pb2.VerifierServiceEndSessionRequest())
    assert refusal_of(caught.value).reason is Reason.INVALID_FIELD


async def test_describe_says_what_drafters_must_fit() -> None:
    async with rig(policy="fixed:3") as verifier:
        described = await verifier.stub.Describe(pb2.VerifierServiceDescribeRequest())
    assert described.model_id == described.fingerprint.target_id == "toy"
    assert described.vocab_size == described.fingerprint.vocab_size == 64
    assert described.exact and described.depth_policy == "fixed:3" and described.block_count == 4096


async def test_a_time_of_hours_fits_into_a_load_report() -> None:
    async with rig() as verifier:
        drafter = await RawDrafter(verifier).connect()
        (known,) = verifier.servicer._hub.drafters.all()
        known.turnaround_us = known.round_trip_us = 2**40
        report = await verifier.load_where(lambda load: len(load.drafters) == 1)
        await drafter.close()
    assert report.drafters[0].turnaround_us == report.drafters[0].round_trip_us == 2**31 - 1


def test_commits_that_waited_for_a_slow_reader_travel_in_messages_that_a_gateway_takes() -> None:
    logprobs = tuple(TokenLogprob(2**17, -1.5, ((2**17, -1.5),) * LOGPROB_LIMIT) for _ in range(16))
    report = Round(
        2**20, 2**20, 15, 15, 15, BlockState.FRESH, (0.5,) * 15, 2**40, 2**40, 9, 9, 99, 99, 9, "d"
    )
    count = 3 * COMMIT_LIMIT + 1
    commits = [Committed("t", 16 * i, (2**17,) * 16, report, logprobs) for i in range(count)]
    responses = list(_responses(commits, VerifierIdentity("v", "e", ToyModel().info), ""))
    assert len(token_ids(responses)) == 16 * count
    assert max(response.ByteSize() for response in responses) < FRAME_LIMIT_BYTES
    assert {(each.wait_us, each.verify_us) for each in rounds(responses)} == {(2**31 - 1, 2**31 - 1)}


async def test_many_turns_at_once_all_get_all_their_tokens() -> None:
    async with rig() as verifier:
        requests = [request(f"t{i}", session=f"s{i}", ids=[i % 64], max_tokens=40) for i in range(40)]
        answers = await asyncio.gather(*map(verifier.generate, requests))
    assert [len(token_ids(answer)) for answer in answers] == [40] * 40
    assert all(len(answer) <= 3 + 40 for answer in answers)


async def test_a_drain_lets_a_short_turn_finish_and_refuses_new_ones() -> None:
    async with rig(model=SlowToyModel()) as verifier:
        running = verifier.stub.Generate(request(max_tokens=300))
        await running.read()
        drain = asyncio.create_task(verifier.servicer.drain(20.0))
        await verifier.load_where(lambda load: load.draining)
        refusal = await refused(verifier, request("t2", session="s2"))
        rest = await rest_of(running)
        await drain
    assert refusal.reason is Reason.DRAINING
    assert rest[-1].HasField("finished") and len(token_ids(rest)) >= 299


async def test_a_drain_cancels_what_does_not_finish_in_time() -> None:
    async with rig(model=SlowToyModel()) as verifier:
        running = verifier.stub.Generate(request(max_tokens=4000))
        await running.read()
        await verifier.servicer.drain(0.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest_of(running)
    assert refusal_of(caught.value).reason is Reason.VERIFIER_LOST
