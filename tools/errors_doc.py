"""Writes docs/errors.md: every reason with its status, the exception a client raises, and the next step.

The comments in errors.proto are the source; status and exception come from the code that uses them. Run without arguments to
rewrite the file; with --check to only say whether it is up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, Python would only see tools/

from sparkrelay.client.errors import class_of  # noqa: E402
from sparkrelay.errors import MESSAGE_LIMIT, STATUS_OF, VIOLATION_LIMIT  # noqa: E402
from sparkrelay.outcomes import Reason  # noqa: E402

PROTO = ROOT / "protos" / "sparkrelay" / "v1" / "errors.proto"
DOC = ROOT / "docs" / "errors.md"
BETWEEN_US = "Drafters: "  # marks what only a drafter and its verifier tell each other

_ENTRY = re.compile(r"((?:^  // .*\n)+)^  REASON_(\w+) = \d+;$", re.MULTILINE)
_COMMENT = re.compile(r"(?P<what>.+) (?P<status>[A-Z_]+)\. Next: (?P<following>.+)")


@dataclass(frozen=True, slots=True)
class Entry:
    """A reason as its comment tells it. `between_us`: a client never gets it."""

    reason: Reason
    what: str
    status: str
    following: str
    between_us: bool


def entries(proto: str) -> list[Entry]:
    """All reasons of errors.proto, in its order. Raises ValueError for a comment that does not have the three parts."""
    found = []
    for comment, name in _ENTRY.findall(proto):
        text = " ".join(line.strip().removeprefix("//").strip() for line in comment.splitlines())
        parts = _COMMENT.fullmatch(text)
        if parts is None:
            raise ValueError(
                f"REASON_{name}: its comment must be 'What happened. STATUS.' and 'Next: what to do.'"
            )
        what, between_us = parts["what"], parts["what"].startswith(BETWEEN_US)
        if between_us:
            what = what.removeprefix(BETWEEN_US)
            what = what[0].upper() + what[1:]
        found.append(Entry(Reason[name], what, parts["status"], parts["following"], between_us))
    return found


def document(proto: str) -> str:
    """The whole of docs/errors.md."""
    found = entries(proto)
    ours = "\n".join(_row(each) for each in found if not each.between_us)
    theirs = "\n".join(
        f"| `{each.reason.name}` | {each.status} | {each.what} | {each.following} |"
        for each in found
        if each.between_us
    )
    return f"""# Errors

<!-- tools/errors_doc.py writes this file from the comments in protos/sparkrelay/v1/errors.proto; `make format` runs it. -->

Every refusal is a gRPC status with `google.rpc` details: `ErrorInfo` (the reason's name, domain `sparkrelay`, in its
metadata `trace_id`, and `turn_id` where there is a turn), `BadRequest` (which field, what is wrong with it, what to send
instead), `RetryInfo` (when to try again, where that can help). The message says the same in words: what was asked, the
limit, the next step. It has at most {MESSAGE_LIMIT} characters, and at most {VIOLATION_LIMIT} fields are named, so that the
details fit into gRPC's trailing metadata.

In Python the exception is a `sparkrelay.client.SparkRelayError` with `reason`, `message`, `violations`, `turn_id`,
`trace_id`, and `retry_after` where it is `Overloaded`. The turn id finds the turn (`GetTurn`, and the log lines of gateway
and verifier), the trace id the whole trace.

## What a caller can get
| reason | status | exception | what happened | next step |
|---|---|---|---|---|
{ours}

Bytes that are no message of the call, text that is not UTF-8 among them, are `INVALID_FIELD` of `request`. A status without
these details comes from gRPC itself or from a proxy: a message over 4 MiB is RESOURCE_EXHAUSTED (`TOO_LARGE` in Python),
and a port where nobody listens is UNAVAILABLE.

## What a drafter and its verifier tell each other
As the status of a stream that ends, or as `left` and `leave` when only one membership does. No caller gets them; `ListWorkers`
shows the last one of every drafter that is lost or refused.

| reason | status | what happened | next step |
|---|---|---|---|
{theirs}
"""


def _row(entry: Entry) -> str:
    exception = class_of(entry.reason, STATUS_OF[entry.reason]).__name__
    return f"| `{entry.reason.name}` | {entry.status} | `{exception}` | {entry.what} | {entry.following} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if docs/errors.md is out of date"
    )
    check = parser.parse_args().check
    fresh = document(PROTO.read_text(encoding="utf-8"))
    if DOC.is_file() and DOC.read_text(encoding="utf-8") == fresh:
        return 0
    if check:
        sys.stderr.write("docs/errors.md is out of date; run `make format`\n")
        return 1
    DOC.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
