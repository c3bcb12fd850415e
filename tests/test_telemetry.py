"""Trace contexts survive the journey, broken ones never break a call, and logs are one JSON object a line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay import telemetry
from sparkrelay.telemetry import (
    TraceContext,
    from_metadata,
    from_raw,
    from_traceparent,
    new_trace_context,
    to_metadata,
)


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


@given(
    st.binary(min_size=16, max_size=16).filter(any),
    st.binary(min_size=8, max_size=8).filter(any),
    st.booleans(),
)
def test_a_context_survives_metadata_and_frames(trace: bytes, span: bytes, sampled: bool) -> None:
    context = TraceContext(trace.hex(), span.hex(), sampled)
    assert from_metadata([("other", "x"), *to_metadata(context)]) == context
    assert from_raw(context.raw) == context
    assert len(context.raw) == telemetry.RAW_BYTES


@given(st.text() | st.from_regex(r"00-[0-9a-f]{31,32}-[0-9a-f]{15,16}-[0-9a-f]{1,2}"))
def test_any_text_is_a_context_or_none(text: str) -> None:
    context = from_traceparent(text)
    assert context is None or context.traceparent[:53] == text[:53]


@pytest.mark.parametrize(
    "raw", [b"", b"\0" * 25, b"\1" * 24, b"\0" * 16 + b"\1" * 9, b"\1" * 16 + b"\0" * 8 + b"\1"]
)
def test_malformed_bytes_are_no_context(raw: bytes) -> None:
    assert from_raw(raw) is None


def test_ids_of_zeros_are_drawn_again() -> None:
    draws = iter([bytes(16), bytes(8), b"\1" * 16, b"\2" * 8])
    context = new_trace_context(lambda _count: next(draws))
    assert (context.trace_id, context.span_id) == ("01" * 16, "02" * 8)


def test_json_logs_are_one_object_a_line_for_our_lines_and_libraries_lines(restored_logging: None) -> None:
    stream = io.StringIO()
    telemetry.configure_logging("info", "json", "lamp", stream)
    structlog.get_logger("ours").info("lit", room=7)
    structlog.get_logger("ours").debug("not shown")
    logging.getLogger("theirs").warning("careful %d", 3)
    ours, theirs = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (ours["event"], ours["room"], ours["service"], ours["level"]) == ("lit", 7, "lamp", "info")
    assert (theirs["event"], theirs["service"], theirs["level"]) == ("careful 3", "lamp", "warning")


def test_logs_for_people_are_text(restored_logging: None) -> None:
    stream = io.StringIO()
    telemetry.configure_logging("info", "console", "lamp", stream)
    structlog.get_logger().info("lit", room=7)
    assert "lit" in stream.getvalue() and "room=7" in stream.getvalue()
