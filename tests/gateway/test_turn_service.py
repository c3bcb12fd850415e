"""Turns through a real gateway, a real client and a scripted verifier: what is streamed, kept, counted and cleaned up."""

from __future__ import annotations

import asyncio
import json

import pytest

import sparkrelay
from gateway.tokenizer import Tokenizer
from sparkrelay.client import Generation, InvalidRequest, NotFound, Overloaded, SessionBusy
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.protocol import chain_hash
from sparkrelay.store import ModelFiles
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import verifier_service_pb2 as verifier_pb
from tests.gateway.fake_verifier import STOP_ID, continuation, running

PROMPT = (5, 9, 11)


async def test_a_turn_begins_with_its_ids_streams_tokens_in_order_and_ends_with_its_sums() -> None:
    async with running({"found_later": 2}) as stack, sparkrelay.aio.connect(stack.address) as client:
        async with client.generate_stream(token_ids=PROMPT, max_tokens=8, include_rounds=True) as stream:
            started = stream.started
            deltas = [delta async for delta in stream]
            whole = await stream.result()
        assert whole.token_ids == continuation(PROMPT, 8)
        assert [token for delta in deltas for token in delta.token_ids] == list(whole.token_ids)
        assert (whole.turn_id, whole.trace_id, whole.seed) == (
            started.turn_id,
            started.trace_id,
            started.seed,
        )
        assert len(whole.trace_id) == 32
        assert whole.finish_reason == "length"
        assert (started.cached_token_count, whole.usage.cached) == (0, 2), "what it was when it was read"
        assert (whole.usage.prompt, whole.usage.output, whole.usage.discarded) == (3, 8, 0)
        assert [report.index for report in whole.rounds] == [0, 1, 2]
        assert (whole.totals.rounds, whole.totals.drafted, whole.totals.verified) == (3, 12, 9)
        assert whole.totals.accepted == sum(report.accepted for report in whole.rounds)
        assert 0 < whole.timing.first_token_us <= whole.timing.total_us


async def test_the_blocking_and_the_asyncio_client_give_the_same_turn() -> None:
    def ask(address: str) -> Generation:
        with sparkrelay.connect(address) as client:
            return client.generate(token_ids=PROMPT, max_tokens=7, seed=1, include_rounds=True, logprobs=0)

    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        blocking = await asyncio.to_thread(ask, stack.address)
        aio = await client.generate(token_ids=PROMPT, max_tokens=7, seed=1, include_rounds=True, logprobs=0)
        same = (
            "text",
            "token_ids",
            "seed",
            "finish_reason",
            "usage",
            "rounds",
            "totals",
            "logprobs",
            "model",
        )
        assert [getattr(blocking, name) for name in same] == [getattr(aio, name) for name in same]
        assert len(aio.logprobs) == 7


async def test_without_a_session_the_verifier_is_told_to_forget_the_turn_and_nothing_is_listed() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        whole = await client.generate(token_ids=PROMPT, max_tokens=2)
        await stack.until(lambda: stack.verifier.ended_sessions == [whole.session_id])
        assert await client.list_sessions() == []
        with pytest.raises(NotFound):
            await client.get_session(whole.session_id)


async def test_a_session_sends_only_what_is_new_and_the_verifiers_copy_is_the_conversation() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        async with await client.create_session() as session:
            first = await session.generate(token_ids=PROMPT, max_tokens=4)
            conversation = (*PROMPT, *first.token_ids, 40, 41)
            second = await session.generate(token_ids=conversation, max_tokens=4)
            request = stack.verifier.requests[1]
            assert (request.keep_len, list(request.append_token_ids)) == (7, [40, 41])
            assert request.keep_hash == chain_hash(conversation[:7])
            assert request.output_start == 9
            assert second.token_ids == continuation(conversation, 4)
            assert second.usage.cached == 7
            info = await session.info()
            assert (info.token_count, info.turn_count, info.busy) == (13, 2, False)
            rewritten = await session.generate(token_ids=(*PROMPT, 33), max_tokens=2)
            assert stack.verifier.requests[2].keep_len == 3
            assert rewritten.token_ids == continuation((*PROMPT, 33), 2)
        await stack.until(lambda: stack.verifier.ended_sessions == [session.session_id])


