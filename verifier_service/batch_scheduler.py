"""Which sequences enter a step, and with which rows.

Admission is first come, first served, with room for the whole prompt. In a step decoding comes first: it gets all it needs,
except that it leaves a quarter of the row budget to prompts that are waiting to be read, which are read in chunks of what is
left. When a running sequence cannot grow, the youngest is preempted: its state is freed and built again later; its tokens,
its member and what was said about it stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from verifier_service.depth_policies import DepthPolicy, DepthQuestion, level
from verifier_service.ragged_batch import Segment
from verifier_service.sequence import Sequence, Turn
from verifier_service.state_memory import StateMemory
from verifier_service.step_curve import GUESS, KEY_BLOCK, StepCurve, StepShape
from verifier_service.waiting_rule import Boundary, at_boundary, is_pending

PROMPT_SHARE = 4  # one row in so many is kept for prompts while any is to be read


@dataclass(slots=True, eq=False)
class Entry:
    """A sequence's part of a step. depth: draft tokens checked, the last rows of the segment."""

    sequence: Sequence
    segment: Segment
    depth: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. due_us: if it is nothing, when to look again (None: when a command comes)."""

    entries: list[Entry] = field(default_factory=list)
    due_us: int | None = None


class BatchScheduler:
    """The queue, the running sequences and the plan of each step. Deterministic; its clock is an argument.

    curve  how long steps take, corrected by `observe`; None: a guess to begin with
    """

    def __init__(
        self,
        memory: StateMemory,
        policy: DepthPolicy,
        step_token_budget: int,
        wait_limit_us: int,
        curve: StepCurve | None = None,
    ) -> None:
        self._curve = curve or StepCurve(GUESS)
        self._memory = memory
        self._policy = policy
        self._step_token_budget = step_token_budget
        self._wait_limit_us = wait_limit_us
        # Preempted sequences first, oldest first; then turns that are not open yet.
        self.queue: deque[Sequence] = deque()
        # sequence id |-> sequence, in order of admission; while rows are short, those served longest ago first
        self.running: dict[int, Sequence] = {}
        # Of the last plan: what a policy's draft budget may depend on.
        self.decoding_count = 0
        self.preempted_count = 0

    @property
    def unopened_count(self) -> int:
        return sum(1 for sequence in self.queue if sequence.requested is not None)

    @property
    def reads_prompts(self) -> bool:
        return any(_turn(sequence).reading for sequence in self.running.values())

    # ---- admission ----------------------------------------------------------------------------------------------

    def admit_next(self, token_count: int) -> Sequence | None:
        """Takes the head of the queue into the running set if there is room for its `token_count` tokens."""
        sequence = self.queue[0]
        if not self._memory.grow(sequence, token_count):
            assert self.running, "nothing runs, yet there is no room for a turn that was found to fit"
            return None
        self.queue.popleft()
        self.running[sequence.sequence_id] = sequence
        return sequence

    def leave(self, sequence: Sequence) -> None:
        """The sequence's turn is over, wherever it stands."""
        if self.running.pop(sequence.sequence_id, None) is None:
            self.queue.remove(sequence)
        else:
            self._memory.rest(sequence)

    # ---- one step -------------------------------------------------------------------------------------------------

    def draft_budget(self) -> int:
        """How many draft tokens a turn without a fixed depth should be sent for its next block; its end may allow fewer."""
        return self._policy.draft_budget(self.decoding_count)

    def plan(self, now_us: int) -> StepPlan:
        readers = [sequence for sequence in self.running.values() if _turn(sequence).reading]
        readers.sort(key=lambda sequence: _turn(sequence).age)
        boundary = self._boundary(now_us, prompts_to_read=bool(readers))
        row_limit = self._step_token_budget
        if readers:
            row_limit -= row_limit // PROMPT_SHARE
        entering, anchor_rows = self._within(row_limit, boundary.entering)
        depths = self._depths(entering, anchor_rows, row_limit, self._prompt_rows(readers, anchor_rows))
        entries = self._decoding_entries(entering, depths)
        if readers:
            left = self._step_token_budget - sum(entry.segment.row_count for entry in entries)
            entries += self._reading_entries(readers, left)
        if entries:
            return StepPlan(entries)
        # Without entries although sessions entered: they were preempted, and others can go on at once.
        return StepPlan(due_us=now_us if boundary.entering else boundary.due_us)

    def _boundary(self, now_us: int, *, prompts_to_read: bool) -> Boundary:
        able: list[Sequence] = []
        pending: list[Sequence] = []
        overdue = False
        policy_budget = self._policy.draft_budget(self.decoding_count)
        for sequence in self.running.values():
            turn = sequence.turn
            assert turn is not None
            if turn.reading:
                continue
            drafts_wanted = turn.draft_budget(policy_budget, len(sequence.token_ids)) > 0
            if not drafts_wanted or turn.block is not None:
                able.append(sequence)
                continue
            waited = turn.wait.deadline_us is not None
            if is_pending(sequence, turn, now_us, self._wait_limit_us):
                pending.append(sequence)
            else:
                able.append(sequence)
                overdue = overdue or waited
        self.decoding_count = len(able) + len(pending)
        return at_boundary(able, pending, overdue=overdue, prompts_to_read=prompts_to_read)

    def _within(self, row_limit: int, entering: list[Sequence]) -> tuple[list[Sequence], int]:
        """As many sessions as the rows can serve even without drafts, and their rows. Those left out come first next time."""
        row_count = sum([len(sequence.token_ids) - sequence.state_len for sequence in entering])
        if row_count <= row_limit:
            return entering, row_count
        served: list[Sequence] = []
        row_count = 0
        for sequence in entering:
            if served and row_count + sequence.pending_row_count > row_limit:
                break
            served.append(sequence)
            row_count += sequence.pending_row_count
        for sequence in served:
            self.running[sequence.sequence_id] = self.running.pop(sequence.sequence_id)
        return served, row_count

    def observe(self, entries: Ordered[Entry], row_count: int, took_us: int) -> None:
        """A step is over that took so long, by a clock; 0 if nobody measures."""
        if took_us > 0:
            keys = sum([entry.segment.start // KEY_BLOCK for entry in entries])
            self._curve.observe(StepShape(row_count, len(entries), keys + len(entries)), took_us)

    def _prompt_rows(self, readers: Ordered[Sequence], anchor_rows: int) -> int:
        """Rows of the step that prompts will take, if no draft takes them."""
        wanted = sum(sequence.base_len - sequence.state_len for sequence in readers)
        return min(wanted, max(0, self._step_token_budget - anchor_rows))

    def _depths(
        self, entering: list[Sequence], anchor_rows: int, row_limit: int, prompt_rows: int
    ) -> list[int]:
        """[entering] how deep each session's block is checked; decided for all of them together."""
        depths = [0] * len(entering)
        fixed_depths = 0
        free: list[int] = []  # indices of the sessions whose depth the policy decides
        most: list[int] = []
        confidences: list[tuple[float, ...]] = []
        for index, sequence in enumerate(entering):
            turn = sequence.turn
            if turn is None or turn.block is None:
                continue
            limit = turn.draft_budget(len(turn.block.token_ids), len(sequence.token_ids))
            if turn.command.speculation.fixed_depth is not None:
                depths[index] = min(limit, len(turn.block.token_ids))
                fixed_depths += depths[index]
            elif limit > 0:
                free.append(index)
                most.append(limit)
                confidences.append(turn.block.confidences)
        draft_rows = max(0, row_limit - anchor_rows)
        if free:
            question = DepthQuestion(
                confidences=confidences,
                max_depths=most,
                fixed_row_count=anchor_rows + fixed_depths + prompt_rows,
                session_count=len(entering),
                row_limit=max(0, draft_rows - fixed_depths),
                key_block_count=sum([1 + sequence.state_len // KEY_BLOCK for sequence in entering]),
                curve=self._curve,
            )
            for index, depth in zip(free, self._policy.depths(question), strict=True):
                depths[index] = depth
        return level(depths, draft_rows)

    def _decoding_entries(self, entering: list[Sequence], depths: list[int]) -> list[Entry]:
        entries: list[Entry] = []
        lost: set[int] = set()
        holds = self._memory.holds
        for sequence, planned_depth in zip(entering, depths, strict=True):
            sequence_id, token_ids, depth = sequence.sequence_id, sequence.token_ids, planned_depth
            if sequence_id in lost:
                continue
            if not holds(sequence_id, len(token_ids) + depth):
                depth = self._make_room(sequence, depth, lost)
                if sequence_id in lost:
                    continue
            start = sequence.state_len
            rows = token_ids[start:]
            if depth:
                turn = sequence.turn
                assert turn is not None and turn.block is not None
                rows += turn.block.token_ids[:depth]
            entries.append(Entry(sequence, Segment(sequence_id, start, rows, depth + 1), depth))
        if lost:
            return [entry for entry in entries if entry.sequence.sequence_id not in lost]
        return entries

    def _make_room(self, sequence: Sequence, depth: int, lost: set[int]) -> int:
        """Room for the sequence's rows, without drafts if there is none for them; returns the depth that has room.

        Preempts the youngest, which may be the sequence itself; their ids are added to `lost`.
        """
        base_len = sequence.base_len
        if self._memory.grow(sequence, base_len + depth):
            return depth
        while not self._memory.grow(sequence, base_len):
            youngest = max(self.running.values(), key=lambda s: _turn(s).age)
            assert youngest is not sequence or len(self.running) > 1, "a sequence alone always fits"
            self._preempt(youngest)
            lost.add(youngest.sequence_id)
            if youngest is sequence:
                break
        return 0

    def _preempt(self, sequence: Sequence) -> None:
        self.preempted_count += 1
        turn = _turn(sequence)
        turn.reading = True
        turn.reading_begun = False
        # Its wait may be long past when it comes back: a new one begins then.
        turn.wait.deadline_us = None
        self._memory.release(sequence)
        del self.running[sequence.sequence_id]
        self.queue.appendleft(sequence)

    def _reading_entries(self, readers: Ordered[Sequence], row_count: int) -> list[Entry]:
        """Chunks of prompts in order of admission, while rows are left."""
        entries: list[Entry] = []
        for sequence in readers:
            if row_count <= 0:
                break
            if sequence.sequence_id not in self.running:
                continue  # preempted while this step was planned
            if not _turn(sequence).reading_begun:
                self._begin_reading(sequence)
            start = sequence.state_len
            rows = sequence.token_ids[start : start + row_count]
            row_count -= len(rows)
            complete = start + len(rows) == sequence.base_len
            entries.append(Entry(sequence, Segment(sequence.sequence_id, start, rows, int(complete)), 0))
        return entries

    def _begin_reading(self, sequence: Sequence) -> None:
        """Looks once more for somebody who remembers the beginning: in a crowd with one system prompt, whoever read first."""
        turn = _turn(sequence)
        turn.reading_begun = True
        self._memory.reuse(sequence)
        if sequence.base_len == turn.opened_len:
            turn.cached_count = min(sequence.state_len, turn.command.output_start)

    def check_integrity(self) -> None:
        for sequence_id, sequence in self.running.items():
            assert sequence.sequence_id == sequence_id and sequence.turn is not None
        ages = [_turn(s).age for s in self.queue if s.turn is not None]
        assert ages == sorted(ages), "preempted sequences wait out of order"
        assert all(s.sequence_id not in self.running and s.busy for s in self.queue)
        assert len({s.sequence_id for s in self.queue}) == len(self.queue)


def _turn(sequence: Sequence) -> Turn:
    assert sequence.turn is not None
    return sequence.turn
