"""Speculate: one oneof a frame. The two hot frames are columns on the wire and one entry a session here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise, repeat
from typing import Any

from sparkrelay.frames import (
    Block,
    Blocks,
    DrafterFrame,
    Drain,
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
    VerifierFrame,
    Welcome,
)
from sparkrelay.v1 import errors_pb2, generation_pb2
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.wire.values import (
    BYTES_LIMIT,
    ENTRY_LIMIT,
    ID_LIMIT,
    STOP_ID_LIMIT,
    TEXT_LIMIT,
    TRACEPARENT_BYTES,
    fingerprint,
    fingerprint_pb,
    finish_reason,
    invalid,
    reason,
    sampling,
    sampling_pb,
    tensor,
    tensor_pb,
    within,
)

# ---- what a drafter says ----------------------------------------------------------------------------------------------------


def drafter_frame(pb: pb2.SpeculateRequest) -> DrafterFrame:
    """The frame in a message of the drafter."""
    kind = pb.WhichOneof("frame")
    if kind is None:
        raise invalid(
            "frame", "is not set, or not known to this version; send a known one, or update this side"
        )
    return _DRAFTER_READERS[kind](getattr(pb, kind))


def drafter_frame_pb(frame: DrafterFrame) -> pb2.SpeculateRequest:
    match frame:
        case Blocks():
            return pb2.SpeculateRequest(blocks=_blocks_pb(frame))
        case Ping(sequence):
            return pb2.SpeculateRequest(ping=pb2.Ping(sequence=sequence))
        case Pong(sequence):
            return pb2.SpeculateRequest(pong=pb2.Pong(sequence=sequence))
        case Hello():
            hello = pb2.Hello(
                protocol_min=frame.protocol_min,
                protocol_max=frame.protocol_max,
                drafter_id=frame.drafter_id,
                incarnation=frame.incarnation,
                fingerprint=fingerprint_pb(frame.fingerprint),
            )
            return pb2.SpeculateRequest(hello=hello)
        case Join(session_id, token, tokens_held, held_hash):
            join = pb2.Join(session_id=session_id, token=token, tokens_held=tokens_held, held_hash=held_hash)
            return pb2.SpeculateRequest(join=join)
        case Leave(handle, why, session_id):
            leave = pb2.Leave(handle=handle, reason=errors_pb2.Reason.ValueType(why), session_id=session_id)
            return pb2.SpeculateRequest(leave=leave)


def _hello(pb: pb2.Hello) -> Hello:
    return Hello(
        protocol_min=pb.protocol_min,
        protocol_max=pb.protocol_max,
        drafter_id=within("hello.drafter_id", pb.drafter_id, ID_LIMIT),
        incarnation=within("hello.incarnation", pb.incarnation, ID_LIMIT),
        fingerprint=fingerprint(pb.fingerprint),
    )


def _join(pb: pb2.Join) -> Join:
    if pb.tokens_held < 0:
        raise invalid("join.tokens_held", f"is {pb.tokens_held}; it cannot be negative")
    return Join(
        session_id=within("join.session_id", pb.session_id, ID_LIMIT),
        token=within("join.token", pb.token, BYTES_LIMIT),
        tokens_held=pb.tokens_held,
        held_hash=within("join.held_hash", pb.held_hash, BYTES_LIMIT),
    )


def _blocks(pb: pb2.Blocks) -> Blocks:
    count = _column_length(
        "blocks", pb, ("handles", "rounds", "base_lens", "token_counts", "draft_us", "queue_us")
    )
    token_ids, confidences = tuple(pb.token_ids), pb.confidences
    token_counts = list(pb.token_counts)
    if token_counts and min(token_counts) < 0:
        raise invalid("blocks.token_counts", "has a negative number")
    if not sum(token_counts) == len(token_ids) == len(confidences):
        lengths = f"{sum(token_counts)} tokens are announced, {len(token_ids)} ids and {len(confidences)} confidences follow"
        raise invalid("blocks.token_ids", lengths)
    assumed: Iterable[int] = pb.assumed_counts or repeat(0, count)
    if len(pb.assumed_counts) not in (0, count):
        raise _unequal("blocks", "assumed_counts", len(pb.assumed_counts), count)
    ends = list(accumulate(token_counts, initial=0))
    entries = map(
        Block,
        pb.handles,
        pb.rounds,
        pb.base_lens,
        [token_ids[start:end] for start, end in pairwise(ends)],
        [confidences[start:end] for start, end in pairwise(ends)],
        pb.draft_us,
        pb.queue_us,
        assumed,
        _traceparents("blocks", pb.traceparents, count),
    )
    return Blocks(tuple(entries))


def _blocks_pb(frame: Blocks) -> pb2.Blocks:
    handles, rounds, base_lens, token_ids, confidences, draft_us, queue_us, assumed_counts, traces = _columns(
        frame.entries, 9
    )
    return pb2.Blocks(
        handles=handles,
        rounds=rounds,
        base_lens=base_lens,
        token_counts=list(map(len, token_ids)),
        token_ids=list(chain.from_iterable(token_ids)),
        confidences=b"".join(confidences),
        draft_us=draft_us,
        queue_us=queue_us,
        assumed_counts=_unless_all_empty(assumed_counts),
        traceparents=_unless_all_empty(traces),
    )


_DRAFTER_READERS: dict[str, Callable[[Any], DrafterFrame]] = {
    "hello": _hello,
    "join": _join,
    "blocks": _blocks,
    "leave": lambda pb: Leave(
        pb.handle, reason(pb.reason), within("leave.session_id", pb.session_id, ID_LIMIT)
    ),
    "ping": lambda pb: Ping(pb.sequence),
    "pong": lambda pb: Pong(pb.sequence),
}


# ---- what a verifier says ---------------------------------------------------------------------------------------------------


def verifier_frame(pb: pb2.SpeculateResponse) -> VerifierFrame:
    """The frame in a message of the verifier."""
    kind = pb.WhichOneof("frame")
    if kind is None:
        raise invalid(
            "frame", "is not set, or not known to this version; send a known one, or update this side"
        )
    return _VERIFIER_READERS[kind](getattr(pb, kind))


def verifier_frame_pb(frame: VerifierFrame) -> pb2.SpeculateResponse:
    kind, write = _VERIFIER_WRITERS[type(frame)]
    return pb2.SpeculateResponse(**{kind: write(frame)})


def _welcome(pb: pb2.Welcome) -> Welcome:
    return Welcome(
        protocol_version=pb.protocol_version,
        verifier_id=within("welcome.verifier_id", pb.verifier_id, ID_LIMIT),
        epoch=within("welcome.epoch", pb.epoch, ID_LIMIT),
        stream_id=within("welcome.stream_id", pb.stream_id, BYTES_LIMIT),
        session_limit=pb.session_limit,
        block_limit=pb.block_limit,
        frame_limit_bytes=pb.frame_limit_bytes,
    )


def _welcome_pb(frame: Welcome) -> pb2.Welcome:
    return pb2.Welcome(
        protocol_version=frame.protocol_version,
        verifier_id=frame.verifier_id,
        epoch=frame.epoch,
        stream_id=frame.stream_id,
        session_limit=frame.session_limit,
        block_limit=frame.block_limit,
        frame_limit_bytes=frame.frame_limit_bytes,
    )


def _turn_started(pb: pb2.TurnStarted) -> TurnStarted:
    return TurnStarted(
        handle=pb.handle,
        turn_id=within("turn_started.turn_id", pb.turn_id, ID_LIMIT),
        base_len=pb.base_len,
        sampling=sampling(pb.sampling),
        noise_version=pb.noise_version,
        remaining_count=pb.remaining_count,
        output_start=pb.output_start,
        stop_token_ids=tuple(within("turn_started.stop_token_ids", pb.stop_token_ids, STOP_ID_LIMIT)),
        draft_budget=pb.draft_budget,
        traceparent=_traceparent("turn_started.traceparent", pb.traceparent),
    )


def _turn_started_pb(frame: TurnStarted) -> pb2.TurnStarted:
    return pb2.TurnStarted(
        handle=frame.handle,
        turn_id=frame.turn_id,
        base_len=frame.base_len,
        sampling=sampling_pb(frame.sampling),
        noise_version=frame.noise_version,
        remaining_count=frame.remaining_count,
        output_start=frame.output_start,
        stop_token_ids=frame.stop_token_ids,
        draft_budget=frame.draft_budget,
        traceparent=frame.traceparent,
    )


_VERDICT_COLUMNS = (
    "handles", "rounds", "base_lens", "block_base_lens", "depths", "accepted_counts", "next_token_ids", "draft_budgets",
)  # fmt: skip


def _verdicts(pb: pb2.Verdicts) -> Verdicts:
    count = _column_length("verdicts", pb, _VERDICT_COLUMNS)
    rows = _split_rows(pb) if pb.HasField("rows") else repeat(None, count)
    columns = [getattr(pb, name) for name in _VERDICT_COLUMNS]
    traces = _traceparents("verdicts", pb.traceparents, count)
    return Verdicts(tuple(map(Verdict, *columns, rows, traces)))


def _split_rows(pb: pb2.Verdicts) -> Iterator[Any]:
    rows = tensor(pb.rows)
    sizes = [accepted + 1 for accepted in pb.accepted_counts]
    if rows.ndim != 2 or (sizes and min(sizes) < 1) or sum(sizes) != len(rows):
        raise invalid("verdicts.rows", f"has shape {list(rows.shape)}; [{sum(sizes)}, width] is needed")
    start = 0
    parts = []
    for size in sizes:
        parts.append(rows[start : start + size])
        start += size
    return iter(parts)


def _verdicts_pb(frame: Verdicts) -> pb2.Verdicts:
    handles, rounds, base_lens, block_base_lens, depths, accepted, next_ids, budgets, rows, traces = _columns(
        frame.entries, 10
    )
    return pb2.Verdicts(
        handles=handles,
        rounds=rounds,
        base_lens=base_lens,
        block_base_lens=block_base_lens,
        depths=depths,
        accepted_counts=accepted,
        next_token_ids=next_ids,
        draft_budgets=budgets,
        rows=_joined_rows(rows) if rows and rows[0] is not None else None,
        traceparents=_unless_all_empty(traces),
    )


def _joined_rows(rows: Sequence[Any]) -> Any:
    import numpy as np

    return tensor_pb(np.concatenate(rows))


_VERIFIER_READERS: dict[str, Callable[[Any], VerifierFrame]] = {
    "welcome": _welcome,
    "invite": lambda pb: Invite(
        within("invite.session_id", pb.session_id, ID_LIMIT),
        within("invite.token", pb.token, BYTES_LIMIT),
        _traceparent("invite.traceparent", pb.traceparent),
    ),
    "joined": lambda pb: Joined(
        within("joined.session_id", pb.session_id, ID_LIMIT), pb.handle, pb.keep_tokens
    ),
    "turn_started": _turn_started,
    "rewound": lambda pb: Rewound(pb.handle, pb.len),
    "verdicts": _verdicts,
    "turn_ended": lambda pb: TurnEnded(
        pb.handle, within("turn_ended.turn_id", pb.turn_id, ID_LIMIT), finish_reason(pb.finish_reason)
    ),
    "left": lambda pb: Left(
        pb.handle,
        within("left.session_id", pb.session_id, ID_LIMIT),
        reason(pb.reason),
        within("left.message", pb.message, TEXT_LIMIT),
    ),
    "drain": lambda pb: Drain(pb.deadline_ms),
    "ping": lambda pb: Ping(pb.sequence),
    "pong": lambda pb: Pong(pb.sequence),
}

_VERIFIER_WRITERS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    Welcome: ("welcome", _welcome_pb),
    Invite: (
        "invite",
        lambda f: pb2.Invite(session_id=f.session_id, token=f.token, traceparent=f.traceparent),
    ),
    Joined: (
        "joined",
        lambda f: pb2.Joined(session_id=f.session_id, handle=f.handle, keep_tokens=f.keep_tokens),
    ),
    TurnStarted: ("turn_started", _turn_started_pb),
    Rewound: ("rewound", lambda f: pb2.Rewound(handle=f.handle, len=f.length)),
    Verdicts: ("verdicts", _verdicts_pb),
    TurnEnded: (
        "turn_ended",
        lambda f: pb2.TurnEnded(
            handle=f.handle,
            turn_id=f.turn_id,
            finish_reason=generation_pb2.FinishReason.ValueType(f.finish_reason),
        ),
    ),
    Left: (
        "left",
        lambda f: pb2.Left(
            handle=f.handle,
            session_id=f.session_id,
            reason=errors_pb2.Reason.ValueType(f.reason),
            message=f.message[:TEXT_LIMIT],
        ),
    ),
    Drain: ("drain", lambda f: pb2.Drain(deadline_ms=f.deadline_ms)),
    Ping: ("ping", lambda f: pb2.Ping(sequence=f.sequence)),
    Pong: ("pong", lambda f: pb2.Pong(sequence=f.sequence)),
}


# ---- columns ----------------------------------------------------------------------------------------------------------------


def _column_length(frame: str, pb: Any, names: tuple[str, ...]) -> int:
    """How many entries the columns have; they must agree."""
    count = len(getattr(pb, names[0]))
    within(f"{frame}.{names[0]}", getattr(pb, names[0]), ENTRY_LIMIT)
    for name in names[1:]:
        if len(getattr(pb, name)) != count:
            raise _unequal(frame, name, len(getattr(pb, name)), count)
    return count


def _unequal(frame: str, name: str, length: int, expected: int) -> Exception:
    return invalid(
        f"{frame}.{name}", f"has {length} entries where handles has {expected}; columns must be of one length"
    )


def _traceparent(field: str, value: bytes) -> bytes:
    if len(value) not in (0, TRACEPARENT_BYTES):
        raise invalid(field, f"has {len(value)} bytes; {TRACEPARENT_BYTES} or none are needed")
    return value


def _traceparents(frame: str, column: Any, count: int) -> Iterable[bytes]:
    if not column:
        return repeat(b"", count)
    if len(column) != count:
        raise _unequal(frame, "traceparents", len(column), count)
    return [_traceparent(f"{frame}.traceparents", value) for value in column]


def _columns(entries: Sequence[tuple[Any, ...]], width: int) -> Iterable[tuple[Any, ...]]:
    """The fields of all entries, a column each."""
    return zip(*entries, strict=True) if entries else repeat((), width)


def _unless_all_empty(column: Sequence[Any]) -> Sequence[Any]:
    return column if any(column) else ()
