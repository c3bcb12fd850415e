"""The words for how things end, as plain enums for rooms without gRPC; their numbers are those of the protos (tested)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Reason(IntEnum):
    """Why a call was refused or a membership ended; what each means stands in errors.proto."""

    UNSPECIFIED = 0
    INVALID_FIELD = 1
    MODEL_NOT_FOUND = 2
    SESSION_NOT_FOUND = 3
    TURN_NOT_FOUND = 4
    SESSION_BUSY = 5
    PREFIX_MISMATCH = 6
    CONTEXT_EXCEEDED = 7
    OUT_OF_MEMORY = 8
    OVERLOADED = 9
    DRAINING = 10
    NO_VERIFIER = 11
    VERIFIER_LOST = 12
    TURN_POISONED = 13
    NOT_IMPLEMENTED = 14
    FINGERPRINT_MISMATCH = 15
    PROTOCOL_VERSION = 16
    PROTOCOL_VIOLATION = 17
    JOIN_REFUSED = 18
    SUPERSEDED = 19
    SLOW = 20
    SESSION_ENDED = 21
    SILENT = 22
    INVALID_TOKEN = 23
    UNAUTHENTICATED = 24
    INTERNAL = 25
    CANCELLED = 26
    DEADLINE_EXCEEDED = 27
    DRAFTER_DECLINED = 28
    TOO_LARGE = 29
    RESUME_LOST = 30
    GRAMMAR_REFUSED = 31
    SESSION_EXISTS = 32


class FinishReason(IntEnum):
    """Why a turn ended; see generation.proto."""

    UNSPECIFIED = 0
    STOP = 1
    LENGTH = 2
    CONTEXT = 3
    CANCELLED = 4


class BlockState(IntEnum):
    """What became of the drafter's part in a round; see generation.proto."""

    UNSPECIFIED = 0
    FRESH = 1
    REBASED = 2
    LATE = 3
    NO_DRAFTER = 4
    NOT_ASKED = 5


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of a request, by its name in the proto, and what to send instead."""

    field: str
    message: str


class Refusal(Exception):
    """A request that cannot be served: data for the caller, never a bug of ours.

    `sparkrelay.errors` turns it into a gRPC status and back. retry_after_ms: 0 if trying again cannot help.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_ms: int = 0,
        turn_id: str = "",
        trace_id: str = "",
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.violations = violations
        self.retry_after_ms = retry_after_ms
        self.turn_id = turn_id
        self.trace_id = trace_id


def field_refusal(
    field: str, message: str, reason: Reason = Reason.INVALID_FIELD, *, retry_after_ms: int = 0
) -> Refusal:
    """A refusal for one field. `message` goes on after the field's name: what is wrong, the limit, the next step."""
    violations = (FieldViolation(field, message),)
    return Refusal(reason, f"{field}: {message}", violations=violations, retry_after_ms=retry_after_ms)
