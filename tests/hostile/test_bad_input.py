"""Bad input on the real wire: the right status, the name of the field, the limit and the next step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest

from sparkrelay.errors import STATUS_OF, refusal_of
from sparkrelay.frames import Block, Blocks, ContextKind, Fingerprint, Hello, Join, Ping
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.protocol import chain_hash
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import generation_pb2 as generation_pb
from sparkrelay.v1 import verifier_service_pb2 as verifier_pb
from sparkrelay.wire import drafter_frame_pb
from tests.hostile.house import House, house

GATEWAY = "/sparkrelay.v1.GatewayService/"
VERIFIER = "/sparkrelay.v1.VerifierService/"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
METADATA = (("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01"),)
NAN, INFINITY = float("nan"), float("inf")
CONTEXT_LIMIT = 4096
NEXT_STEP = re.compile(
    r"\b(send|ask|try|open|wait|use|leave|update|give|cancel|shorten|see|choose)\b",
    re.IGNORECASE,
)
INVALID, CONTEXT, NOT_FOUND = Reason.INVALID_FIELD, Reason.CONTEXT_EXCEEDED, Reason.SESSION_NOT_FOUND


class Bad(NamedTuple):
    """What is changed in a good request, and the refusal that must come."""

    field: str
    changes: dict[str, Any]
    reason: Reason = INVALID


def tokens(*ids: int) -> dict[str, Any]:
    return {"tokens": gateway_pb.TokenIds(token_ids=ids)}


def sampled(**fields: Any) -> dict[str, Any]:
    return {"sampling": generation_pb.Sampling(**fields)}


def stopped(**fields: Any) -> dict[str, Any]:
    return {"stop": generation_pb.StopConditions(**fields)}


def both() -> Iterator[Bad]:
    """What neither the gateway nor a verifier takes."""
    for field, value in {
        "temperature": [NAN, INFINITY, -INFINITY, -0.5, 101.0],
        "top_k": [-1],
        "top_p": [0.0, -0.1, 1.5, NAN],
        "min_p": [-0.1, 1.1, NAN],
        "repetition_penalty": [0.0, -1.0, 1e-40, INFINITY, NAN],
        "presence_penalty": [INFINITY, -101.0, NAN],
        "frequency_penalty": [INFINITY, 101.0, NAN],
        "min_token_count": [-1],
        "logit_bias": [{64: 1.0}, {-1: 1.0}, {3: 1001.0}, {3: NAN}],
    }.items():
        yield from (Bad(f"sampling.{field}", sampled(seed=1, **{field: each})) for each in value)
    yield Bad("stop.stop_token_ids", stopped(max_token_count=3, stop_token_ids=[64]))
    yield Bad("stop.stop_token_ids", stopped(max_token_count=3, stop_token_ids=[-1]))
    yield Bad("stop.stop_token_ids", stopped(max_token_count=3, stop_token_ids=[1] * 257))
    yield Bad("stop.max_token_count", stopped(max_token_count=-1))
    yield Bad("stop.stop_strings", stopped(max_token_count=3, stop_strings=["x"]))
    yield Bad("logprob_count", {"logprob_count": 21})
    yield Bad("logprob_count", {"logprob_count": -1})
    mode = generation_pb.Speculation.MODE_FIXED
    yield Bad(
        "speculation.fixed_depth", {"speculation": generation_pb.Speculation(mode=mode, fixed_depth=16)}
    )
    yield Bad("speculation.mode", {"speculation": generation_pb.Speculation(mode=9)})  # type: ignore[arg-type]


TO_THE_GATEWAY = [
    *both(),
    Bad("sampling.logit_bias", sampled(logit_bias=dict.fromkeys(range(1025), 1.0))),
    Bad("tokens.token_ids", tokens()),
    Bad("tokens.token_ids", tokens(1, 64)),
    Bad("tokens.token_ids", tokens(-1)),
    Bad("input", {"tokens": None}),
    Bad("input", tokens(*[1] * CONTEXT_LIMIT), CONTEXT),
    Bad("input", tokens(*[1] * (CONTEXT_LIMIT + 9)), CONTEXT),
    Bad("stop.max_token_count", stopped(max_token_count=CONTEXT_LIMIT), CONTEXT),
    Bad("text", {"text": "the toy knows no text"}),
    Bad("text", {"text": "x" * 1_000_001}, Reason.TOO_LARGE),
    Bad("chat.messages", {"chat": gateway_pb.ChatMessages()}),
    Bad(
        "chat.messages[0].role",
        {"chat": gateway_pb.ChatMessages(messages=[gateway_pb.ChatMessage(role="no role", content="x")])},
    ),
    Bad("model", {"model": "another"}, Reason.MODEL_NOT_FOUND),
    Bad("session_id", {"session_id": "never-opened"}, NOT_FOUND),
    Bad("session_id", {"session_id": "x" * 129}),
    Bad("session_id", {"session_id": "a\x00b"}),
    Bad("stop.stop_strings", stopped(stop_strings=["x"] * 17)),
    Bad("stop.stop_strings", stopped(stop_strings=[""])),
]

TO_THE_VERIFIER = [
    *both(),
    Bad("sampling.logit_bias", sampled(logit_bias=dict.fromkeys(range(1025), 1.0)), Reason.TOO_LARGE),
    Bad("sampling.seed", sampled(temperature=1.0)),
    Bad("stop.max_token_count", stopped(max_token_count=0)),
    Bad("session_id", {"session_id": ""}),
    Bad("session_id", {"session_id": "x" * 129}),
    Bad("turn_id", {"turn_id": ""}),
    Bad("turn_id", {"turn_id": "x" * 129}),
    Bad("append_token_ids", {"append_token_ids": []}),
    Bad("append_token_ids", {"append_token_ids": [64]}),
    Bad("append_token_ids", {"append_token_ids": [-1]}),
    Bad("append_token_ids", {"append_token_ids": [1] * CONTEXT_LIMIT}, CONTEXT),
    Bad("output_start", {"output_start": 3}),
    Bad("output_start", {"output_start": -1}),
    Bad("keep_len", {"keep_len": -1}),
    Bad("keep_hash", {"keep_hash": b"x" * 65}),
    Bad("session_id", {"keep_len": 1, "keep_hash": chain_hash((1,))}, NOT_FOUND),
    Bad("noise_version", {"noise_version": 2}),
    Bad("drafter_ids", {"drafter_ids": ["d"] * 17}),
]


async def failure(made: House, path: str, data: bytes) -> grpc.aio.AioRpcError:
    address = made.gateway_address if path.startswith(GATEWAY) else made.verifier.address
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_stream(path)(data, metadata=METADATA, timeout=20).read()
    return refused.value


def check(error: grpc.aio.AioRpcError, bad: Bad, told: str) -> Refusal:
    refusal = refusal_of(error)
    assert (refusal.reason, error.code()) == (bad.reason, STATUS_OF[bad.reason]), (told, refusal.message)
    assert [each.field for each in refusal.violations] == [bad.field], (told, refusal.message)
    assert refusal.message.startswith(f"{bad.field}: "), (told, refusal.message)
    assert NEXT_STEP.search(refusal.message), (told, refusal.message)
    assert refusal.trace_id == TRACE_ID, told
    return refusal


async def test_the_gateway_refuses_each_by_its_field_while_a_healthy_session_goes_on() -> None:
    async with house() as made, made.undisturbed(at_least=1):
        for bad in TO_THE_GATEWAY:
            fields = {**tokens(1, 2), **bad.changes}
            if bad.changes.keys() & {"text", "chat"}:
                del fields["tokens"]
            data = gateway_pb.GenerateRequest(**fields).SerializeToString()
            refusal = check(await failure(made, GATEWAY + "Generate", data), bad, f"{bad.changes}"[:200])
            assert refusal.turn_id.startswith("turn-")
        await nothing_was_kept(made)


async def test_the_verifier_refuses_each_by_its_field_while_a_healthy_session_goes_on() -> None:
    async with house() as made, made.undisturbed(at_least=1):
        for bad in TO_THE_VERIFIER:
            good = {"session_id": "raw", "turn_id": "raw-turn", "append_token_ids": [1, 2], "output_start": 2}
            fields = {**good, **stopped(max_token_count=3), **bad.changes}
            request = verifier_pb.VerifierServiceGenerateRequest(**fields)
            error = await failure(made, VERIFIER + "Generate", request.SerializeToString())
            refusal = check(error, bad, f"{bad.changes}"[:200])
            assert refusal.turn_id == request.turn_id
        await nothing_was_kept(made)


async def nothing_was_kept(made: House) -> None:
    assert made.verifier.engine.load().session_count <= 1 + 1, "the healthy session, and the one before it"
    async with grpc.aio.insecure_channel(made.gateway_address) as channel:
        listed = await channel.unary_unary(
            GATEWAY + "ListTurns", None, gateway_pb.ListTurnsResponse.FromString
        )(b"")
        assert all(turn.finished.finish_reason for turn in listed.turns if turn.HasField("finished"))


@pytest.mark.parametrize("path", [GATEWAY + "Generate", VERIFIER + "Generate"])
async def test_text_that_is_no_utf_8_and_frames_that_are_too_large_are_refused_before_a_turn_begins(
    path: str,
) -> None:
    unreadable = Bad("request", {})
    async with house() as made, made.undisturbed(at_least=1):
        for data in (b"\x12\x02\xff\xfe", b"\x12\x03\xed\xa0\x80", b"\xff\xff"):
            check(await failure(made, path, data), unreadable, repr(data))
        error = await failure(made, path, b"\x12" + b"\x80\x80\xc0\x02" + b"x" * (5 << 20))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal_of(error).reason is Reason.TOO_LARGE


def hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "protocol_min": 1,
        "protocol_max": 1,
        "drafter_id": "stranger",
        "incarnation": "run",
        "fingerprint": Fingerprint(block_size=7),
    }
    return Hello(**fields | changes)


VIOLATION, VERSION = Reason.PROTOCOL_VIOLATION, Reason.PROTOCOL_VERSION
FIRST_FRAMES: list[tuple[Any, Reason, str]] = [
    (hello(protocol_min=2, protocol_max=9), VERSION, "1 to 1"),
    (hello(protocol_min=0, protocol_max=0), VERSION, "update"),
    (hello(protocol_min=3, protocol_max=1), VERSION, "update"),
    (hello(drafter_id=""), INVALID, "drafter_id"),
    (hello(incarnation=""), INVALID, "incarnation"),
    (hello(drafter_id="x" * 129), Reason.TOO_LARGE, "128"),
    (hello(fingerprint=Fingerprint(vocab_size=63)), Reason.FINGERPRINT_MISMATCH, "vocab_size"),
    (hello(fingerprint=Fingerprint(block_size=16)), Reason.FINGERPRINT_MISMATCH, "block_size"),
    (hello(fingerprint=Fingerprint(block_size=-1)), Reason.FINGERPRINT_MISMATCH, "block_size"),
    (hello(fingerprint=Fingerprint(noise_versions=(9,))), Reason.FINGERPRINT_MISMATCH, "noise_versions"),
    (hello(fingerprint=Fingerprint(context_kind=ContextKind.ROWS, tap_layers=(1,))),
     Reason.FINGERPRINT_MISMATCH, "context_kind"),
    (Join("s", b"token"), VIOLATION, "Join"),
    (Blocks((Block(1, 0, 1, (1,), b"\xff"),)), VIOLATION, "Blocks"),
    (Ping(1), VIOLATION, "Ping"),
]  # fmt: skip


async def test_a_stream_that_begins_badly_is_closed_with_what_differs() -> None:
    async with (
        house() as made,
        made.undisturbed(at_least=1),
        grpc.aio.insecure_channel(made.verifier.address) as channel,
    ):
        for frame, reason, named in FIRST_FRAMES:
            call: Any = channel.stream_stream(VERIFIER + "Speculate", _bytes)()
            await call.write(frame)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            refusal = refusal_of(refused.value)
            assert (refusal.reason, refused.value.code()) == (reason, STATUS_OF[reason]), refusal.message
            assert named in refusal.message


_bytes: Callable[[Any], bytes] = lambda frame: drafter_frame_pb(frame).SerializeToString()  # noqa: E731
