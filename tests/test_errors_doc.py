"""docs/errors.md: as fresh as errors.proto, and true of the code."""

from __future__ import annotations

import pytest

from sparkrelay.client import InternalError, NotFound
from sparkrelay.client.errors import class_of
from sparkrelay.errors import STATUS_OF
from sparkrelay.outcomes import Reason
from tools.errors_doc import DOC, PROTO, document, entries

FOUND = entries(PROTO.read_text())


def test_the_table_is_what_the_comments_say_today() -> None:
    assert DOC.read_text() == document(PROTO.read_text()), "run `python tools/errors_doc.py`"


def test_every_reason_has_a_row_in_the_order_of_its_number() -> None:
    assert [each.reason for each in FOUND] == sorted(Reason)
    rows = [line for line in DOC.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(Reason)


def test_the_status_of_each_comment_is_the_one_that_is_sent() -> None:
    told = {each.reason: each.status for each in FOUND}
    assert told == {reason: status.name for reason, status in STATUS_OF.items()}


def test_each_reason_says_what_happened_and_what_to_do() -> None:
    for each in FOUND:
        assert len(each.what) > 10, each
        assert len(each.following) > 10, each


def test_only_a_bug_of_ours_is_an_internal_error_for_a_client() -> None:
    """PREFIX_MISMATCH is healed by the gateway, and a turn that kills verifiers is to be reported."""
    internal = {
        each.reason for each in FOUND if class_of(each.reason, STATUS_OF[each.reason]) is InternalError
    } - {each.reason for each in FOUND if each.between_us}
    assert internal == {Reason.UNSPECIFIED, Reason.PREFIX_MISMATCH, Reason.TURN_POISONED, Reason.INTERNAL}
    assert class_of(Reason.SESSION_ENDED, STATUS_OF[Reason.SESSION_ENDED]) is NotFound


def test_a_comment_without_its_parts_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="REASON_OVERLOADED"):
        entries("enum Reason {\n  // Too much.\n  REASON_OVERLOADED = 9;\n}\n")