async def test_the_same_conversation_again_appends_nothing() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session()
        first = await session.generate(token_ids=PROMPT, max_tokens=4)
        again = await session.generate(token_ids=PROMPT, max_tokens=4)
        assert again.token_ids == first.token_ids
        assert (stack.verifier.requests[1].keep_len, list(stack.verifier.requests[1].append_token_ids)) == (
            3,
            [],
        )


async def test_a_verifier_that_has_forgotten_the_session_is_sent_everything_again() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session()
        await session.generate(token_ids=PROMPT, max_tokens=4)
        stack.verifier.sessions.clear()
        again = await session.generate(token_ids=(*PROMPT, 7), max_tokens=4)
        assert again.token_ids == continuation((*PROMPT, 7), 4)
        assert [request.keep_len for request in stack.verifier.requests] == [0, 3, 0]


async def test_a_session_that_is_busy_at_the_verifier_for_a_moment_is_awaited() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        stack.verifier.refusals = [Refusal(Reason.SESSION_BUSY, "a turn is ending")] * 3
        whole = await client.generate(token_ids=PROMPT, max_tokens=2)
        assert whole.token_ids == continuation(PROMPT, 2)
        assert len(stack.verifier.requests) == 4


async def test_a_stop_id_ends_the_turn_is_counted_and_is_not_shown() -> None:
    rule = lambda tokens: STOP_ID if len(tokens) == 6 else 20  # noqa: E731
    async with running({"rule": rule}) as stack, sparkrelay.aio.connect(stack.address) as client:
        whole = await client.generate(token_ids=PROMPT, max_tokens=50)
        assert (whole.token_ids, whole.finish_reason) == ((20, 20, 20), "stop")
        assert (whole.usage.output, whole.usage.discarded) == (4, 0)


async def test_text_goes_in_and_out_and_a_stop_string_ends_the_turn_across_token_borders(
    demo_model: ModelFiles,
) -> None:
    tokenizer = Tokenizer.from_folder(demo_model.path)
    prompt = tokenizer.encode("Say:", add_special_tokens=True)
    answer = tokenizer.encode(" naïve 🦊 once\n\nUser: and more that nobody sees", add_special_tokens=False)
    verifier = {
        "model": "demo",
        "vocab_size": 49152,
        "tokenizer_hash": tokenizer.content_hash,
        "rule": lambda tokens: answer[len(tokens) - len(prompt)],
        "hold_after": len(answer) - 5,
    }
    async with (
        running(verifier, tokenizer=str(demo_model.path)) as stack,
        sparkrelay.aio.connect(stack.address) as client,
    ):
        session = await client.create_session()
        whole = await session.generate("Say:", max_tokens=len(answer), stop=["\n\nUser"])
        assert whole.text == " naïve 🦊 once"
        assert (whole.finish_reason, whole.stop_string) == ("stop", "\n\nUser")
        assert whole.text.startswith(tokenizer.decode(whole.token_ids))
        assert whole.usage.discarded == whole.usage.output - len(whole.token_ids) > 0
        await stack.until(lambda: stack.verifier.cancelled == [whole.turn_id])
        stack.verifier.hold_after = None
        conversation = tokenizer.encode("Say: naïve 🦊 once more", add_special_tokens=True)
        stack.verifier.rule = lambda tokens: 20
        await session.generate("Say: naïve 🦊 once more", max_tokens=1)
        request = stack.verifier.requests[1]
        assert len(prompt) < request.keep_len < len(conversation)
        models = await client.list_models()
        assert [(model.name, model.has_chat_template, model.vocab_size) for model in models] == [
            ("demo", True, 49152)
        ]
        chat = await client.generate(messages=[{"role": "user", "content": "Hi"}], max_tokens=1)
        assert chat.usage.prompt > 10


