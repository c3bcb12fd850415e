"""Every test here fails if a bug was logged, whatever else it looked at."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from google.protobuf.message import DecodeError


@pytest.fixture(autouse=True)
def no_bug_was_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Lines of errors are kept and looked at; the thousands of refusals are not written at all."""
    bugs: list[Any] = []

    def keep(logger: object, method: str, event: Any) -> Any:
        bugs.append(event)
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[keep], wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        yield
    finally:
        structlog.configure(**before)
    assert bugs == []
    assert [record for record in caplog.records if _tells_of_a_bug(record)] == []


def _tells_of_a_bug(record: logging.LogRecord) -> bool:
    """gRPC logs errors of its own for bytes that its client cannot parse (they were sent on purpose), and for calls that a server
    that is stopped had just begun."""
    error = record.exc_info[1] if record.exc_info else None
    return record.levelno >= logging.ERROR and not isinstance(error, DecodeError | asyncio.CancelledError)
