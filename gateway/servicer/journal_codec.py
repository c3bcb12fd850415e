"""The events of a turn as bytes and back, for a journal on disk: the very messages that clients are sent."""

from __future__ import annotations

from typing import Any

from gateway.servicer import translate
from gateway.turn_output import Delta, RoundTotals, Timing, TurnSummary, Usage
from sparkrelay.outcomes import FinishReason
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb


class EventCodec:
    """See `gateway.journal_sqlite.Codec`."""

    def accepted(self, event: Any) -> bytes:
        assert isinstance(event, gateway_pb.TurnAccepted)
        return event.SerializeToString()

    def delta(self, delta: Delta) -> bytes:
        return translate.delta_pb(delta).SerializeToString()

    def summary(self, summary: TurnSummary) -> bytes:
        return translate.finished_pb(summary).SerializeToString()

    def read_accepted(self, data: bytes) -> gateway_pb.TurnAccepted:
        return gateway_pb.TurnAccepted.FromString(data)

    def read_delta(self, data: bytes, text_ends: tuple[int, ...]) -> Delta:
        message = gateway_pb.TurnDelta.FromString(data)
        return Delta(
            index=message.index,
            token_ids=tuple(message.token_ids),
            text=message.text,
            logprobs=tuple(message.logprobs),
            rounds=tuple(message.rounds),
            text_index=message.text_index,
            text_ends=text_ends,
        )

    def read_summary(self, data: bytes) -> TurnSummary:
        message = gateway_pb.TurnFinished.FromString(data)
        usage, timing, totals = message.usage, message.timing, message.totals
        return TurnSummary(
            finish_reason=FinishReason(message.finish_reason),
            stop_string=message.stop_string,
            usage=Usage(
                usage.prompt_token_count,
                usage.cached_token_count,
                usage.output_token_count,
                usage.discarded_token_count,
            ),
            timing=Timing(timing.first_token_us, timing.total_us, timing.queue_us),
            totals=RoundTotals(
                totals.round_count, totals.drafted_count, totals.verified_count, totals.accepted_count
            ),
        )
