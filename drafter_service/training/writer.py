"""The target writes training samples: many sequences in one flat batch, each at its own place.

What is written depends on a sample's number and the seed alone, not on what else is in the batch (with the model in exact mode),
so a run that was killed and goes on writes what it would have written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from drafter_service.training.prompts import ChatFormat
from drafter_service.training.samples import Outcome, Sample
from sparkrelay import noise
from sparkrelay.device.choice import choose_token
from sparkrelay.device.flat_batch import FlatBatch, FlatEntry
from sparkrelay.device.slab import SlabState
from sparkrelay.noise import FloatRow
from sparkrelay.sampling import Sampling

LoopRule = Callable[[Sequence[int]], int]
"""Index from which on a text only repeats itself; its length if it does not."""

LOOP_CHECK_TOKENS = 32
"""A text is looked at for a loop after so many tokens: the rule takes longer than a token does."""
READ_ROWS = 96
"""Prompt ids that one sequence reads in a step; more would hold up the others' tokens for nothing."""


class FlatModel(Protocol):
    """What this file uses of FlatCausalLM."""

    def new_state(self) -> SlabState: ...

    def forward(self, batch: FlatBatch) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Assignment:
    """One sample to write.

    number       names it in the run
    prompt       ids up to where the answer begins; None: the target writes the user's message too
    temperature  of the answer; 0 is greedy
    starter      first ids of the message that the target writes; may be empty
    """

    number: int
    prompt: tuple[int, ...] | None
    temperature: float
    starter: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class WriterRules:
    """What all samples have in common.

    stop_ids              end a message or an answer
    loop_start            where a text begins to repeat itself; the rest is cut
    seed                  of the whole run
    prompt_temperature    of messages that the target writes
    min/max_prompt_tokens a written message outside of these is thrown away
    token_limit           ids of a sample at most, prompt included
    min_answer_tokens     shorter answers are thrown away
    """

    format: ChatFormat
    stop_ids: frozenset[int]
    loop_start: LoopRule
    seed: int
    prompt_temperature: float = 0.8
    min_prompt_tokens: int = 5
    max_prompt_tokens: int = 160
    token_limit: int = 512
    min_answer_tokens: int = 16


@dataclass(slots=True)
class _Slot:
    """A sequence being written. part_start: where the message or the answer that is being written begins."""

    assignment: Assignment
    state: SlabState
    ids: list[int]
    part_start: int
    writes_prompt: bool
    prompt_len: int = 0
    sampling: Sampling = field(default_factory=Sampling)


class Writer:
    """Takes assignments, gives their outcomes as they are ready."""

    def __init__(self, model: FlatModel, rules: WriterRules, batch_size: int) -> None:
        """batch_size: sequences at once."""
        self._model = model
        self._rules = rules
        self._batch_size = batch_size
        self.written_tokens = 0

    def write(self, assignments: Iterator[Assignment]) -> Iterator[Outcome]:
        """An outcome for every assignment, in the order in which they end."""
        slots: list[_Slot] = []
        ready: deque[Outcome] = deque()
        while True:
            while len(slots) < self._batch_size and (assignment := next(assignments, None)) is not None:
                slot = self._begin(assignment)
                if len(slot.ids) + self._rules.min_answer_tokens > self._rules.token_limit:
                    ready.append(Outcome(assignment.number, None, "prompt too long"))
                else:
                    slots.append(slot)
            yield from ready
            ready.clear()
            if not slots:
                return
            still_writing = []
            for slot, row in self._step(slots):
                outcome = self._take(slot, row) if row is not None else None
                if outcome is None:
                    still_writing.append(slot)
                else:
                    slot.state.close()
                    ready.append(outcome)
            slots = still_writing

    def _begin(self, assignment: Assignment) -> _Slot:
        state = self._model.new_state()
        if assignment.prompt is None:
            opening = self._rules.format.opening
            slot = _Slot(assignment, state, [*opening, *assignment.starter], len(opening), writes_prompt=True)
            slot.sampling = self._sampling(assignment, self._rules.prompt_temperature)
        else:
            slot = _Slot(assignment, state, list(assignment.prompt), 0, writes_prompt=False)
            self._begin_answer(slot)
        return slot

    def _begin_answer(self, slot: _Slot) -> None:
        slot.writes_prompt = False
        slot.prompt_len = slot.part_start = len(slot.ids)
        slot.sampling = self._sampling(slot.assignment, slot.assignment.temperature)

    def _sampling(self, assignment: Assignment, temperature: float) -> Sampling:
        seed, _ = noise.key(self._rules.seed, assignment.number)
        return Sampling(temperature=temperature, seed=seed)

    def _step(self, slots: Sequence[_Slot]) -> list[tuple[_Slot, FloatRow | None]]:
        """One forward. The row after each sequence's last id; None where it has not read all of its ids yet."""
        token_ids: list[int] = []
        entries: list[FlatEntry] = []
        kept_rows: list[int] = []
        for slot in slots:
            start = slot.state.length
            part = slot.ids[start : start + READ_ROWS]
            token_ids += part
            entries.append(FlatEntry(slot.state, start, len(part)))
            if start + len(part) == len(slot.ids):
                kept_rows.append(len(token_ids) - 1)
        batch = FlatBatch(np.array(token_ids, np.int64), tuple(entries), np.array(kept_rows, np.int64))
        rows = iter(self._model.forward(batch).cpu().numpy())
        return [(slot, next(rows) if slot.state.length == len(slot.ids) else None) for slot in slots]

    def _take(self, slot: _Slot, row: FloatRow) -> Outcome | None:
        """The next token of a sequence, from its logits; the outcome if that was its last."""
        token_id = choose_token(row, slot.sampling, None, (), len(slot.ids), len(slot.ids) - slot.part_start)
        self.written_tokens += 1
        if slot.writes_prompt:
            return self._take_for_prompt(slot, token_id)
        slot.ids.append(token_id)
        written = slot.ids[slot.part_start :]
        over = token_id in self._rules.stop_ids or len(slot.ids) >= self._rules.token_limit
        if not over and len(written) % LOOP_CHECK_TOKENS:
            return None
        end = self._rules.loop_start(written)
        if not over and end == len(written):
            return None
        return self._outcome(slot, written[:end], looped=end < len(written))

    def _take_for_prompt(self, slot: _Slot, token_id: int) -> Outcome | None:
        number, count = slot.assignment.number, len(slot.ids) - slot.part_start
        if token_id not in self._rules.stop_ids:
            slot.ids.append(token_id)
            too_long = count + 1 > self._rules.max_prompt_tokens
            return Outcome(number, None, "message too long") if too_long else None
        if count < self._rules.min_prompt_tokens:
            return Outcome(number, None, "message too short")
        slot.ids += self._rules.format.closing
        self._begin_answer(slot)
        return None

    def _outcome(self, slot: _Slot, answer: Sequence[int], looped: bool) -> Outcome:
        assignment = slot.assignment
        if len(answer) < self._rules.min_answer_tokens:
            return Outcome(assignment.number, None, "loop" if looped else "answer too short")
        ids = (*slot.ids[: slot.part_start], *answer)
        own_prompt, seed = assignment.prompt is None, slot.sampling.seed
        sample = Sample(ids, slot.prompt_len, assignment.temperature, own_prompt, looped, seed)
        return Outcome(assignment.number, sample, "")
