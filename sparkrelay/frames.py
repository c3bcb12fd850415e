"""The frames of the Speculate conversation as plain values: what `protocol` decides on and `wire` turns into bytes.

They mirror the messages of verifier_service.proto one to one (the meaning of every field stands there), without
protobuf, so that the protocol, the engine and the drafter's session can be tested as pure functions. Columns of the hot
frames are split into one entry a session here; `wire` joins them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from sparkrelay.outcomes import FinishReason, Reason
from sparkrelay.sampling import Sampling

PREFILL_ROUND = -1  # the round number of the verdict for the token that ends the reading of the prompt
NO_TOKEN = -1  # next_token_id of a verdict whose accepted token ended the turn
INT32_MAX = 2**31 - 1


def duration_us(measured_us: int) -> int:
    """A measured time as frames and reports carry it: an int32, so 35 minutes and more are 35 minutes."""
    return measured_us if measured_us < INT32_MAX else INT32_MAX


class ContextKind(IntEnum):
    """What a drafter reads of the target."""

    UNSPECIFIED = 0
    TOKENS = 1
    ROWS = 2


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What must be equal, or fit, between a drafter and a verifier. Empty and 0 mean: any will do."""

    target_id: str = ""
    tokenizer_hash: str = ""
    vocab_size: int = 0
    tap_layers: tuple[int, ...] = ()
    block_size: int = 0
    context_kind: ContextKind = ContextKind.TOKENS
    context_width: int = 0
    context_hash: str = ""
    noise_versions: tuple[int, ...] = (1,)
    proposal_kind: str = ""


@dataclass(frozen=True, slots=True)
class Hello:
    protocol_min: int
    protocol_max: int
    drafter_id: str
    incarnation: str
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class Welcome:
    protocol_version: int
    verifier_id: str
    epoch: str
    stream_id: bytes
    session_limit: int
    block_limit: int
    frame_limit_bytes: int


@dataclass(frozen=True, slots=True)
class Invite:
    session_id: str
    token: bytes
    traceparent: bytes = b""


@dataclass(frozen=True, slots=True)
class Join:
    session_id: str
    token: bytes
    tokens_held: int = 0
    held_hash: bytes = b""


@dataclass(frozen=True, slots=True)
class Joined:
    session_id: str
    handle: int
    keep_tokens: int


@dataclass(frozen=True, slots=True)
class TurnStarted:
    handle: int
    turn_id: str
    base_len: int
    sampling: Sampling
    noise_version: int
    remaining_count: int
    output_start: int
    stop_token_ids: tuple[int, ...]
    draft_budget: int
    traceparent: bytes = b""


@dataclass(frozen=True, slots=True)
class Rewound:
    handle: int
    length: int


class Block(NamedTuple):
    """One entry of `Blocks`; a tuple, because hundreds are made in a step. confidences are 1/255 steps, one a token."""

    handle: int
    round: int
    base_len: int
    token_ids: tuple[int, ...]
    confidences: bytes
    draft_us: int = 0
    queue_us: int = 0
    assumed_count: int = 0
    traceparent: bytes = b""


@dataclass(frozen=True, slots=True)
class Blocks:
    entries: tuple[Block, ...]


class Verdict(NamedTuple):
    """One entry of `Verdicts`; a tuple, because hundreds are made in a step.

    rows: an array [accepted_count + 1, width] of context rows, or None.
    """

    handle: int
    round: int
    base_len: int
    block_base_len: int
    depth: int
    accepted_count: int
    next_token_id: int
    draft_budget: int
    rows: Any = None
    traceparent: bytes = b""


@dataclass(frozen=True, slots=True)
class Verdicts:
    entries: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class TurnEnded:
    handle: int
    turn_id: str
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Leave:
    """session_id: of an invite that is declined; then handle is 0."""

    handle: int
    reason: Reason
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class Left:
    handle: int
    session_id: str
    reason: Reason
    message: str = ""


@dataclass(frozen=True, slots=True)
class Drain:
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class Ping:
    sequence: int


@dataclass(frozen=True, slots=True)
class Pong:
    sequence: int


@dataclass(frozen=True, slots=True)
class FeedAttach:
    stream_id: bytes


@dataclass(frozen=True, slots=True)
class Credit:
    add_bytes: int


@dataclass(frozen=True, slots=True)
class Context:
    """rows: an array [count, width] of context rows from rows_start on, or None."""

    handle: int
    start: int
    token_ids: tuple[int, ...]
    rows_start: int = 0
    rows: Any = field(default=None, compare=False)


DrafterFrame = Hello | Join | Blocks | Leave | Ping | Pong
VerifierFrame = (
    Welcome | Invite | Joined | TurnStarted | Rewound | Verdicts | TurnEnded | Left | Drain | Ping | Pong
)
FeedRequestFrame = FeedAttach | Credit | Ping | Pong
FeedResponseFrame = Context | Ping | Pong
