"""How every call ends: with its answer, with a refusal, or as a bug that is logged and never shown."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc.aio
import structlog

from sparkrelay.errors import abort
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.telemetry import TraceContext, from_metadata

log = structlog.get_logger(__name__)

Servicer = TypeVar("Servicer")
Request = TypeVar("Request")
Answer = TypeVar("Answer")
Handler = Callable[[Servicer, Request, Any], Awaitable[Answer]]


def answering(handler: Handler[Servicer, Request, Answer]) -> Handler[Servicer, Request, Answer]:
    """A unary call: its refusals become statuses, its bugs INTERNAL."""

    @functools.wraps(handler)
    async def answered(self: Servicer, request: Request, context: Any) -> Answer:
        try:
            return await handler(self, request, context)
        except Refusal as refusal:
            await refuse(context, refusal, trace=from_metadata(context.invocation_metadata()))
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001  the boundary: logged there
            await fail(context, error, trace=from_metadata(context.invocation_metadata()))

    return answered


async def refuse(
    context: Any, refusal: Refusal, *, turn_id: str = "", trace: TraceContext | None = None
) -> NoReturn:
    """Ends the call with a refusal that names the turn and the trace."""
    refusal.turn_id = refusal.turn_id or turn_id
    refusal.trace_id = refusal.trace_id or (trace.trace_id if trace else "")
    log.info("refused", reason=refusal.reason.name, message=refusal.message, turn_id=refusal.turn_id)
    await abort(context, refusal)


async def fail(
    context: Any, error: Exception, *, turn_id: str = "", trace: TraceContext | None = None
) -> NoReturn:
    """Ends the call as a bug of ours: the log has it, the caller has the ids to find it there."""
    await abort(context, internal(error, turn_id=turn_id, trace=trace))


def internal(error: Exception, *, turn_id: str = "", trace: TraceContext | None = None) -> Refusal:
    """A bug of ours as the refusal that callers see, once it is in the log."""
    log.error("a call failed", turn_id=turn_id, trace_id=trace.trace_id if trace else "", exc_info=error)
    return Refusal(
        Reason.INTERNAL,
        "The gateway failed: a bug. Its log has it under this turn and trace id.",
        turn_id=turn_id,
        trace_id=trace.trace_id if trace else "",
    )
