"""A hand to lead an engine through a story: short commands in, the events of each step out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from sparkrelay.sampling import Sampling
from verifier_service.depth_policies import parse_depth_policy
from verifier_service.engine import Engine, EngineSettings
from verifier_service.events import (
    AddMember,
    BlockArrived,
    Command,
    Committed,
    Event,
    MemberVerdict,
    SpeculationRequest,
    StartTurn,
)
from verifier_service.grammar import Grammar
from verifier_service.models import TargetModel
from verifier_service.models.toy import ToyModel

Kind = TypeVar("Kind")


def turn(
    session_id: str,
    turn_id: str,
    append_ids: Sequence[int] = (1, 2, 3),
    *,
    keep_len: int = 0,
    keep_hash: bytes = b"",
    output_start: int | None = None,
    max_tokens: int = 8,
    stop_ids: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
    fixed_depth: int | None = None,
    expect_drafter: bool = False,
    logprob_count: int | None = None,
    tenant_salt: bytes = b"",
    grammar: Grammar | None = None,
) -> StartTurn:
    start = keep_len + len(append_ids) if output_start is None else output_start
    return StartTurn(
        session_id=session_id,
        turn_id=turn_id,
        keep_len=keep_len,
        keep_hash=keep_hash,
        append_ids=tuple(append_ids),
        output_start=start,
        sampling=sampling or Sampling(),
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        speculation=SpeculationRequest(fixed_depth),
        expect_drafter=expect_drafter,
        logprob_count=logprob_count,
        tenant_salt=tenant_salt,
        grammar=grammar,
    )


def member(session_id: str, member_id: int, *, tokens_held: int = 0, held_hash: bytes = b"") -> AddMember:
    return AddMember(session_id, member_id, f"drafter-{member_id}", tokens_held, held_hash, 15)


def block(member_id: int, base_len: int, token_ids: Sequence[int]) -> BlockArrived:
    return BlockArrived(member_id, base_len, tuple(token_ids), (0.9,) * len(token_ids), 5, 6, 0)


class Driver:
    """An engine and its clock, which stands still unless a story moves it."""

    def __init__(self, model: TargetModel | None = None, policy: str = "auto", **settings: int) -> None:
        self.model = model or ToyModel()
        settings.setdefault("block_count", 64)
        self.engine = Engine(self.model, EngineSettings(**settings), parse_depth_policy(policy))
        self.now_us = 0
        self.due_us: int | None = None
        self.events: list[Event] = []  # of all steps

    def step(self, *commands: Command) -> list[Event]:
        """A step, and the one behind it if it only told what has begun."""
        events = self.step_once(*commands)
        return events + self.step_once() if self.engine._told_first else events

    def step_once(self, *commands: Command) -> list[Event]:
        result = self.engine.step(commands, self.now_us)
        self.engine.check_integrity()
        self.due_us = result.next_due_us
        self.events += result.events
        return list(result.events)

    def run(self, *commands: Command) -> list[Event]:
        """Steps until the engine sleeps, waits ended by letting the time pass. Returns everything that happened."""
        events = self.step(*commands)
        while self.due_us is not None:
            self.now_us = max(self.now_us, self.due_us)
            events += self.step()
        return events

    def output(self, turn_id: str) -> list[int]:
        """The tokens of a turn so far."""
        return [
            i for event in of(self.events, Committed) if event.turn_id == turn_id for i in event.token_ids
        ]

    def rounds(self, turn_id: str) -> list[Committed]:
        """The rounds of a turn so far."""
        return [e for e in of(self.events, Committed) if e.turn_id == turn_id and e.round is not None]


def of(events: Sequence[Event], kind: type[Kind]) -> list[Kind]:
    """The events of one kind."""
    return [event for event in events if isinstance(event, kind)]


def verdicts(events: Sequence[Event]) -> list[MemberVerdict]:
    return of(events, MemberVerdict)
