"""The verifier's engine: commands in, one forward of the target, events out.

    commands -> admission -> plan of the step -> forward -> verdicts -> events

Synchronous and, given the model's logits, deterministic: it does no I/O and decides by the time it is told. What it is asked
and cannot do is refused as an event; a broken invariant is an assertion and ends the process.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace

from sparkrelay.device.step_profile import StepProfile, Stopwatch
from sparkrelay.device.thread import StepResult
from sparkrelay.outcomes import FinishReason, Reason
from verifier_service import turns
from verifier_service.batch_scheduler import BatchScheduler, Entry
from verifier_service.commit import StepFacts, Verdict, commit, finish_reason_of, verdicts_of
from verifier_service.depth_policies import DepthPolicy
from verifier_service.engine_settings import EngineSettings as EngineSettings
from verifier_service.events import (
    AddMember,
    BlockArrived,
    CancelTurn,
    Command,
    DrafterUnavailable,
    EndSession,
    Event,
    ForkSession,
    MemberRemoved,
    MemberTurnStarted,
    RemoveMember,
    StartTurn,
    TurnAccepted,
    TurnRefused,
)
from verifier_service.forks import fork_session
from verifier_service.member_feed import feed
from verifier_service.members import Members
from verifier_service.models import FloatRows, TargetModel
from verifier_service.prefix_index import PREFIX_BLOCK
from verifier_service.ragged_batch import RaggedBatch
from verifier_service.sequence import Sequence
from verifier_service.sessions import Sessions
from verifier_service.state_memory import StateMemory
from verifier_service.step_curve import StepCurve

CATCH_UP_ROWS = 16  # a model that had to go back further after a rejection reads again as if it were a prompt


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine is doing, and has done since it began. Units: tokens and counts; step_us is the last forward's duration.

    used_block_count      blocks that sessions hold, idle ones included
    leftover_block_count  blocks with state of ended sessions, as good as free
    reused_count          how often a turn began with, or went on from, state of another session; reused_token_count in tokens
    """

    active_turn_count: int
    queued_turn_count: int
    session_count: int
    member_count: int
    used_block_count: int
    block_count: int
    step_count: int
    step_us: int
    committed_token_count: int
    preempted_count: int
    evicted_count: int
    leftover_block_count: int
    reused_count: int
    reused_token_count: int


