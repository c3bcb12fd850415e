"""Every span, attribute and metric name, the trace context that ties processes together, and how a service logs.

Names live here because both ends must spell them alike. Exporters are chosen where a process starts.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TextIO

import structlog

# ---- spans: one trace a turn ----------------------------------------------------------------------------------------------

SPAN_CHAT = "chat"  # the turn: "chat <model>", with the gen_ai attributes
SPAN_PREFILL = "prefill"
SPAN_ROUND = "round"
SPAN_DRAFT = "draft"
SPAN_VERIFY = "verify"
SPAN_FAILOVER = "failover"
SPAN_DEGRADE = "degrade"

# ---- attributes -----------------------------------------------------------------------------------------------------------

ATTR_OPERATION = "gen_ai.operation.name"
ATTR_MODEL = "gen_ai.request.model"
ATTR_CONVERSATION = "gen_ai.conversation.id"
ATTR_INPUT_TOKENS = "gen_ai.usage.input_tokens"
ATTR_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
ATTR_CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
ATTR_FINISH_REASONS = "gen_ai.response.finish_reasons"

ATTR_TURN = "sparkrelay.turn_id"
ATTR_DRAFTER = "sparkrelay.drafter_id"
ATTR_VERIFIER = "sparkrelay.verifier_id"
ATTR_EPOCH = "sparkrelay.epoch"
ATTR_ROUND_INDEX = "sparkrelay.round.index"
ATTR_BASE_LEN = "sparkrelay.round.base_len"
ATTR_DRAFTED = "sparkrelay.round.drafted"
ATTR_DEPTH = "sparkrelay.round.depth"
ATTR_ACCEPTED = "sparkrelay.round.accepted"
ATTR_CONFIDENCES = "sparkrelay.round.confidences"
ATTR_BLOCK_STATE = "sparkrelay.round.block_state"
ATTR_BATCH_SIZE = "sparkrelay.round.batch_size"
ATTR_WAIT_MS = "sparkrelay.round.wait_ms"

# ---- metrics --------------------------------------------------------------------------------------------------------------

METRIC_REQUEST_DURATION = "gen_ai.server.request.duration"
METRIC_FIRST_TOKEN = "gen_ai.server.time_to_first_token"
METRIC_TOKEN_TIME = "gen_ai.server.time_per_output_token"
METRIC_DRAFTS = "sparkrelay.drafts"
METRIC_DRAFT_TOKENS = "sparkrelay.draft_tokens"
METRIC_VERIFIED_TOKENS = "sparkrelay.verified_tokens"
METRIC_ACCEPTED_TOKENS = "sparkrelay.accepted_tokens"  # by position in the block
METRIC_WIRE_BYTES = "sparkrelay.wire.bytes"
METRIC_ARRIVAL_SLACK = "sparkrelay.block.arrival_slack"
METRIC_STATE_BLOCKS = "sparkrelay.state.blocks"
METRIC_BATCH_SIZE = "sparkrelay.step.batch_size"
METRIC_ROUND_DURATION = "sparkrelay.round.duration"

# ---- trace context --------------------------------------------------------------------------------------------------------

TRACEPARENT_KEY = "traceparent"  # of gRPC metadata, as W3C Trace Context names it
RAW_BYTES = 25  # trace id, span id, flags

_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where in which trace a piece of work belongs (W3C Trace Context, version 00).

    trace_id  32 hex digits, span_id 16 hex digits, neither all zeros
    """

    trace_id: str
    span_id: str
    sampled: bool = True

    @property
    def traceparent(self) -> str:
        """The text form, as it travels in metadata."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"

    @property
    def raw(self) -> bytes:
        """The form in frames: 16 bytes trace id, 8 bytes span id, 1 byte flags."""
        return bytes.fromhex(self.trace_id + self.span_id) + bytes([self.sampled])


def new_trace_context(
    random_bytes: Callable[[int], bytes] = os.urandom, *, sampled: bool = True
) -> TraceContext:
    """A trace of its own. Ids that happen to be all zeros are invalid and drawn again."""
    while True:
        trace_id, span_id = random_bytes(16), random_bytes(8)
        if any(trace_id) and any(span_id):
            return TraceContext(trace_id.hex(), span_id.hex(), sampled)


def from_traceparent(text: str) -> TraceContext | None:
    """The context of a traceparent; None for anything malformed: a broken trace never breaks a call."""
    match = _TRACEPARENT.fullmatch(text)
    return TraceContext(match[1], match[2], bool(int(match[3], 16) & 1)) if match else None


def from_raw(raw: bytes) -> TraceContext | None:
    """The context of the form in frames; None if it is empty or malformed."""
    if len(raw) != RAW_BYTES or not any(raw[:16]) or not any(raw[16:24]):
        return None
    return TraceContext(raw[:16].hex(), raw[16:24].hex(), bool(raw[24] & 1))


def from_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> TraceContext | None:
    """The context that a call brought along, if it brought one."""
    for key, value in metadata or ():
        if key == TRACEPARENT_KEY and isinstance(value, str):
            return from_traceparent(value)
    return None


def to_metadata(context: TraceContext) -> tuple[tuple[str, str], ...]:
    """Metadata to send with a call."""
    return ((TRACEPARENT_KEY, context.traceparent),)


# ---- logs -----------------------------------------------------------------------------------------------------------------


def configure_logging(level: str, log_format: str, service: str, stream: TextIO | None = None) -> None:
    """Sends every log line of this process, libraries' included, to one stream (stderr), as JSON or for people.

    level       debug | info | warning | error
    log_format  "json": one object a line; "console": aligned text
    service     stands in every line
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add("service", service),
    ]
    renderers: list[structlog.typing.Processor]
    if log_format == "json":
        renderers = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    else:
        renderers = [
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
        ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
    )
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("asyncio", "grpc"):
        logging.getLogger(chatty).setLevel(max(root.level, logging.INFO))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _add(key: str, value: str) -> structlog.typing.Processor:
    def add(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event.setdefault(key, value)
        return event

    return add
