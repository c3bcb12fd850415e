"""For every call of the three services: valid messages to be spoilt. Streams have their frames after a good beginning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from sparkrelay.frames import Block, Blocks, Credit, FeedAttach, Fingerprint, Hello, Join, Leave, Ping, Pong
from sparkrelay.outcomes import Reason
from sparkrelay.protocol import chain_hash
from sparkrelay.sampling import Sampling
from sparkrelay.v1 import admin_service_pb2 as admin_pb
from sparkrelay.v1 import drafter_service_pb2 as drafter_pb
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import generation_pb2 as generation_pb
from sparkrelay.v1 import verifier_service_pb2 as verifier_pb
from sparkrelay.wire import drafter_frame_pb, feed_request_pb, sampling_pb

SAMPLING = sampling_pb(
    Sampling(
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias=((3, 1.5), (60, -2.0)),
        min_tokens=2,
        seed=11,
    )
)
STOP = generation_pb.StopConditions(max_token_count=9, stop_token_ids=[5, 6])
FIXED = generation_pb.Speculation(mode=generation_pb.Speculation.MODE_FIXED, fixed_depth=3)
IDS = (1, 2, 3, 4)


def services() -> list[MethodDescriptor]:
    """Every call there is: one that is new has no messages here, and its test says so."""
    files = (gateway_pb, admin_pb, verifier_pb, drafter_pb)
    return [
        method
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


def hello(name: str = "mutant") -> bytes:
    return _bytes(drafter_frame_pb(Hello(1, 1, name, "run", Fingerprint(block_size=15, proposal_kind="raw"))))


def recorded(session_id: str) -> Mapping[str, Sequence[bytes]]:
    """By a call's full name. session_id: one that the gateway has open, and that nobody needs."""
    messages: dict[str, list[Message]] = {
        "GatewayService.CreateSession": [gateway_pb.CreateSessionRequest(model="toy", idle_limit_ms=60_000)],
        "GatewayService.ForkSession": [gateway_pb.ForkSessionRequest(session_id=session_id, token_count=2)],
        "GatewayService.Generate": _gateway_turns(session_id),
        "GatewayService.GetSession": [gateway_pb.GetSessionRequest(session_id=session_id)],
        "GatewayService.ListSessions": [gateway_pb.ListSessionsRequest(page_size=3, page_token="1")],
        "GatewayService.EndSession": [gateway_pb.EndSessionRequest(session_id=session_id)],
        "GatewayService.CancelTurn": [gateway_pb.CancelTurnRequest(turn_id="turn-1")],
        "GatewayService.GetTurn": [gateway_pb.GetTurnRequest(turn_id="turn-1")],
        "GatewayService.ListTurns": [
            gateway_pb.ListTurnsRequest(page_size=3, page_token="1", session_id=session_id)
        ],
        "GatewayService.WatchRounds": [gateway_pb.WatchRoundsRequest(session_id=session_id)],
        "GatewayService.ListModels": [gateway_pb.ListModelsRequest()],
        "AdminService.ListWorkers": [admin_pb.ListWorkersRequest()],
        "AdminService.DrainWorker": [
            admin_pb.DrainWorkerRequest(address="127.0.0.1:1")
        ],  # not ours: it would drain
        "VerifierService.Generate": _verifier_turns(),
        "VerifierService.Describe": [verifier_pb.VerifierServiceDescribeRequest()],
        "VerifierService.WatchLoad": [verifier_pb.VerifierServiceWatchLoadRequest()],
        "VerifierService.ForkSession": [
            verifier_pb.VerifierServiceForkSessionRequest(
                session_id="raw-1", fork_session_id="raw-2", token_count=2, token_hash=chain_hash(IDS[:2])
            )
        ],
        "VerifierService.EndSession": [verifier_pb.VerifierServiceEndSessionRequest(session_id="raw-1")],
        "DrafterService.Describe": [drafter_pb.DrafterServiceDescribeRequest()],
        "DrafterService.WatchLoad": [drafter_pb.DrafterServiceWatchLoadRequest()],
    }
    found = {name: [_bytes(each) for each in every] for name, every in messages.items()}
    found["VerifierService.Speculate"] = [_bytes(drafter_frame_pb(frame)) for frame in SPECULATE]
    found["VerifierService.FeedContext"] = feed_frames(b"0" * 16)
    return found


SPECULATE: tuple[Any, ...] = (
    Hello(1, 1, "mutant", "run", Fingerprint(block_size=15, vocab_size=64, noise_versions=(1,))),
    Join("raw-1", b"t" * 16, 2, chain_hash((1, 2))),
    Blocks((Block(1, 0, 5, (1, 2, 3), b"\xff\x80\x01", 10, 20), Block(2, 1, 7, (4,), b"\x09"))),
    Blocks((Block(1, 0, 5, (), b""),)),
    Leave(1, Reason.DRAFTER_DECLINED),
    Ping(3),
    Pong(1),
)


def feed_frames(stream_id: bytes) -> list[bytes]:
    frames = (FeedAttach(stream_id), Credit(4096), Credit(2**40), Ping(2), Pong(1))
    return [_bytes(feed_request_pb(frame)) for frame in frames]


def _gateway_turns(session_id: str) -> list[Message]:
    tokens = gateway_pb.TokenIds(token_ids=IDS)
    chat = gateway_pb.ChatMessages(
        messages=[
            gateway_pb.ChatMessage(role="system", content="Be brief."),
            gateway_pb.ChatMessage(role="user", content="Hé 🦊"),
        ]
    )
    fields: dict[str, Any] = {"sampling": SAMPLING, "stop": STOP, "speculation": FIXED}
    request = gateway_pb.GenerateRequest
    return [
        request(tokens=tokens, stop=STOP),
        request(tokens=tokens, stop=STOP, linger_ms=60, turn_id="a-turn-id-of-a-client-0001"),
        request(model="toy", tokens=tokens, include_rounds=True, logprob_count=2, **fields),
        request(session_id=session_id, tokens=tokens, **fields),
        request(text="Once upon a time", stop=STOP),
        request(chat=chat, linger_ms=10, **fields),
        request(resume=gateway_pb.Resume(turn_id="turn-1", next_index=1)),
        request(
            tokens=tokens,
            stop=STOP,
            response_format=generation_pb.ResponseFormat(json_schema='{"type":"object"}'),
        ),
    ]


def _verifier_turns() -> list[Message]:
    request = verifier_pb.VerifierServiceGenerateRequest
    first: dict[str, Any] = {"append_token_ids": IDS, "output_start": 4, "stop": STOP}
    return [
        request(session_id="raw-1", turn_id="raw-turn-1", **first),
        request(session_id="raw-2", turn_id="raw-turn-2", sampling=SAMPLING, logprob_count=3, **first),
        request(
            session_id="raw-1",
            turn_id="raw-turn-3",
            keep_len=2,
            keep_hash=chain_hash(IDS[:2]),
            append_token_ids=[9],
            output_start=3,
            stop=STOP,
            speculation=FIXED,
            drafter_ids=["mutant", "healthy"],
            noise_version=1,
            prefix_salt=b"salt",
        ),
    ]


def _bytes(message: Message) -> bytes:
    return message.SerializeToString()
