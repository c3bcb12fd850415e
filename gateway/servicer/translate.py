"""Messages of the gateway's API to plain values and back."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf import timestamp_pb2

from gateway.chat import Message
from gateway.placement import Placement
from gateway.sessions import Session
from gateway.turn_output import Delta, TurnSummary
from gateway.turns import TurnRecord
from gateway.validation import RawTurn, invalid
from gateway.watchers import SeenRound
from sparkrelay import wire
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import generation_pb2 as generation_pb
from sparkrelay.v1 import verifier_service_pb2 as verifier_pb

Mode = generation_pb.Speculation


def raw_turn(request: gateway_pb.GenerateRequest) -> RawTurn:
    """The values of a request; raises Refusal only for what no RawTurn can hold."""
    kind, sampling, stop = request.WhichOneof("input"), request.sampling, request.stop
    mode = request.speculation.mode
    if mode not in (Mode.MODE_UNSPECIFIED, Mode.MODE_AUTO, Mode.MODE_OFF, Mode.MODE_FIXED):
        raise invalid("speculation.mode", f"is {mode}; send MODE_AUTO, MODE_OFF or MODE_FIXED")
    return RawTurn(
        text=request.text if kind == "text" else None,
        messages=_messages(request.chat) if kind == "chat" else None,
        token_ids=tuple(request.tokens.token_ids) if kind == "tokens" else None,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else None,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else None,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        min_tokens=sampling.min_token_count,
        seed=sampling.seed if sampling.HasField("seed") else None,
        max_tokens=stop.max_token_count,
        stop_ids=tuple(stop.stop_token_ids),
        stop_strings=tuple(stop.stop_strings),
        ignore_default_stop_ids=stop.ignore_default_stop_ids,
        speculation_off=mode == Mode.MODE_OFF,
        fixed_depth=request.speculation.fixed_depth if mode == Mode.MODE_FIXED else None,
        include_rounds=request.include_rounds,
        logprob_count=request.logprob_count if request.HasField("logprob_count") else None,
        response_format=wire.response_format(request.response_format)
        if request.HasField("response_format")
        else None,
    )


def _messages(chat: gateway_pb.ChatMessages) -> tuple[Message, ...]:
    return tuple(Message(message.role, message.content) for message in chat.messages)


def event_pb(event: gateway_pb.TurnAccepted | Delta | TurnSummary) -> gateway_pb.GenerateResponse:
    match event:
        case Delta():
            return gateway_pb.GenerateResponse(delta=delta_pb(event))
        case TurnSummary():
            return gateway_pb.GenerateResponse(finished=finished_pb(event))
        case _:
            return gateway_pb.GenerateResponse(started=event)


def accepted_pb(
    record: TurnRecord, placement: Placement, seed: int, started: verifier_pb.VerifierTurnStarted
) -> gateway_pb.TurnAccepted:
    return gateway_pb.TurnAccepted(
        turn_id=record.turn_id,
        trace_id=record.trace_id,
        session_id=record.session_id,
        model=record.model,
        seed=seed,
        prompt_token_count=started.prompt_token_count,
        verifier_id=started.verifier_id,
        drafter_id=placement.drafter_ids[0] if placement.drafter_ids else "",
        no_drafter_reason=placement.no_drafter_reason,
        cached_token_count=started.cached_token_count,
    )


def delta_pb(delta: Delta) -> gateway_pb.TurnDelta:
    return gateway_pb.TurnDelta(
        index=delta.index,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=delta.logprobs,
        rounds=_reports(delta.rounds),
        text_index=delta.text_index,
    )


def finished_pb(summary: TurnSummary) -> gateway_pb.TurnFinished:
    usage, timing, totals = summary.usage, summary.timing, summary.totals
    return gateway_pb.TurnFinished(
        finish_reason=generation_pb.FinishReason.ValueType(summary.finish_reason),
        stop_string=summary.stop_string,
        usage=generation_pb.Usage(
            prompt_token_count=usage.prompt_token_count,
            cached_token_count=usage.cached_token_count,
            output_token_count=usage.output_token_count,
            discarded_token_count=usage.discarded_token_count,
        ),
        timing=gateway_pb.TurnTiming(
            first_token_us=timing.first_token_us, total_us=timing.total_us, queue_us=timing.queue_us
        ),
        totals=gateway_pb.RoundTotals(
            round_count=totals.round_count,
            drafted_count=totals.drafted_count,
            verified_count=totals.verified_count,
            accepted_count=totals.accepted_count,
        ),
    )


def session_pb(session: Session) -> gateway_pb.Session:
    return gateway_pb.Session(
        session_id=session.session_id,
        model=session.model,
        token_count=len(session.tokens),
        turn_count=session.turn_count,
        busy=session.busy,
        verifier_id=session.binding.verifier_id if session.binding else "",
        drafter_id=session.drafter_id,
        create_time=_timestamp(session.create_time_s),
    )


def turn_pb(record: TurnRecord, *, with_rounds: bool) -> gateway_pb.Turn:
    return gateway_pb.Turn(
        turn_id=record.turn_id,
        trace_id=record.trace_id,
        session_id=record.session_id,
        model=record.model,
        finished=finished_pb(record.summary) if record.summary else None,
        rounds=_reports(record.rounds) if with_rounds else (),
        create_time=_timestamp(record.create_time_s),
    )


def seen_round_pb(seen: SeenRound) -> gateway_pb.WatchRoundsResponse:
    (report,) = _reports([seen.report])
    return gateway_pb.WatchRoundsResponse(
        turn_id=seen.turn_id, session_id=seen.session_id, round=report, skipped_count=seen.skipped_count
    )


def _reports(rounds: Sequence[object]) -> list[generation_pb.RoundReport]:
    """The pure rooms hand the verifier's own messages through and see only their counts."""
    reports = []
    for report in rounds:
        assert isinstance(report, generation_pb.RoundReport), "a round report of a verifier"
        reports.append(report)
    return reports


def _timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromMicroseconds(round(seconds * 1e6))
    return timestamp
