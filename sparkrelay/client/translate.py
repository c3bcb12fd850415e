"""From the gateway's messages to results."""

from __future__ import annotations

from sparkrelay.client import results
from sparkrelay.v1 import admin_service_pb2 as admin_pb
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import generation_pb2 as generation_pb
from sparkrelay.v1 import verifier_service_pb2 as verifier_pb


def started(message: gateway_pb.TurnAccepted) -> results.TurnStarted:
    return results.TurnStarted(
        turn_id=message.turn_id,
        trace_id=message.trace_id,
        session_id=message.session_id,
        model=message.model,
        seed=message.seed,
        prompt_token_count=message.prompt_token_count,
        cached_token_count=message.cached_token_count,
        verifier_id=message.verifier_id,
        drafter_id=message.drafter_id,
        no_drafter_reason=message.no_drafter_reason,
    )


def delta(
    message: gateway_pb.TurnDelta, *, skip_tokens: int = 0, skip_chars: int = 0, next_round: int = 0
) -> results.Delta:
    """What of a delta is new: without its first tokens and characters, and without rounds before `next_round`."""
    return results.Delta(
        index=message.index + min(skip_tokens, len(message.token_ids)),
        token_ids=tuple(message.token_ids[skip_tokens:]),
        text=message.text[skip_chars:],
        logprobs=tuple(token_logprob(each) for each in message.logprobs[skip_tokens:]),
        rounds=tuple(round_report(each) for each in message.rounds if each.index >= next_round),
    )


def token_logprob(message: generation_pb.TokenLogprob) -> results.TokenLogprob:
    return results.TokenLogprob(
        message.token_id, message.logprob, tuple(token_logprob(each) for each in message.top)
    )


def round_report(message: generation_pb.RoundReport) -> results.RoundReport:
    state = generation_pb.RoundReport.BlockState.Name(message.block_state)
    return results.RoundReport(
        index=message.index,
        base_len=message.base_len,
        drafted=message.drafted_count,
        depth=message.depth,
        accepted=message.accepted_count,
        block_state=state.removeprefix("BLOCK_STATE_").lower(),
        confidences=tuple(byte / 255 for byte in message.confidences),
        wait_us=message.wait_us,
        verify_us=message.verify_us,
        draft_us=message.draft_us,
        queue_us=message.queue_us,
        batch_rows=message.batch_row_count,
        batch_sessions=message.batch_session_count,
        dropped_blocks=message.dropped_block_count,
        drafter_id=message.drafter_id,
    )


def usage(message: generation_pb.Usage) -> results.Usage:
    return results.Usage(
        prompt=message.prompt_token_count,
        cached=message.cached_token_count,
        output=message.output_token_count,
        discarded=message.discarded_token_count,
    )


def timing(message: gateway_pb.TurnTiming) -> results.Timing:
    return results.Timing(message.first_token_us, message.total_us, message.queue_us)


def totals(message: gateway_pb.RoundTotals) -> results.RoundTotals:
    return results.RoundTotals(
        message.round_count, message.drafted_count, message.verified_count, message.accepted_count
    )


def finish_reason(value: generation_pb.FinishReason.ValueType) -> str:
    name = generation_pb.FinishReason.Name(value).removeprefix("FINISH_REASON_").lower()
    return "failed" if name == "unspecified" else name


def generation(
    start: results.TurnStarted, deltas: list[results.Delta], end: gateway_pb.TurnFinished
) -> results.Generation:
    """A whole turn from its events."""
    return results.Generation(
        turn_id=start.turn_id,
        trace_id=start.trace_id,
        session_id=start.session_id,
        model=start.model,
        text="".join(each.text for each in deltas),
        token_ids=tuple(token for each in deltas for token in each.token_ids),
        finish_reason=finish_reason(end.finish_reason),
        stop_string=end.stop_string,
        usage=usage(end.usage),
        seed=start.seed,
        timing=timing(end.timing),
        totals=totals(end.totals),
        rounds=tuple(report for each in deltas for report in each.rounds),
        logprobs=tuple(logprob for each in deltas for logprob in each.logprobs),
        verifier_id=start.verifier_id,
        drafter_id=start.drafter_id,
        no_drafter_reason=start.no_drafter_reason,
    )


def model(message: gateway_pb.Model) -> results.Model:
    return results.Model(
        name=message.model,
        context_limit=message.context_limit,
        vocab_size=message.vocab_size,
        has_chat_template=message.has_chat_template,
        verifier_count=message.verifier_count,
        drafter_count=message.drafter_count,
        exact=message.exact,
        has_response_format=message.has_response_format,
    )


def session(message: gateway_pb.Session) -> results.SessionInfo:
    return results.SessionInfo(
        session_id=message.session_id,
        model=message.model,
        token_count=message.token_count,
        turn_count=message.turn_count,
        busy=message.busy,
        verifier_id=message.verifier_id,
        drafter_id=message.drafter_id,
        create_time=message.create_time.ToMicroseconds() / 1e6,
    )


def turn(message: gateway_pb.Turn) -> results.Turn:
    over = message.HasField("finished")
    return results.Turn(
        turn_id=message.turn_id,
        trace_id=message.trace_id,
        session_id=message.session_id,
        model=message.model,
        finish_reason=finish_reason(message.finished.finish_reason) if over else "",
        stop_string=message.finished.stop_string,
        usage=usage(message.finished.usage),
        timing=timing(message.finished.timing),
        totals=totals(message.finished.totals),
        rounds=tuple(round_report(each) for each in message.rounds),
        create_time=message.create_time.ToMicroseconds() / 1e6,
    )


def worker(message: admin_pb.Worker) -> results.Worker:
    return results.Worker(
        address=message.address,
        state=admin_pb.Worker.State.Name(message.state).removeprefix("STATE_").lower(),
        message=message.message,
        turn_count=message.turn_count,
        verifier_id=message.description.verifier_id,
        model=message.description.model_id,
        exact=message.description.exact,
        numerics=message.description.numerics,
        depth_policy=message.description.depth_policy,
        session_count=message.load.session_count,
        active_turn_count=message.load.active_turn_count,
        queued_turn_count=message.load.queued_turn_count,
        step_us=message.load.step_us,
        drafters=tuple(drafter(each) for each in message.load.drafters),
        exact_reason=message.description.exact_reason,
        tokenizer_hash=message.description.tokenizer_hash,
    )


def drafter(message: verifier_pb.DrafterStatus) -> results.Drafter:
    return results.Drafter(
        drafter_id=message.drafter_id,
        state=verifier_pb.DrafterStatus.State.Name(message.state).removeprefix("STATE_").lower(),
        message=message.message,
        proposal_kind=message.proposal_kind,
        session_count=message.session_count,
        round_trip_us=message.round_trip_us,
        turnaround_us=message.turnaround_us,
        drafted=message.drafted_count,
        verified=message.verified_count,
        accepted=message.accepted_count,
    )


def watched_round(message: gateway_pb.WatchRoundsResponse) -> results.WatchedRound:
    return results.WatchedRound(
        message.turn_id, message.session_id, round_report(message.round), message.skipped_count
    )
