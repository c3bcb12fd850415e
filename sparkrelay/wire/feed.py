"""FeedContext: the bulk beside Speculate."""

from __future__ import annotations

from sparkrelay.frames import Context, Credit, FeedAttach, FeedRequestFrame, FeedResponseFrame, Ping, Pong
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.wire.values import BYTES_LIMIT, CONTEXT_ID_LIMIT, invalid, tensor, tensor_pb, within


def feed_request(pb: pb2.FeedContextRequest) -> FeedRequestFrame:
    """What a drafter says on FeedContext."""
    match pb.WhichOneof("frame"):
        case "attach":
            return FeedAttach(within("attach.stream_id", pb.attach.stream_id, BYTES_LIMIT))
        case "credit":
            if pb.credit.add_bytes <= 0:
                raise invalid("credit.add_bytes", f"is {pb.credit.add_bytes}; send a positive number")
            return Credit(pb.credit.add_bytes)
        case "ping":
            return Ping(pb.ping.sequence)
        case "pong":
            return Pong(pb.pong.sequence)
    raise invalid("frame", "is not set, or not known to this version; send a known one, or update this side")


def feed_request_pb(frame: FeedRequestFrame) -> pb2.FeedContextRequest:
    match frame:
        case FeedAttach(stream_id):
            return pb2.FeedContextRequest(attach=pb2.FeedAttach(stream_id=stream_id))
        case Credit(add_bytes):
            return pb2.FeedContextRequest(credit=pb2.Credit(add_bytes=add_bytes))
        case Ping(sequence):
            return pb2.FeedContextRequest(ping=pb2.Ping(sequence=sequence))
        case Pong(sequence):
            return pb2.FeedContextRequest(pong=pb2.Pong(sequence=sequence))


def feed_response(pb: pb2.FeedContextResponse) -> FeedResponseFrame:
    """What a verifier says on FeedContext."""
    match pb.WhichOneof("frame"):
        case "context":
            return _context(pb.context)
        case "ping":
            return Ping(pb.ping.sequence)
        case "pong":
            return Pong(pb.pong.sequence)
    raise invalid("frame", "is not set, or not known to this version; send a known one, or update this side")


def feed_response_pb(frame: FeedResponseFrame) -> pb2.FeedContextResponse:
    match frame:
        case Context():
            context = pb2.Context(
                handle=frame.handle,
                start=frame.start,
                token_ids=frame.token_ids,
                rows_start=frame.rows_start,
                rows=None if frame.rows is None else tensor_pb(frame.rows),
            )
            return pb2.FeedContextResponse(context=context)
        case Ping(sequence):
            return pb2.FeedContextResponse(ping=pb2.Ping(sequence=sequence))
        case Pong(sequence):
            return pb2.FeedContextResponse(pong=pb2.Pong(sequence=sequence))


def _context(pb: pb2.Context) -> Context:
    token_ids = tuple(within("context.token_ids", pb.token_ids, CONTEXT_ID_LIMIT))
    if pb.start < 0 or not token_ids or min(token_ids) < 0:
        raise invalid(
            "context", f"has {len(token_ids)} ids from {pb.start}; at least one is needed, none negative"
        )
    rows = tensor(pb.rows) if pb.HasField("rows") else None
    if rows is not None and (
        rows.ndim != 2 or not pb.start <= pb.rows_start <= pb.start + len(token_ids) - len(rows)
    ):
        raise invalid(
            "context.rows",
            f"has shape {list(rows.shape)} from {pb.rows_start}; [count, width] of positions of the {len(token_ids)} ids "
            f"from {pb.start} is needed",
        )
    return Context(pb.handle, pb.start, token_ids, pb.rows_start, rows)
