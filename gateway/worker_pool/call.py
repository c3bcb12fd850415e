"""One Generate call to a verifier: cancelled for certain when it is left, and its failures told apart."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from gateway.sessions import TurnPlan
from gateway.validation import ValidTurn
from sparkrelay import wire
from sparkrelay.errors import refusal_of
from sparkrelay.outcomes import FieldViolation, Reason, Refusal
from sparkrelay.protocol import chain_hash
from sparkrelay.v1 import generation_pb2 as generation_pb
from sparkrelay.v1 import verifier_service_pb2 as verifier_pb

Event = verifier_pb.VerifierServiceGenerateResponse


@dataclass(frozen=True, slots=True)
class TurnCommand:
    """What a verifier is asked for. prompt_ids are all tokens before the output, those it keeps included."""

    session_id: str
    turn_id: str
    plan: TurnPlan
    turn: ValidTurn
    drafter_ids: tuple[str, ...]
    prefix_salt: bytes = b""

    def to_pb(self) -> verifier_pb.VerifierServiceGenerateRequest:
        turn = self.turn
        return verifier_pb.VerifierServiceGenerateRequest(
            session_id=self.session_id,
            turn_id=self.turn_id,
            keep_len=self.plan.keep_len,
            keep_hash=chain_hash(turn.prompt_ids[: self.plan.keep_len]),
            append_token_ids=self.plan.append_ids,
            output_start=len(turn.prompt_ids),
            sampling=wire.sampling_pb(turn.sampling),
            stop=generation_pb.StopConditions(
                max_token_count=turn.max_tokens,
                stop_token_ids=turn.stop_ids,
                ignore_default_stop_ids=turn.ignore_default_stop_ids,
            ),
            speculation=_speculation_pb(turn),
            drafter_ids=self.drafter_ids,
            logprob_count=turn.logprob_count,
            prefix_salt=self.prefix_salt,
            response_format=wire.response_format_pb(turn.response_format) if turn.response_format else None,
        )


def _speculation_pb(turn: ValidTurn) -> generation_pb.Speculation:
    if turn.speculation_off:
        return generation_pb.Speculation(mode=generation_pb.Speculation.MODE_OFF)
    if turn.fixed_depth is not None:
        return generation_pb.Speculation(
            mode=generation_pb.Speculation.MODE_FIXED, fixed_depth=turn.fixed_depth
        )
    return generation_pb.Speculation(mode=generation_pb.Speculation.MODE_AUTO)


class VerifierCall:
    """A turn under way at a verifier. `read` gives its events; `end` makes the reader raise a refusal of ours."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._ended_for: Refusal | None = None

    async def read(self) -> Event | None:
        """The next event, None after the last. Raises Refusal."""
        try:
            event = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise self._ended_for or failure_of(error, self._address) from error
        except asyncio.CancelledError:
            # Reading a call that was cancelled here looks like a cancelled reader: only the task knows which it is.
            task = asyncio.current_task()
            if self._ended_for is None or (task is not None and task.cancelling()):
                raise
            raise self._ended_for from None
        return None if event is grpc.aio.EOF else event

    def end(self, refusal: Refusal) -> None:
        """Cancels the call for a reason that its reader is told."""
        self._ended_for = refusal
        self._call.cancel()

    def cancel(self) -> None:
        """Cancels the call; ending what is over is no error."""
        self._call.cancel()


def failure_of(error: grpc.RpcError, address: str) -> Refusal:
    """What a failed call means for a turn: what the verifier said, or that it was lost."""
    refusal = refusal_of(error)
    gone = isinstance(error, grpc.aio.AioRpcError) and error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,  # nobody here cancelled: the server did, by ending
    )
    if gone and refusal.reason in (Reason.UNSPECIFIED, Reason.CANCELLED):
        return lost(address, refusal.message)
    return _in_the_callers_words(refusal)


def _in_the_callers_words(refusal: Refusal) -> Refusal:
    """A verifier names its own request's fields; the caller sent another request."""
    name = "append_token_ids"
    if refusal.violations and refusal.violations[0].field == name:
        refusal.violations = (FieldViolation("input", refusal.violations[0].message),)
        refusal.message = f"input{refusal.message.removeprefix(name)}"
    return refusal


def lost(address: str, why: str) -> Refusal:
    """The verifier of a turn is gone."""
    return Refusal(
        Reason.VERIFIER_LOST,
        f"The verifier at {address} was lost: {why}. The tokens sent so far stay valid. "
        "Ask again with the whole conversation: another verifier takes it, or this one once it is back.",
    )