async def test_a_drafter_is_named_with_alternates_or_the_reason_for_none_is_given() -> None:
    connected = verifier_pb.DrafterStatus.STATE_CONNECTED
    drafters = [
        verifier_pb.DrafterStatus(drafter_id="busy", state=connected, session_count=3),
        verifier_pb.DrafterStatus(drafter_id="free", state=connected),
    ]
    async with (
        running({"drafters": drafters}, {"model": "bare", "name": "bare"}) as stack,
        sparkrelay.aio.connect(stack.address) as client,
    ):
        whole = await client.generate(token_ids=PROMPT, max_tokens=2, model="toy")
        assert (whole.drafter_id, whole.no_drafter_reason) == ("free", "")
        assert list(stack.verifier.requests[0].drafter_ids) == ["free", "busy"]
        plain = await client.generate(token_ids=PROMPT, max_tokens=2, model="toy", speculation="off")
        assert (plain.drafter_id, list(stack.verifier.requests[1].drafter_ids)) == ("", [])
        assert "plain decoding" in plain.no_drafter_reason
        alone = await client.generate(token_ids=PROMPT, max_tokens=2, model="bare")
        assert "no drafter is connected to bare" in alone.no_drafter_reason


async def test_what_was_asked_reaches_the_verifier() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        await client.generate(
            token_ids=PROMPT,
            max_tokens=3,
            temperature=0.5,
            top_k=7,
            top_p=0.75,
            seed=2**64 - 1,
            logit_bias={4: -2.0},
            stop_token_ids=[50],
            speculation="fixed:6",
            logprobs=2,
        )
        request = stack.verifier.requests[0]
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (
            0.5,
            7,
            0.75,
            2**64 - 1,
        )
        assert dict(sampling.logit_bias) == {4: -2.0}
        assert (request.stop.max_token_count, list(request.stop.stop_token_ids)) == (3, [50])
        assert (request.speculation.fixed_depth, request.logprob_count) == (6, 2)


async def test_the_context_limit_ends_a_turn_that_did_not_say_how_many_tokens() -> None:
    async with running({"context_limit": 10}) as stack, sparkrelay.aio.connect(stack.address) as client:
        whole = await client.generate(token_ids=PROMPT)
        assert (len(whole.token_ids), whole.finish_reason) == (7, "context")
        with pytest.raises(InvalidRequest) as refused:
            await client.generate(token_ids=PROMPT, max_tokens=8)
        assert (refused.value.reason, refused.value.violations[0].field) == (
            "CONTEXT_EXCEEDED",
            "stop.max_token_count",
        )


async def test_a_second_turn_in_a_busy_session_is_refused() -> None:
    async with running({"hold_after": 2}) as stack, sparkrelay.aio.connect(stack.address) as client:
        session = await client.create_session()
        async with session.generate_stream(token_ids=PROMPT, max_tokens=9) as stream:
            assert (await session.info()).busy
            with pytest.raises(SessionBusy) as refused:
                await session.generate(token_ids=PROMPT, max_tokens=9)
            assert refused.value.reason == "SESSION_BUSY"
            assert refused.value.turn_id not in ("", stream.started.turn_id)
            stack.verifier.go_on.set()
            assert (await stream.result()).token_ids == continuation(PROMPT, 9)


async def test_more_turns_than_the_limit_are_refused_with_a_time_to_try_again_and_the_permit_comes_back() -> (
    None
):
    async with (
        running({"hold_after": 1}, max_turns=2, overload_retry_ms=700) as stack,
        sparkrelay.aio.connect(stack.address) as client,
    ):
        async with client.generate_stream(token_ids=PROMPT), client.generate_stream(token_ids=PROMPT):
            with pytest.raises(Overloaded) as refused:
                await client.generate(token_ids=PROMPT)
            assert refused.value.retry_after == 0.7
            assert refused.value.turn_id
        await stack.until(lambda: len(stack.verifier.cancelled) == 2)
        stack.verifier.hold_after = None
        assert (await client.generate(token_ids=PROMPT, max_tokens=2)).token_ids == continuation(PROMPT, 2)


