"""Frames survive the wire, and nothing that comes from it can do more than be refused."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay import wire
from sparkrelay.frames import (
    Block,
    Blocks,
    Context,
    ContextKind,
    Credit,
    Drain,
    FeedAttach,
    Fingerprint,
    Hello,
    Invite,
    Join,
    Joined,
    Leave,
    Left,
    Ping,
    Pong,
    Rewound,
    TurnEnded,
    TurnStarted,
    Verdict,
    Verdicts,
    Welcome,
)
from sparkrelay.outcomes import FinishReason, Reason, Refusal
from sparkrelay.sampling import Sampling
from sparkrelay.v1 import generation_pb2, tensor_pb2
from sparkrelay.v1 import verifier_service_pb2 as pb2

i32 = st.integers(-(2**31), 2**31 - 1)
count = st.integers(0, 2**31 - 1)
text = st.text(max_size=20)
blob = st.binary(max_size=32)
trace = st.sampled_from([b"", bytes(range(25))])
f32 = st.floats(width=32, allow_nan=False)
samplings = st.builds(
    Sampling,
    temperature=f32,
    top_k=i32,
    top_p=f32,
    min_p=f32,
    repetition_penalty=f32,
    presence_penalty=f32,
    frequency_penalty=f32,
    logit_bias=st.dictionaries(i32, f32, max_size=4).map(lambda bias: tuple(sorted(bias.items()))),
    min_tokens=i32,
    seed=st.integers(0, 2**64 - 1),
)
fingerprints = st.builds(
    Fingerprint,
    target_id=text,
    tokenizer_hash=text,
    vocab_size=i32,
    tap_layers=st.lists(i32, max_size=4).map(tuple),
    block_size=i32,
    context_kind=st.sampled_from(ContextKind),
    context_width=i32,
    context_hash=text,
    noise_versions=st.lists(i32, max_size=3).map(tuple),
    proposal_kind=text,
)
reasons, finish_reasons = st.sampled_from(Reason), st.sampled_from(FinishReason)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    ids = tuple(draw(st.lists(i32, max_size=16)))
    confidences = draw(st.binary(min_size=len(ids), max_size=len(ids)))
    return Block(
        draw(i32), draw(i32), draw(i32), ids, confidences, draw(i32), draw(i32), draw(i32), draw(trace)
    )


verdicts = st.builds(
    Verdict, i32, i32, i32, i32, i32, st.integers(0, 3), i32, i32, rows=st.none(), traceparent=trace
)
drafter_frames = st.one_of(
    st.builds(Hello, i32, i32, text, text, fingerprints),
    st.builds(Join, text, blob, count, blob),
    st.builds(Blocks, st.lists(blocks(), max_size=5).map(tuple)),
    st.builds(Leave, i32, reasons),
    st.builds(Ping, i32),
    st.builds(Pong, i32),
)
verifier_frames = st.one_of(
    st.builds(Welcome, i32, text, text, blob, i32, i32, i32),
    st.builds(Invite, text, blob, trace),
    st.builds(Joined, text, i32, i32),
    st.builds(
        TurnStarted,
        i32,
        text,
        i32,
        samplings,
        i32,
        i32,
        i32,
        st.lists(i32, max_size=5).map(tuple),
        i32,
        trace,
    ),
    st.builds(Rewound, i32, i32),
    st.builds(Verdicts, st.lists(verdicts, max_size=5).map(tuple)),
    st.builds(TurnEnded, i32, text, finish_reasons),
    st.builds(Left, i32, text, reasons, text),
    st.builds(Drain, i32),
    st.builds(Ping, i32),
    st.builds(Pong, i32),
)
feed_requests = st.one_of(
    st.builds(FeedAttach, blob),
    st.builds(Credit, st.integers(1, 2**62)),
    st.builds(Ping, i32),
    st.builds(Pong, i32),
)
feed_responses = st.one_of(
    st.builds(Context, i32, count, st.lists(count, min_size=1, max_size=9).map(tuple), i32),
    st.builds(Ping, i32),
    st.builds(Pong, i32),
)

CODECS: list[tuple[Any, Any, Any, Any]] = [
    (drafter_frames, wire.drafter_frame_pb, wire.drafter_frame, pb2.SpeculateRequest),
    (verifier_frames, wire.verifier_frame_pb, wire.verifier_frame, pb2.SpeculateResponse),
    (feed_requests, wire.feed_request_pb, wire.feed_request, pb2.FeedContextRequest),
    (feed_responses, wire.feed_response_pb, wire.feed_response, pb2.FeedContextResponse),
]
NAMES = ["drafter", "verifier", "feed request", "feed response"]


@pytest.mark.parametrize("codec", CODECS, ids=NAMES)
@given(data=st.data())
def test_a_frame_comes_back_as_it_was(codec: tuple[Any, Any, Any, Any], data: st.DataObject) -> None:
    strategy, encode, decode, message = codec
    frame = data.draw(strategy)
    assert decode(message.FromString(encode(frame).SerializeToString())) == frame


@pytest.mark.parametrize("codec", CODECS, ids=NAMES)
@given(data=st.data())
def test_mutated_bytes_are_refused_or_read_and_nothing_else(
    codec: tuple[Any, Any, Any, Any], data: st.DataObject
) -> None:
    strategy, encode, decode, message = codec
    raw = bytearray(encode(data.draw(strategy)).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        parsed = message.FromString(bytes(raw))
    except DecodeError:
        return  # gRPC answers this before we see it
    with contextlib.suppress(Refusal):
        decode(parsed)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb2.Blocks(handles=[1]), "blocks.rounds"),
        (
            pb2.Blocks(
                handles=[1], rounds=[0], base_lens=[1], token_counts=[2],
                token_ids=[1], confidences=b"ab", draft_us=[0], queue_us=[0],
            ),
            "blocks.token_ids",
        ),
        (
            pb2.Blocks(handles=[1], rounds=[0], base_lens=[1], token_counts=[-1], draft_us=[0], queue_us=[0]),
            "blocks.token_counts",
        ),
        (pb2.Blocks(handles=[1] * 4097), "blocks.handles"),
        (
            pb2.Blocks(handles=[1], rounds=[0], base_lens=[1], token_counts=[0], draft_us=[0], queue_us=[0], traceparents=[b"x"]),
            "blocks.traceparents",
        ),
    ],
    ids=["lengths", "ids", "negative", "many", "trace"],
)  # fmt: skip
def test_columns_that_do_not_agree_are_refused_by_name(message: Any, field: str) -> None:
    with pytest.raises(Refusal) as caught:
        wire.drafter_frame(pb2.SpeculateRequest(blocks=message))
    assert [violation.field for violation in caught.value.violations] == [field]
    assert caught.value.reason in (Reason.INVALID_FIELD, Reason.TOO_LARGE)


def test_a_reason_of_a_newer_peer_is_unspecified() -> None:
    message = pb2.SpeculateRequest()
    message.leave.handle = 3
    message.leave.ParseFromString(message.leave.SerializeToString() + b"\x10\xe7\x07")
    assert wire.drafter_frame(message) == Leave(3, Reason.UNSPECIFIED)


def test_an_empty_sampling_message_is_greedy_and_neutral() -> None:
    assert wire.sampling(generation_pb2.Sampling()) == Sampling()


# ---- tensors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16", "int32", "int64", "uint8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5), (2, 0, 3)])
def test_an_array_comes_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(max(1, int(np.prod(shape)))).astype(dtype)[: int(np.prod(shape))].reshape(shape)
    back = wire.tensor(tensor_pb2.Tensor.FromString(wire.tensor_pb(array).SerializeToString()))
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.tobytes() == array.tobytes() and not back.flags.writeable


@pytest.mark.parametrize(
    "message",
    [
        tensor_pb2.Tensor(shape=[1], data=b"1234"),
        tensor_pb2.Tensor(data_type=99, shape=[1], data=b"1234"),  # type: ignore[arg-type]
        tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], data=b"1234"),
        tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[-1, -1], data=b"1234"),
        tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2**62, 2**62], data=b""),
        tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2**62, 0], data=b""),
        tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_UINT8, shape=[1] * 9, data=b"1"),
    ],
)
def test_a_tensor_whose_sizes_lie_is_refused_before_its_data_is_read(message: Any) -> None:
    with pytest.raises(Refusal):
        wire.tensor(message)


def test_context_rows_travel_with_the_verdicts_they_belong_to() -> None:
    rows = [np.arange(6, dtype=np.uint16).reshape(2, 3), np.arange(3, dtype=np.uint16).reshape(1, 3)]
    frame = Verdicts(
        (Verdict(1, 0, 5, 5, 1, 1, 7, 3, rows=rows[0]), Verdict(2, 0, 8, 0, 0, 0, 7, 3, rows=rows[1]))
    )
    back = wire.verifier_frame(wire.verifier_frame_pb(frame))
    assert isinstance(back, Verdicts)
    assert [e._replace(rows=None) for e in back.entries] == [e._replace(rows=None) for e in frame.entries]
    assert all(np.array_equal(entry.rows, mine) for entry, mine in zip(back.entries, rows, strict=True))
    short = wire.verifier_frame_pb(frame)
    short.verdicts.accepted_counts[0] = 0
    with pytest.raises(Refusal, match="rows"):
        wire.verifier_frame(short)


@pytest.mark.parametrize(("rows_start", "row_count"), [(4, 1), (5, 4), (7, 2), (9, 0), (2**31 - 1, 1)])
def test_rows_of_positions_that_a_context_frame_does_not_have_are_refused(
    rows_start: int, row_count: int
) -> None:
    rows = np.zeros((row_count, 3), np.uint16)
    message = wire.feed_response_pb(Context(1, 5, (1, 2, 3), rows_start, rows))
    with pytest.raises(Refusal, match=r"context\.rows"):
        wire.feed_response(message)
    fitting = wire.feed_response_pb(Context(1, 5, (1, 2, 3), 6, np.zeros((2, 3), np.uint16)))
    assert wire.feed_response(fitting) == Context(1, 5, (1, 2, 3), 6)
