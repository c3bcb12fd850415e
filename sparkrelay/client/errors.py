"""What can go wrong, named for what the caller can do about it.

SparkRelayError
  InvalidRequest      change the request: `violations` names the fields
  NotFound            the model, session or turn does not exist here
  SessionBusy         the session has a turn under way: wait for it, or cancel it
  Unauthenticated     send the right token
  Overloaded          try again after `retry_after` seconds
  Unavailable         a service is away: try again, or look at its state
  ResumeLost          the rest of the turn is not kept any more: ask again with the same seed
  Cancelled           the caller, or another stream of the turn, ended this one
  DeadlineExceeded    allow more time
  InternalError       a bug of ours: report it with `turn_id`

try:
    answer = client.generate("Hello", max_tokens=100_000)
except sparkrelay.client.InvalidRequest as error:
    print(error.field, error.message, error.turn_id)
"""

from __future__ import annotations

import grpc

from sparkrelay.errors import refusal_of
from sparkrelay.outcomes import FieldViolation, Reason, Refusal
from sparkrelay.security import explain_handshake


class SparkRelayError(Exception):
    """Any refusal or failure.

    reason      name of the reason in errors.proto, for example "SESSION_NOT_FOUND"
    message     one sentence, with the next step
    violations  fields of the request that cannot be served, by their names in the proto, each with what to send instead
    field       the first of these names, empty if no field is at fault
    retry_after seconds after which trying again can help; 0 if the server did not say
    turn_id, trace_id  of the turn, empty if there was none: logs and traces have it under these
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        turn_id: str = "",
        trace_id: str = "",
        violations: tuple[FieldViolation, ...] = (),
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.turn_id = turn_id
        self.trace_id = trace_id
        self.violations = violations
        self.retry_after = retry_after

    @property
    def field(self) -> str:
        return self.violations[0].field if self.violations else ""


class InvalidRequest(SparkRelayError):
    """The request cannot be served as it is."""


class NotFound(SparkRelayError):
    """The model, session or turn does not exist here."""


class SessionBusy(SparkRelayError):
    """The session has a turn under way; one at a time."""


class Unauthenticated(SparkRelayError):
    """The token is missing or wrong."""


class Overloaded(SparkRelayError):
    """The queues are full: try again after `retry_after` seconds."""


class Unavailable(SparkRelayError):
    """A service is away or leaving."""


class ResumeLost(NotFound):
    """The turn is known, but what came from there on is no longer kept. A new turn with the same seed gives the same tokens."""


class Cancelled(SparkRelayError):
    """The turn was cancelled, or another stream resumed it."""


class DeadlineExceeded(SparkRelayError):
    """The call's time was up."""


class InternalError(SparkRelayError):
    """A bug of ours; the gateway's log has it under the same turn id."""


_CLASS_OF: dict[Reason, type[SparkRelayError]] = {
    Reason.INVALID_FIELD: InvalidRequest,
    Reason.CONTEXT_EXCEEDED: InvalidRequest,
    Reason.INVALID_TOKEN: InvalidRequest,
    Reason.OUT_OF_MEMORY: InvalidRequest,
    Reason.TOO_LARGE: InvalidRequest,
    Reason.NOT_IMPLEMENTED: InvalidRequest,
    Reason.MODEL_NOT_FOUND: NotFound,
    Reason.SESSION_NOT_FOUND: NotFound,
    Reason.TURN_NOT_FOUND: NotFound,
    Reason.SESSION_ENDED: NotFound,
    Reason.SESSION_EXISTS: InvalidRequest,
    Reason.SESSION_BUSY: SessionBusy,
    Reason.UNAUTHENTICATED: Unauthenticated,
    Reason.OVERLOADED: Overloaded,
    Reason.DRAINING: Unavailable,
    Reason.NO_VERIFIER: Unavailable,
    Reason.VERIFIER_LOST: Unavailable,
    Reason.RESUME_LOST: ResumeLost,
    Reason.GRAMMAR_REFUSED: InvalidRequest,
    Reason.TURN_POISONED: InternalError,
    Reason.INTERNAL: InternalError,
    Reason.SUPERSEDED: Cancelled,
    Reason.CANCELLED: Cancelled,
    Reason.DEADLINE_EXCEEDED: DeadlineExceeded,
}

_CLASS_OF_STATUS: dict[grpc.StatusCode, type[SparkRelayError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def class_of(reason: Reason, status: grpc.StatusCode) -> type[SparkRelayError]:
    """The exception for a reason; its status decides where we know nothing better."""
    return _CLASS_OF.get(reason) or _CLASS_OF_STATUS.get(status, InternalError)


def error_of(failure: grpc.RpcError, address: str, *, encrypted: bool = False) -> SparkRelayError:
    """The error for a failed call to the gateway at `address`; encrypted: it was dialled over TLS."""
    refusal = refusal_of(failure)
    if was_never_sent(failure):
        handshake = explain_handshake(refusal.message, encrypted=encrypted)
        if handshake:
            message = f"The gateway at {address} cannot be used so: {handshake}."
            if encrypted:
                return Unauthenticated(message, reason=Reason.UNAUTHENTICATED.name)
            return _filled(Unavailable, refusal, message)
        message = f"No gateway answers at {address}. Start one with `sparkrelay up`, or name another address."
        return _filled(Unavailable, refusal, message)
    return _filled(class_of(refusal.reason, status_of(failure)), refusal, refusal.message)


def _filled(kind: type[SparkRelayError], refusal: Refusal, message: str) -> SparkRelayError:
    return kind(
        message,
        reason=refusal.reason.name,
        turn_id=refusal.turn_id,
        trace_id=refusal.trace_id,
        violations=refusal.violations,
        retry_after=refusal.retry_after_ms / 1000,
    )


def status_of(failure: grpc.RpcError) -> grpc.StatusCode:
    """The status of a failed call, blocking or asyncio."""
    code = failure.code() if callable(getattr(failure, "code", None)) else None
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def was_never_sent(failure: grpc.RpcError) -> bool:
    """True if no connection was ever made for the call, so that sending it again cannot run it twice.

    gRPC gives no other sign of it than these words of its details; a test holds them against real sockets.
    """
    if status_of(failure) is not grpc.StatusCode.UNAVAILABLE:
        return False
    if refusal_of(failure).reason is not Reason.UNSPECIFIED:
        return False  # a gateway has answered; it may quote what it was told of a verifier
    details = failure.details() if callable(getattr(failure, "details", None)) else ""
    return "failed to connect to all addresses" in str(details)


def was_cut(failure: grpc.RpcError) -> bool:
    """True if the connection broke, or never came about; False if somebody answered, whatever it was."""
    details = str(failure.details()) if callable(getattr(failure, "details", None)) else ""
    if status_of(failure) in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        # What gRPC itself makes of a stream that ended without a status is told by its words only.
        return "RST_STREAM" in details or "Stream removed" in details
    return (
        status_of(failure) is grpc.StatusCode.UNAVAILABLE and refusal_of(failure).reason is Reason.UNSPECIFIED
    )
