"""Reasons on the wire: one table from reason to gRPC status, and google.rpc details in both directions.

A refusal travels as a status with ErrorInfo (the reason's name, domain "sparkrelay", turn_id and trace_id),
BadRequest for fields,
and RetryInfo where trying again can help. Details travel in trailing metadata, which gRPC limits to 8 KiB: texts are cut.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from sparkrelay.outcomes import FieldViolation, Reason, Refusal

DOMAIN = "sparkrelay"
DETAILS_KEY = "grpc-status-details-bin"
MESSAGE_LIMIT = 1024  # characters
VIOLATION_LIMIT = 8

_Code = grpc.StatusCode

STATUS_OF: dict[Reason, grpc.StatusCode] = {
    Reason.UNSPECIFIED: _Code.UNKNOWN,
    Reason.INVALID_FIELD: _Code.INVALID_ARGUMENT,
    Reason.MODEL_NOT_FOUND: _Code.NOT_FOUND,
    Reason.SESSION_NOT_FOUND: _Code.NOT_FOUND,
    Reason.TURN_NOT_FOUND: _Code.NOT_FOUND,
    Reason.SESSION_BUSY: _Code.FAILED_PRECONDITION,
    Reason.PREFIX_MISMATCH: _Code.FAILED_PRECONDITION,
    Reason.CONTEXT_EXCEEDED: _Code.INVALID_ARGUMENT,
    Reason.OUT_OF_MEMORY: _Code.RESOURCE_EXHAUSTED,
    Reason.OVERLOADED: _Code.RESOURCE_EXHAUSTED,
    Reason.DRAINING: _Code.UNAVAILABLE,
    Reason.NO_VERIFIER: _Code.UNAVAILABLE,
    Reason.VERIFIER_LOST: _Code.UNAVAILABLE,
    Reason.TURN_POISONED: _Code.ABORTED,
    Reason.NOT_IMPLEMENTED: _Code.UNIMPLEMENTED,
    Reason.FINGERPRINT_MISMATCH: _Code.FAILED_PRECONDITION,
    Reason.PROTOCOL_VERSION: _Code.FAILED_PRECONDITION,
    Reason.PROTOCOL_VIOLATION: _Code.FAILED_PRECONDITION,
    Reason.JOIN_REFUSED: _Code.PERMISSION_DENIED,
    Reason.SUPERSEDED: _Code.ABORTED,
    Reason.SLOW: _Code.RESOURCE_EXHAUSTED,
    Reason.SESSION_ENDED: _Code.ABORTED,
    Reason.SILENT: _Code.DEADLINE_EXCEEDED,
    Reason.INVALID_TOKEN: _Code.INVALID_ARGUMENT,
    Reason.UNAUTHENTICATED: _Code.UNAUTHENTICATED,
    Reason.INTERNAL: _Code.INTERNAL,
    Reason.CANCELLED: _Code.CANCELLED,
    Reason.DEADLINE_EXCEEDED: _Code.DEADLINE_EXCEEDED,
    Reason.DRAFTER_DECLINED: _Code.UNAVAILABLE,
    Reason.TOO_LARGE: _Code.RESOURCE_EXHAUSTED,
    Reason.RESUME_LOST: _Code.FAILED_PRECONDITION,
    Reason.GRAMMAR_REFUSED: _Code.INVALID_ARGUMENT,
    Reason.SESSION_EXISTS: _Code.ALREADY_EXISTS,
}

# What a status means that came without our details (from gRPC itself, or a proxy). UNAVAILABLE and NOT_FOUND stay
# UNSPECIFIED: only the
# caller knows who was not there.
_REASON_OF_FOREIGN: dict[grpc.StatusCode, Reason] = {
    _Code.INVALID_ARGUMENT: Reason.INVALID_FIELD,
    _Code.CANCELLED: Reason.CANCELLED,
    _Code.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    _Code.UNAUTHENTICATED: Reason.UNAUTHENTICATED,
    _Code.UNIMPLEMENTED: Reason.NOT_IMPLEMENTED,
    _Code.RESOURCE_EXHAUSTED: Reason.TOO_LARGE,  # gRPC's own: a message over the size limit
    _Code.INTERNAL: Reason.INTERNAL,
    _Code.UNKNOWN: Reason.INTERNAL,  # an exception that escaped a handler
}


async def abort(context: grpc.aio.ServicerContext[Any, Any], refusal: Refusal) -> NoReturn:
    """Ends a call with the refusal. Never returns: gRPC's own abort raises."""
    status = status_of(refusal)
    await context.abort(
        STATUS_OF[refusal.reason],
        status.message,
        trailing_metadata=((DETAILS_KEY, status.SerializeToString()),),
    )
    raise AssertionError("abort returned")


def status_of(refusal: Refusal) -> Any:
    """The google.rpc.Status of a refusal."""
    status = status_pb2.Status(
        code=STATUS_OF[refusal.reason].value[0], message=refusal.message[:MESSAGE_LIMIT]
    )
    ids = {name: value for name in ("turn_id", "trace_id") if (value := getattr(refusal, name))}
    _add(status, error_details_pb2.ErrorInfo(reason=refusal.reason.name, domain=DOMAIN, metadata=ids))
    if refusal.violations:
        bad_request = error_details_pb2.BadRequest()
        for violation in refusal.violations[:VIOLATION_LIMIT]:
            bad_request.field_violations.add(
                field=violation.field, description=violation.message[: MESSAGE_LIMIT // 4]
            )
        _add(status, bad_request)
    if refusal.retry_after_ms > 0:
        retry_info = error_details_pb2.RetryInfo()
        retry_info.retry_delay.FromMilliseconds(refusal.retry_after_ms)
        _add(status, retry_info)
    return status


def refusal_of(error: grpc.RpcError) -> Refusal:
    """What a failed call was refused for: blocking or asyncio, ours or foreign."""
    code, details, trailing = _parts(error)
    for key, value in trailing:
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                refusal = _parse(status_pb2.Status.FromString(value))
            except DecodeError:
                break
            if refusal is not None:
                return refusal
    return Refusal(_REASON_OF_FOREIGN.get(code, Reason.UNSPECIFIED), details or code.name)


def _parts(error: Any) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]:
    """Status, text and trailing metadata; a bare RpcError has none of them."""

    def ask(name: str) -> Any:
        method = getattr(error, name, None)
        return method() if callable(method) else None

    code = ask("code")
    trailing = tuple(tuple(item) for item in ask("trailing_metadata") or ())
    return (code if isinstance(code, grpc.StatusCode) else _Code.UNKNOWN), ask("details") or "", trailing


def _parse(status: Any) -> Refusal | None:
    """The refusal in a google.rpc.Status; None if it is not one of ours."""
    info, bad_request, retry_info = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        for message in (info, bad_request, retry_info):
            detail.Unpack(message)  # does nothing unless the types agree
    if info.domain != DOMAIN:
        return None
    return Refusal(
        Reason[info.reason] if info.reason in Reason.__members__ else Reason.UNSPECIFIED,
        status.message,
        violations=tuple(
            FieldViolation(each.field, each.description) for each in bad_request.field_violations
        ),
        retry_after_ms=retry_info.retry_delay.ToMilliseconds(),
        turn_id=info.metadata.get("turn_id", ""),
        trace_id=info.metadata.get("trace_id", ""),
    )


def _add(status: Any, detail: Any) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
