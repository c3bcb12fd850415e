"""Generate: one turn for the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import grpc.aio

from sparkrelay.errors import abort
from sparkrelay.outcomes import FieldViolation, Reason, Refusal
from sparkrelay.telemetry import from_metadata
from sparkrelay.v1 import verifier_service_pb2 as pb2
from verifier_service.events import Committed, TurnAccepted, TurnEvent, TurnOver, TurnRefused
from verifier_service.models import ModelInfo
from verifier_service.servicer.commit_batch import commit_batch
from verifier_service.servicer.formats import Formats
from verifier_service.servicer.hub import Hub
from verifier_service.servicer.turn_output import TurnOutput, finished_pb
from verifier_service.servicer.validation import turn_request

Response = pb2.VerifierServiceGenerateResponse

COMMIT_LIMIT = 512
"""Commits of one message. 16 tokens with 20 log-probabilities each make 4 KiB, and a gateway takes 4 MiB."""


class Identity(Protocol):
    """Who this verifier is."""

    @property
    def verifier_id(self) -> str: ...
    @property
    def epoch(self) -> str: ...
    @property
    def info(self) -> ModelInfo: ...


async def generate(
    hub: Hub,
    formats: Formats,
    who: Identity,
    request: pb2.VerifierServiceGenerateRequest,
    context: grpc.aio.ServicerContext[Any, Any],
    received_us: int,
    draining: Callable[[], bool],
) -> None:
    """Runs a turn; whatever ends this coroutine early cancels it."""
    trace = from_metadata(context.invocation_metadata())
    trace_id = trace.trace_id if trace is not None else ""
    raw_trace = trace.raw if trace is not None and trace.sampled else b""
    output = TurnOutput(asyncio.get_running_loop(), trace_id, raw_trace)
    try:
        turn = turn_request(request, who.info, received_us)
        command = turn.command
        if turn.response_format is not None:
            command = replace(command, grammar=await formats.grammar(turn.response_format))
        if draining():
            raise Refusal(
                Reason.DRAINING, "this verifier is draining and takes no new turns; use another one"
            )
        hub.open_turn(command, turn.drafter_ids, output)
        try:
            while True:
                events = await output.take()
                for response in _responses(events, who, trace_id):
                    await context.write(response)
                if output.told_all:
                    return
        finally:
            hub.close_turn(command)
    except Refusal as refusal:
        refusal.turn_id, refusal.trace_id = request.turn_id, trace_id
        await abort(context, refusal)


def _responses(events: Sequence[TurnEvent], who: Identity, trace_id: str) -> Iterator[Response]:
    """Neighbouring commits in one message. Raises the Refusal of a TurnRefused after what came before it."""
    batch: list[Committed] = []
    for event in events:
        if batch and (not isinstance(event, Committed) or len(batch) == COMMIT_LIMIT):
            yield Response(committed=commit_batch(batch))
            batch = []
        if isinstance(event, Committed):
            batch.append(event)
        else:
            yield _response(event, who, trace_id)
    if batch:
        yield Response(committed=commit_batch(batch))


def _response(event: TurnAccepted | TurnRefused | TurnOver, who: Identity, trace_id: str) -> Response:
    match event:
        case TurnAccepted():
            started = pb2.VerifierTurnStarted(
                turn_id=event.turn_id,
                trace_id=trace_id,
                verifier_id=who.verifier_id,
                epoch=who.epoch,
                prompt_token_count=event.prompt_token_count,
                cached_token_count=event.cached_token_count,
                numerics=who.info.numerics,
            )
            return Response(started=started)
        case TurnOver():
            return Response(finished=finished_pb(event))
        case TurnRefused():
            message = f"{event.field}: {event.message}" if event.field else event.message
            violations = (FieldViolation(event.field, event.message),) if event.field else ()
            raise Refusal(event.reason, message, violations=violations, retry_after_ms=event.retry_after_ms)
