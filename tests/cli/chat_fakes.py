"""What a gateway's client looks like to the chat, and values to answer with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sparkrelay.client.results import (
    Delta,
    Generation,
    RoundReport,
    RoundTotals,
    SessionInfo,
    Timing,
    TurnStarted,
    Usage,
)


def report(index: int = 0, depth: int = 4, accepted: int = 2) -> RoundReport:
    return RoundReport(index, 10, depth, depth, accepted, "fresh", verify_us=21_000)


def started(prompt: int = 12, cached: int = 5) -> TurnStarted:
    return TurnStarted(
        "turn-1", "t" * 32, "session-1", "tiny", 7, prompt, cached, "verifier", "drafter-1", ""
    )


def generation(text: str, rounds: tuple[RoundReport, ...] = (), reason: str = "") -> Generation:
    accepted = sum(each.accepted for each in rounds)
    drafted = sum(each.drafted for each in rounds)
    totals = RoundTotals(len(rounds), drafted, sum(each.depth for each in rounds), accepted)
    return Generation(
        turn_id="turn-1",
        trace_id="",
        session_id="session-1",
        model="tiny",
        text=text,
        token_ids=(1, 2, 3),
        finish_reason="stop",
        stop_string="",
        usage=Usage(12, 5, 3),
        seed=7,
        timing=Timing(1000, 2_001_000),
        totals=totals,
        rounds=rounds,
        logprobs=(),
        verifier_id="verifier",
        drafter_id="",
        no_drafter_reason=reason,
    )


class FakeStream:
    """A turn whose events are given; an exception among the deltas is raised there."""

    def __init__(self, *events: str | BaseException) -> None:
        self.started = started()
        self.cancelled = False
        self._events = events
        text = "".join(each for each in events if isinstance(each, str))
        self.result = generation(text, (report(),))

    def __iter__(self) -> Iterator[Delta]:
        for index, event in enumerate(self._events):
            if isinstance(event, BaseException):
                raise event
            yield Delta(index, (index,), event, rounds=(report(index),))

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancelled = True


Reply = FakeStream | BaseException


class FakeSession:
    """Hands out what its client was given to say."""

    def __init__(self, client: FakeClient, number: int) -> None:
        self.session_id = f"session-{number}"
        self._client = client

    def generate_stream(self, **options: Any) -> FakeStream:
        self._client.requests.append((self.session_id, options))
        reply = self._client.replies.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def info(self) -> SessionInfo:
        return SessionInfo(self.session_id, "tiny", 17, 1, False, "", "", 0.0)

    def end(self) -> None:
        self._client.ended.append(self.session_id)


class FakeClient:
    """Replies in order; remembers what was asked of which session."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.ended: list[str] = []
        self.opened = 0

    def create_session(self, model: str = "") -> FakeSession:
        self.opened += 1
        return FakeSession(self, self.opened)


class FakeView:
    """Writes down what is shown."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.shown = ""
        self.endings: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def started(self, turn: TurnStarted) -> None:
        self.shown += "<"

    def delta(self, delta: Delta, now: float) -> None:
        self.shown += delta.text

    def ended(self, summary: str) -> None:
        self.shown += ">"
        self.endings.append(summary)


def typed(*lines: str | BaseException) -> Callable[[], str | None]:
    """A person who types these lines and then Ctrl-D; an exception is raised in its place."""
    left = list(lines)

    def read() -> str | None:
        line = left.pop(0) if left else None
        if isinstance(line, BaseException):
            raise line
        return line

    return read
