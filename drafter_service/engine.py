"""The drafter's engine: frames of all verifiers in, frames for all of them out, one model call a step.

Deterministic given the model, the clock and the order of commands. One thread calls it, so what it answers is in
step with what it has heard: no block of an ended turn ever follows the pong that says that the end was seen. It knows
links by number and never sees a stream. A verifier that breaks the rules of a session loses that membership, one that
breaks those of the stream loses the link.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from drafter_service.events import (
    AllLeft,
    Command,
    ContextTaken,
    Event,
    FrameArrived,
    FramesToSend,
    LeaveAll,
    LinkBroken,
    LinkDraining,
    LinkLost,
    LinkOpened,
    LinkWelcomed,
    SessionGivenUp,
)
from drafter_service.kept_sessions import KeepLimits, KeptSessions
from drafter_service.link_sessions import LinkSessions, Member
from drafter_service.models import DraftModel
from drafter_service.session import DraftSession
from sparkrelay.device.thread import StepResult
from sparkrelay.frames import Block, Blocks, Context, ContextKind, DrafterFrame, Hello, duration_us
from sparkrelay.protocol import RemoteProtocolError


@dataclass(slots=True)
class Totals:
    """What there is and was. The device thread writes; anyone may read, each value for itself."""

    sessions_by_link: dict[int, int] = field(default_factory=dict)
    block_count: int = 0
    token_count: int = 0
    ignored_count: int = 0
    given_up_count: int = 0
    step_us: int = 0


class DraftEngine:
    """See the module.

    model     drafts; this engine's thread alone calls it
    hello     what every link begins with
    clock_us  what draft times are measured with; the clock of `step`'s now_us and of received_us
    limits    of the sessions that are kept between two memberships
    max_sessions  memberships of all links together; more invites are declined. 0: as many as the verifiers allow
    """

    def __init__(
        self,
        model: DraftModel,
        hello: Hello,
        clock_us: Callable[[], int],
        limits: KeepLimits | None = None,
        *,
        max_sessions: int = 0,
    ) -> None:
        self._model = model
        self._hello = hello
        self._clock_us = clock_us
        self._kept = KeptSessions(limits if limits is not None else KeepLimits())
        self._links: dict[int, LinkSessions] = {}
        self._max_sessions = max_sessions
        self._taken_count = 0  # sessions of memberships and of joins without an answer
        self._last_key = 0
        self._leaving = False
        self._wanting: dict[Member, None] = {}  # in the order in which they came to want a block
        self.totals = Totals()

    def step(self, commands: Sequence[Command], now_us: int) -> StepResult[Event]:
        """Takes the commands in order, then drafts once for every session that wants a block."""
        events: list[Event] = []
        said: dict[int, list[DrafterFrame]] = {}
        for command in commands:
            if isinstance(command, FrameArrived):
                self._hear(command, said, events)
            elif isinstance(command, LinkOpened):
                self._links[command.link_id] = LinkSessions(self._take_session, self._put_back)
                said[command.link_id] = [self._links[command.link_id].hello(self._hello)]
            elif isinstance(command, LinkLost):
                self._lose(command.link_id)
            else:
                self._leave_all(said)
        if self._wanting:
            self._draft(now_us, said)
        self.totals.sessions_by_link = {link_id: link.session_count for link_id, link in self._links.items()}
        events += [FramesToSend(link_id, tuple(frames)) for link_id, frames in said.items() if frames]
        events += [ContextTaken(link_id, count) for link_id, count in Counter(_contexts(commands)).items()]
        if any(isinstance(command, LeaveAll) for command in commands):
            events.append(AllLeft())
        return StepResult(events, now_us if self._wanting else None)

    # ---- links ---------------------------------------------------------------------------------------------------------------

    def _hear(self, command: FrameArrived, said: dict[int, list[DrafterFrame]], events: list[Event]) -> None:
        link_id = command.link_id
        link = self._links.get(link_id)
        if link is None:
            return  # lost or broken; the rest of its frames was under way
        try:
            heard = link.hear(command.frame)
        except RemoteProtocolError as broken:
            self._lose(link_id)
            events.append(LinkBroken(link_id, broken.reason, broken.message))
            return
        if heard.answers:
            said.setdefault(link_id, []).extend(heard.answers)
        if heard.welcome is not None:
            events.append(LinkWelcomed(link_id, heard.welcome))
        if heard.drain is not None:
            events.append(LinkDraining(link_id, heard.drain.deadline_ms))
        for session_id, message in heard.given_up:
            events.append(SessionGivenUp(link_id, session_id, message))
        self.totals.ignored_count += heard.ignored_count
        self.totals.given_up_count += len(heard.given_up)
        wanting = self._wanting
        for member in heard.gone:
            wanting.pop(member, None)
        for member in heard.touched:
            if not member.session.wants_block:
                wanting.pop(member, None)
            elif member not in wanting:
                member.ready_us = command.received_us
                wanting[member] = None

    def _lose(self, link_id: int) -> None:
        link = self._links.pop(link_id, None)
        if link is not None:
            for member in link.members:
                self._wanting.pop(member, None)
            link.close()

    def _leave_all(self, said: dict[int, list[DrafterFrame]]) -> None:
        self._leaving = True
        self._wanting = {}
        for link_id, link in self._links.items():
            said.setdefault(link_id, []).extend(link.leave_all())

    # ---- sessions between memberships ------------------------------------------------------------------------------------------

    def _take_session(self, session_id: str) -> DraftSession | None:
        """The session for a membership that begins, with what is still known of it. None: the invite is declined."""
        if self._leaving or (self._max_sessions and self._taken_count >= self._max_sessions):
            return None
        self._taken_count += 1
        session = self._kept.take(session_id)
        if session is None:
            self._last_key += 1
            about = self._model.fingerprint
            row_width = about.context_width if about.context_kind is ContextKind.ROWS else 0
            session = DraftSession(self._last_key, about.block_size, self._model.vocab_size, row_width)
        return session

    def _put_back(self, session_id: str, session: DraftSession, keep: bool) -> None:
        """A membership is over."""
        self._taken_count -= 1
        session.left()
        if keep:
            for key in self._kept.keep(session_id, session):
                self._model.forget(key)
        else:
            self._model.forget(session.key)

    # ---- drafting --------------------------------------------------------------------------------------------------------------

    def _draft(self, now_us: int, said: dict[int, list[DrafterFrame]]) -> None:
        """One model call for all; what it has no answer for yet goes on wanting."""
        members = list(self._wanting)
        self._wanting = {}
        requests = [member.session.request() for member in members]
        started_us = self._clock_us()
        answers = self._model.draft(requests)
        draft_us = duration_us(self._clock_us() - started_us)
        blocks: dict[LinkSessions, list[Block]] = {}
        for member, request, drafted in zip(members, requests, answers, strict=True):
            if drafted is None:
                self._wanting[member] = None
                continue
            queue_us = duration_us(max(0, now_us - member.ready_us))
            block = member.session.block_ready(len(request.ids), request.turn, drafted, draft_us, queue_us)
            if block is not None:
                blocks.setdefault(member.link, []).append(block)
        for link_id, link in self._links.items():
            if link in blocks:
                said.setdefault(link_id, []).append(link.blocks(Blocks(tuple(blocks[link]))))
                self.totals.block_count += len(blocks[link])
                self.totals.token_count += sum(len(block.token_ids) for block in blocks[link])
        self.totals.step_us = draft_us


def _contexts(commands: Sequence[Command]) -> Iterator[int]:
    """The link of each context frame."""
    for command in commands:
        if isinstance(command, FrameArrived) and isinstance(command.frame, Context):
            yield command.link_id
