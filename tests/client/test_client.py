"""The client SDK on its own: where it connects, what it refuses, what it repeats, what it leaves behind."""

from __future__ import annotations

import asyncio
import gc
import socket
import subprocess
import sys
from queue import SimpleQueue

import grpc
import grpc.aio
import pytest

import sparkrelay
from sparkrelay.client import DeadlineExceeded, InvalidRequest, Unavailable
from sparkrelay.client.address import resolve_address
from sparkrelay.client.requests import GenerateOptions, generate_request
from sparkrelay.client.retries import RetryBudget, RetryPolicy
from sparkrelay.errors import abort
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import gateway_service_pb2_grpc as gateway_grpc
from tests.gateway.fake_verifier import continuation, running

PROMPT = (5, 9, 11)


def test_the_address_is_the_argument_then_the_environment_then_the_runtime_file() -> None:
    environment, runtime = {"SPARKRELAY_GATEWAY": "b:2"}, {"gateway": "c:3"}
    assert resolve_address("a:1", environment, runtime) == "a:1"
    assert resolve_address(None, environment, runtime) == "b:2"
    assert resolve_address(None, {}, runtime) == "c:3"
    with pytest.raises(Unavailable, match="sparkrelay up"):
        resolve_address(None, {}, None)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("input", {}),
        ("input", {"prompt": "x", "token_ids": [1]}),
        ("input", {"token_ids": [2**40]}),
        ("chat.messages[0]", {"messages": [{"role": "user"}]}),
        ("sampling", {"prompt": "x", "seed": -1}),
        ("sampling", {"prompt": "x", "top_k": "many"}),
        ("speculation", {"prompt": "x", "speculation": "fixed:16"}),
        ("speculation", {"prompt": "x", "speculation": "fixed:"}),
        ("speculation", {"prompt": "x", "speculation": "sometimes"}),
    ],
)
def test_what_no_request_can_hold_is_refused_by_its_field(field: str, options: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        generate_request(GenerateOptions(**options))  # type: ignore[arg-type]
    assert refused.value.violations[0].field == field


def test_options_that_were_not_given_are_absent_and_not_zero() -> None:
    request = generate_request(GenerateOptions(prompt="x"))
    assert not request.sampling.HasField("seed")
    assert not request.sampling.HasField("top_p")
    assert not request.HasField("logprob_count")
    zero = generate_request(GenerateOptions(prompt="x", seed=0, top_p=1.0, logprobs=0))
    assert zero.sampling.HasField("seed") and zero.HasField("logprob_count")


def test_the_base_install_is_enough() -> None:
    script = (
        "import sys, sparkrelay\n"
        "assert not [name for name in sys.modules if name.startswith('grpc')], 'services import the package too'\n"
        "sparkrelay.connect, sparkrelay.aio.connect\n"
        "import sparkrelay.client\n"
        "heavy = {'numpy', 'torch', 'tokenizers', 'transformers', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 400, len(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_name_that_the_package_lacks_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_this"):
        sparkrelay.nothing_like_this  # noqa: B018


def test_no_gateway_is_said_with_the_next_step_by_both_clients() -> None:
    async def ask(address: str) -> None:
        async with sparkrelay.aio.connect(address) as client:
            await client.generate(token_ids=PROMPT)

    address = f"127.0.0.1:{free_port()}"
    with sparkrelay.connect(address) as client, pytest.raises(Unavailable, match=f"{address}.*sparkrelay up"):
        client.generate(token_ids=PROMPT)
    with pytest.raises(Unavailable, match=f"{address}.*sparkrelay up"):
        asyncio.run(ask(address))


async def test_a_turn_whose_connection_was_never_made_is_sent_again_and_runs_once() -> None:
    port = free_port()
    attempts: list[float] = []

    class Gateway(gateway_grpc.GatewayServiceServicer):
        async def Generate(self, request, context):  # type: ignore[no-untyped-def]
            attempts.append(1)
            yield gateway_pb.GenerateResponse(started=gateway_pb.TurnAccepted(turn_id="t"))
            yield gateway_pb.GenerateResponse(finished=gateway_pb.TurnFinished(finish_reason=1))

    refuse_abstract(Gateway)
    async with sparkrelay.aio.connect(f"127.0.0.1:{port}") as client:
        client.policy = RetryPolicy(lambda: 0.5, repeat_pauses_s=(0.1,) * 300, budget=RetryBudget(1000.0))
        turn = asyncio.create_task(client.generate(token_ids=PROMPT))
        state = client._channel.get_state()
        # Asked once a turn of the loop: without a server TRANSIENT_FAILURE stays, so waiting for a change from it never ends.
        while state is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            await client._channel.wait_for_state_change(state)
            state = client._channel.get_state()
        server = grpc.aio.server()
        gateway_grpc.add_GatewayServiceServicer_to_server(Gateway(), server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        assert (await turn).finish_reason == "stop"
        assert len(attempts) == 1
        await server.stop(0)


@pytest.mark.parametrize(("resume", "calls"), [(False, ["tokens"]), (True, ["tokens"] + ["resume"] * 3)])
async def test_a_turn_that_was_sent_is_never_sent_again_but_resumed_if_it_may(
    resume: bool, calls: list[str]
) -> None:
    attempts: list[str] = []

    class Gateway(gateway_grpc.GatewayServiceServicer):
        async def Generate(self, request, context):  # type: ignore[no-untyped-def]
            attempts.append(request.WhichOneof("input"))
            await context.abort(grpc.StatusCode.UNAVAILABLE, "a proxy lost the gateway")
            yield

        async def CancelTurn(self, request, context):  # type: ignore[no-untyped-def]
            return gateway_pb.CancelTurnResponse()

    refuse_abstract(Gateway)
    server = grpc.aio.server()
    gateway_grpc.add_GatewayServiceServicer_to_server(Gateway(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with sparkrelay.aio.connect(f"127.0.0.1:{port}") as client:
        client.policy = RetryPolicy(lambda: 0.5, resume_pauses_s=(0.01,) * 3)
        with pytest.raises(Unavailable, match="a proxy lost the gateway"):
            await client.generate(token_ids=PROMPT, resume=resume)
    assert attempts == calls
    await server.stop(0)


async def test_a_gateway_that_quotes_a_connection_error_has_answered_and_is_not_asked_again() -> None:
    calls: list[str] = []
    words = "No verifier is reachable (127.0.0.1:1: failed to connect to all addresses; Connection refused)."

    class Gateway(gateway_grpc.GatewayServiceServicer):
        async def Generate(self, request, context):  # type: ignore[no-untyped-def]
            calls.append(request.WhichOneof("input"))
            await abort(context, Refusal(Reason.NO_VERIFIER, words))
            yield

    refuse_abstract(Gateway)
    server = grpc.aio.server()
    gateway_grpc.add_GatewayServiceServicer_to_server(Gateway(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with sparkrelay.aio.connect(f"127.0.0.1:{port}") as client:
        for resume in (True, False):
            with pytest.raises(Unavailable, match="No verifier") as refused:
                await client.generate(token_ids=PROMPT, resume=resume)
            assert refused.value.reason == "NO_VERIFIER"
    assert calls == ["tokens", "tokens"]
    await server.stop(0)


async def test_leaving_a_loop_early_cancels_the_turn_in_both_clients() -> None:
    def leave_blocking(address: str) -> None:
        with sparkrelay.connect(address) as client:
            for _ in client.generate_stream(token_ids=PROMPT):
                break
            gc.collect()

    async with running({"hold_after": 4}) as stack, sparkrelay.aio.connect(stack.address) as client:
        await asyncio.to_thread(leave_blocking, stack.address)
        await stack.until(lambda: len(stack.verifier.cancelled) == 1)
        async for _ in client.generate_stream(token_ids=PROMPT):
            break
        gc.collect()
        await stack.until(lambda: len(stack.verifier.cancelled) == 2)


async def test_a_stream_that_is_forgotten_is_cancelled() -> None:
    def forget(client: sparkrelay.client.Client) -> None:
        client.generate_stream(token_ids=PROMPT)

    async with running({"hold_after": 4}) as stack:
        client = await asyncio.to_thread(sparkrelay.connect, stack.address)
        await asyncio.to_thread(forget, client)
        gc.collect()
        await stack.until(lambda: len(stack.verifier.cancelled) == 1)
        await asyncio.to_thread(client.close)


async def test_another_thread_or_task_can_cancel_a_turn() -> None:
    streams: SimpleQueue[sparkrelay.client.GenerationStream] = SimpleQueue()

    def read_blocking(address: str) -> None:
        with sparkrelay.connect(address) as client, client.generate_stream(token_ids=PROMPT) as stream:
            streams.put(stream)
            with pytest.raises(sparkrelay.client.Cancelled):
                _ = stream.result

    async with running({"hold_after": 4}) as stack, sparkrelay.aio.connect(stack.address) as client:
        blocking = asyncio.create_task(asyncio.to_thread(read_blocking, stack.address))
        (await asyncio.to_thread(streams.get)).cancel()
        await blocking
        await stack.until(lambda: len(stack.verifier.cancelled) == 1)
        async with client.generate_stream(token_ids=PROMPT) as stream:
            reading = asyncio.create_task(stream.result())
            await stack.until(lambda: len(stack.verifier.requests) == 2)
            stream.cancel()
            with pytest.raises(sparkrelay.client.Cancelled):
                await reading
        reading = asyncio.create_task(client.generate(token_ids=PROMPT))
        await stack.until(lambda: len(stack.verifier.requests) == 3)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await stack.until(lambda: len(stack.verifier.cancelled) == 3)


async def test_the_blocking_client_streams_sessions_deadlines_and_state() -> None:
    def use(address: str) -> None:
        with sparkrelay.connect(address) as client:
            with client.create_session() as session:
                with session.generate_stream(token_ids=PROMPT, max_tokens=5) as stream:
                    assert stream.started.session_id == session.session_id
                    streamed = [token for delta in stream for token in delta.token_ids]
                assert tuple(streamed) == stream.result.token_ids == continuation(PROMPT, 5)
                assert session.info().token_count == 8
                assert [each.session_id for each in client.list_sessions()] == [session.session_id]
                assert [turn.turn_id for turn in client.list_turns(session_id=session.session_id)] == [
                    stream.result.turn_id
                ]
                assert client.get_turn(stream.result.turn_id).usage == stream.result.usage
            assert client.list_sessions() == []
            assert [model.name for model in client.list_models()] == ["toy"]
            assert [worker.state for worker in client.workers()] == ["ready"]

    def run_out_of_time(address: str) -> None:
        with sparkrelay.connect(address, timeout=0.2) as client, pytest.raises(DeadlineExceeded):
            client.generate(token_ids=PROMPT, max_tokens=20)

    async with running() as stack:
        await asyncio.to_thread(use, stack.address)
        stack.verifier.hold_after = 4
        await asyncio.to_thread(run_out_of_time, stack.address)


async def test_a_token_travels_with_every_call() -> None:
    seen: list[str] = []

    class Gateway(gateway_grpc.GatewayServiceServicer):
        async def ListModels(self, request, context):  # type: ignore[no-untyped-def]
            seen.append(dict(context.invocation_metadata())["authorization"])
            return gateway_pb.ListModelsResponse()

    refuse_abstract(Gateway)
    server = grpc.aio.server()
    gateway_grpc.add_GatewayServiceServicer_to_server(Gateway(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with sparkrelay.aio.connect(f"127.0.0.1:{port}", token="abc") as client:
        assert await client.list_models() == []
    assert seen == ["Bearer abc"]
    await server.stop(0)


def refuse_abstract(servicer: type) -> None:
    """Lets a test write only the calls it needs."""
    servicer.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