async def test_refusals_carry_turn_and_trace_and_name_the_field() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        with pytest.raises(InvalidRequest) as refused:
            await client.generate(token_ids=PROMPT, temperature=-1.0)
        assert refused.value.violations[0].field == "sampling.temperature"
        assert refused.value.turn_id
        assert len(refused.value.trace_id) == 32
        with pytest.raises(NotFound) as missing:
            await client.generate(token_ids=PROMPT, model="other")
        assert (missing.value.reason, "toy" in missing.value.message) == ("MODEL_NOT_FOUND", True)
        with pytest.raises(InvalidRequest, match="toy has no text"):
            await client.generate("some text")


async def test_the_callers_trace_reaches_the_verifier_and_the_answer() -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    traceparent = f"00-{trace_id}-b7ad6b7169203331-01"
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        client._metadata = (("traceparent", traceparent),)
        whole = await client.generate(token_ids=PROMPT, max_tokens=1)
        assert whole.trace_id == trace_id
        assert trace_id in stack.verifier.metadata[0]["traceparent"]


async def test_turns_are_remembered_with_their_rounds() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        whole = await client.generate(token_ids=PROMPT, max_tokens=8)
        turn = await client.get_turn(whole.turn_id)
        assert (turn.finish_reason, turn.usage, turn.totals) == ("length", whole.usage, whole.totals)
        assert len(turn.rounds) == whole.totals.rounds == 3
        assert turn.rounds[0].confidences == (1.0, 0.2, 0.2, 0.2)
        (listed,) = await client.list_turns()
        assert (listed.turn_id, listed.rounds) == (whole.turn_id, ())
        with pytest.raises(NotFound):
            await client.get_turn("turn-unknown")


async def test_rounds_can_be_watched_as_they_happen() -> None:
    async with running() as stack, sparkrelay.aio.connect(stack.address) as client:
        watching = client._gateway.WatchRounds(gateway_pb.WatchRoundsRequest())
        await watching.initial_metadata()
        whole = await client.generate(token_ids=PROMPT, max_tokens=8)
        seen = [await watching.read() for _ in range(3)]
        assert [each.round.index for each in seen] == [0, 1, 2]
        assert {each.turn_id for each in seen} == {whole.turn_id}
        watching.cancel()


async def test_a_response_format_reaches_the_verifier_as_it_was_sent() -> None:
    schema = {"type": "object", "title": "naïve"}
    async with (
        running({"has_response_format": True}) as stack,
        sparkrelay.aio.connect(stack.address) as client,
    ):
        assert [model.has_response_format for model in await client.list_models()] == [True]
        asked = {"type": "json_schema", "schema": schema}
        await client.generate(token_ids=PROMPT, max_tokens=3, response_format=asked)
        await client.generate(token_ids=PROMPT, max_tokens=3)
        assert json.loads(stack.verifier.requests[0].response_format.json_schema) == schema
        assert not stack.verifier.requests[1].HasField("response_format")
        with pytest.raises(InvalidRequest, match=r"16385 bytes; send at most 16384") as refused:
            await client.generate(
                token_ids=PROMPT, response_format={"type": "regex", "pattern": "a" * 16_385}
            )
        assert refused.value.violations[0].field == "response_format.regex" and refused.value.turn_id
        assert len(stack.verifier.requests) == 2


async def test_a_model_is_asked_for_a_format_only_if_all_its_verifiers_can_keep_to_one() -> None:
    async with (
        running({"has_response_format": True}, {"name": "other"}) as stack,
        sparkrelay.aio.connect(stack.address) as client,
    ):
        assert [model.has_response_format for model in await client.list_models()] == [False]
        with pytest.raises(InvalidRequest) as refused:
            await client.generate(token_ids=PROMPT, response_format={"type": "regex", "pattern": "a"})
        assert refused.value.violations[0].field == "response_format"