class Engine:
    """See the module. `measure_us` is a clock that says how long the forward took: to rounds, and to the `curve` by which
    an adaptive policy decides. `stopwatch`, which the model shares, is what steps say where their time went by."""

    def __init__(
        self,
        model: TargetModel,
        settings: EngineSettings,
        policy: DepthPolicy,
        measure_us: Callable[[], int] | None = None,
        stopwatch: Stopwatch | None = None,
        curve: StepCurve | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._measure_us = measure_us
        self._stopwatch = stopwatch or Stopwatch()
        leftover_limit = settings.block_count * settings.leftover_percent // 100
        self._memory = StateMemory(model, settings.block_count, leftover_limit)
        self._scheduler = BatchScheduler(
            self._memory, policy, settings.step_token_budget, settings.block_wait_us, curve
        )
        self._members = Members()
        context_limit = min(settings.context_limit or model.info.context_limit, model.info.context_limit)
        self._limits = turns.Limits(context_limit, self._memory.capacity_tokens)
        self._sessions = Sessions(settings.max_sessions, self._memory, self._members)
        self._turns: dict[str, Sequence] = {}  # turn id |-> its session, queued turns too
        self._next_age = 0
        self._told_first = False
        self._step_count = 0
        self._step_us = 0
        self._committed_token_count = 0

    # ---- one step -------------------------------------------------------------------------------------------------

    def step(self, commands: Ordered[Command], now_us: int) -> StepResult[Event]:
        """Obeys the commands in order, computes one step if there is one to compute, and returns what happened.

        now_us never decreases. next_due_us is now_us while there is more to compute, the end of a wait, or None.
        """
        self._stopwatch.begin()
        events: list[Event] = []
        for command in commands:
            self._obey(command, now_us, events)
        self._admit(now_us, events)
        if self._tells_first(events):
            return StepResult(events, now_us)
        plan = self._scheduler.plan(now_us)
        if not plan.entries:
            return StepResult(events, plan.due_us)
        profile = self._compute(plan.entries, now_us, events)
        more = self._scheduler.running or self._scheduler.queue
        return StepResult(events, now_us if more else None, profile)

    def _obey(self, command: Command, now_us: int, events: list[Event]) -> None:
        match command:
            case BlockArrived():
                self._members.take_block(command, events)
            case StartTurn():
                self._start_turn(command, events)
                self._admit(now_us, events)
            case CancelTurn():
                self._cancel_turn(command, events)
            case EndSession():
                self._end_session(command, events)
            case ForkSession():
                fork_session(command, self._sessions, self._settings.retry_after_ms, events)
            case AddMember():
                self._add_member(command, events)
            case RemoveMember():
                self._members.remove(command.member_id)
            case DrafterUnavailable():
                self._drafter_unavailable(command)

    def _tells_first(self, events: list[Event]) -> bool:
        """Whether what has just begun is told before its prompt is read: then the drafter drafts meanwhile. Never twice in a
        row, so that turns that keep coming hold up no forward."""
        begun = not self._told_first and any(
            isinstance(each, TurnAccepted | MemberTurnStarted) for each in events
        )
        self._told_first = begun and self._scheduler.reads_prompts
        return self._told_first

    def _compute(self, entries: list[Entry], now_us: int, events: list[Event]) -> StepProfile | None:
        batch = RaggedBatch.of(entry.segment for entry in entries)
        before_us = self._measure_us() if self._measure_us is not None else now_us
        self._stopwatch.begin_forward()
        logits = self._model.forward(batch)
        self._stopwatch.begin_choice()
        after_us = self._measure_us() if self._measure_us is not None else now_us
        self._step_count += 1
        self._step_us = after_us - before_us
        facts = StepFacts(now_us, after_us, self._step_us, batch.row_count, len(entries))
        starts: list[int] = batch.logit_starts.tolist()
        policy_budget = self._scheduler.draft_budget()
        for index, verdict in enumerate(verdicts_of(entries, logits, starts)):
            entry, sequence = entries[index], entries[index].sequence
            sequence.state_len += len(entry.segment.token_ids)
            feed(sequence, self._memory, events)
            if verdict is not None:
                rows = logits[starts[index] : starts[index + 1]]
                self._commit(entry, verdict, rows, facts, policy_budget, events)
            # Only now, when rejected drafts are forgotten, and only if another block of the index is full: this is the hot path.
            if sequence.state_len // PREFIX_BLOCK > entry.segment.start // PREFIX_BLOCK:
                self._memory.grown(sequence)
        took_us = self._measure_us() - before_us if self._measure_us is not None else 0
        self._scheduler.observe(entries, batch.row_count, took_us)
        return self._stopwatch.profile(batch.row_count, len(entries))

    def _commit(
        self,
        entry: Entry,
        verdict: Verdict,
        rows: FloatRows,
        facts: StepFacts,
        policy_budget: int,
        events: list[Event],
    ) -> None:
        sequence = entry.sequence
        turn = sequence.turn
        assert turn is not None
        token_count = len(verdict.tokens)
        new_len = len(sequence.token_ids) + token_count
        over = verdict.stopped or new_len >= turn.end_len or verdict.failure is not None
        if token_count:
            budget = 0 if over else turn.draft_budget(policy_budget, new_len)
            commit(entry, verdict, rows, facts, self._memory, budget, events)
            self._committed_token_count += token_count
        if sequence.state_len >= new_len:
            self._memory.rewind(sequence, new_len - 1)
            turn.reading = new_len - sequence.state_len > CATCH_UP_ROWS
        if over:
            self._end_turn(sequence, verdict, events)

    def _end_turn(self, sequence: Sequence, verdict: Verdict, events: list[Event]) -> None:
        assert sequence.turn is not None
        reason = finish_reason_of(sequence, sequence.turn, verdict)
        if reason is not None:
            self._finish(sequence, reason, events)
        else:
            self._break(sequence, verdict.failure_reason, verdict.failure or "", events)

    # ---- turns ----------------------------------------------------------------------------------------------------

    def _start_turn(self, command: StartTurn, events: list[Event]) -> None:
        sequence = self._sessions.get(command.session_id)
        refusal = self._refusal_of(command, sequence)
        if refusal is not None:
            events.append(refusal)
            return
        if sequence is None:
            sequence = self._sessions.open(command.session_id, command.tenant_salt, events)
        if command.keep_len == 0:
            self._memory.prefer(command.tenant_salt, command.append_ids)
        sequence.requested = command
        self._turns[command.turn_id] = sequence
        self._scheduler.queue.append(sequence)

    def _refusal_of(self, command: StartTurn, sequence: Sequence | None) -> TurnRefused | None:
        if command.turn_id in self._turns:
            message = "is under way already; wait for its end, or use another id"
            return TurnRefused(command.turn_id, Reason.SESSION_BUSY, message, "turn_id")
        refusal = turns.refusal_of(command, sequence, self._limits)
        if refusal is not None:
            return refusal
        settings = self._settings
        if self._scheduler.unopened_count >= settings.max_queued_turns:
            message = f"{settings.max_queued_turns} turns wait for room already; try again later"
        elif sequence is None and not self._sessions.may_open():
            message = f"all {settings.max_sessions} sessions have a turn under way; try again later"
        else:
            return None
        return TurnRefused(
            command.turn_id, Reason.OVERLOADED, message, retry_after_ms=settings.retry_after_ms
        )

    def _admit(self, now_us: int, events: list[Event]) -> None:
        """Lets waiting turns run, in order, while there is room."""
        scheduler = self._scheduler
        while scheduler.queue:
            head = scheduler.queue[0]
            token_count = turns.opened_length(head.requested) if head.requested is not None else head.base_len
            sequence = scheduler.admit_next(token_count)
            if sequence is None:
                return
            if sequence.requested is not None:
                self._open_turn(sequence, now_us, events)

    def _open_turn(self, sequence: Sequence, now_us: int, events: list[Event]) -> None:
        turns.open_turn(sequence, self._memory, self._limits, self._next_age, now_us, events)
        self._next_age += 1
        self._introduce(sequence, events)

    def _introduce(self, sequence: Sequence, events: list[Event]) -> None:
        if sequence.turn is not None:
            budget = sequence.turn.draft_budget(self._scheduler.draft_budget(), sequence.base_len)
            turns.introduce_turn(sequence, self._memory, budget, events)

    def _cancel_turn(self, command: CancelTurn, events: list[Event]) -> None:
        sequence = self._turns.get(command.turn_id)
        if sequence is not None:
            self._cancel(sequence, Reason.CANCELLED, "cancelled before it began", events)

    def _cancel(self, sequence: Sequence, reason: Reason, message: str, events: list[Event]) -> None:
        """Ends the session's turn; one that was not open yet is refused with this reason."""
        if sequence.turn is not None:
            self._finish(sequence, FinishReason.CANCELLED, events)
        elif sequence.requested is not None:
            turn_id = sequence.requested.turn_id
            self._leave(sequence, turn_id)
            sequence.requested = None
            events.append(TurnRefused(turn_id, reason, message))

    def _finish(self, sequence: Sequence, reason: FinishReason, events: list[Event]) -> None:
        assert sequence.turn is not None
        self._leave(sequence, sequence.turn.command.turn_id)
        turns.close_turn(sequence, reason, events)

    def _break(self, sequence: Sequence, reason: Reason, message: str, events: list[Event]) -> None:
        assert sequence.turn is not None
        self._leave(sequence, sequence.turn.command.turn_id)
        turns.break_turn(sequence, reason, message, events)

    def _leave(self, sequence: Sequence, turn_id: str) -> None:
        """The turn no longer takes part in steps; its session is now the one used last."""
        self._scheduler.leave(sequence)
        del self._turns[turn_id]
        self._sessions.touch(sequence)

    # ---- sessions and members ---------------------------------------------------------------------------------------

    def _end_session(self, command: EndSession, events: list[Event]) -> None:
        sequence = self._sessions.get(command.session_id)
        if sequence is not None:
            self._cancel(sequence, Reason.SESSION_ENDED, "the session was ended", events)
            self._sessions.forget(sequence, "the session was ended", events)

    def _add_member(self, command: AddMember, events: list[Event]) -> None:
        sequence = self._sessions.get(command.session_id)
        if sequence is None:
            message = "the session is not known here"
            names = command.member_id, command.session_id
            events.append(MemberRemoved(*names, Reason.SESSION_NOT_FOUND, message))
            return
        self._members.add(command, sequence, events)
        self._introduce(sequence, events)

    def _drafter_unavailable(self, command: DrafterUnavailable) -> None:
        sequence = self._turns.get(command.turn_id)
        if sequence is None:
            return
        if sequence.requested is not None:
            sequence.requested = replace(sequence.requested, expect_drafter=False)
        elif sequence.turn is not None and sequence.member is None:
            sequence.turn.wait.give_up()

    # ---- what it is doing ---------------------------------------------------------------------------------------------

    def load(self) -> EngineLoad:
        """A snapshot; may be read from another thread, where it is a moment old."""
        queued = len(self._scheduler.queue)
        return EngineLoad(
            active_turn_count=len(self._turns) - queued,
            queued_turn_count=queued,
            session_count=len(self._sessions),
            member_count=len(self._members),
            used_block_count=self._memory.used_block_count,
            block_count=self._memory.block_count,
            step_count=self._step_count,
            step_us=self._step_us,
            committed_token_count=self._committed_token_count,
            preempted_count=self._scheduler.preempted_count,
            evicted_count=self._memory.evicted_count,
            leftover_block_count=self._memory.leftover_block_count,
            reused_count=self._memory.reused_count,
            reused_token_count=self._memory.reused_token_count,
        )

    def check_integrity(self) -> None:
        """Recounts everything; for tests."""
        self._sessions.check_integrity()
        sequences = {sequence.sequence_id: sequence for sequence in self._sessions.values()}
        self._memory.check_integrity(set(self._scheduler.running), sequences)
        self._scheduler.check_integrity()
        self._members.check_integrity(self._sessions.values())
        in_scheduler = [*self._scheduler.running.values(), *self._scheduler.queue]
        busy = {s.session_id for s in self._sessions.values() if s.busy}
        assert {s.session_id for s in in_scheduler} == busy == {s.session_id for s in self._turns.values()}
        assert len(self._turns) == len(busy), "a session has two turns"
