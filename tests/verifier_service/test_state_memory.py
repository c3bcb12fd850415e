"""Random lives of the state memory alone: who remembers what, checked against the model's own memory after every event.

No engine and no turns: sequences are opened, read, extended, verified and rejected, rewound, forked, preempted, rested and ended
in any order that the rules allow, in too little room. After each event every count is taken again, and the model must remember
exactly the tokens that the sequence says it does.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from verifier_service.models.toy import SnapshotToyModel, ToyModel
from verifier_service.ragged_batch import RaggedBatch, Segment
from verifier_service.sequence import Sequence
from verifier_service.state_memory import StateMemory

VOCAB = 8
LENGTH_LIMIT = 90
SYSTEM_PROMPTS = [[1 + (i * i + n) % (VOCAB - 1) for i in range(40)] for n in (2, 5)]


class Life:
    """A memory, its sequences, and what may happen to them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        kind = self.random.choice((ToyModel, SnapshotToyModel))
        self.model = kind(vocab_size=VOCAB, context_limit=256, block_tokens=8)
        block_count = self.random.choice((13, 20, 60))
        self.memory = StateMemory(self.model, block_count, self.random.choice((0, block_count // 2)))
        self.all: dict[int, Sequence] = {}
        self.running: set[int] = set()
        self.counts: Counter[str] = Counter()
        self._next_id = 0

    def run(self, event_count: int = 60) -> Counter[str]:
        events = (
            *(self.join, self.read, self.read, self.extend, self.verify, self.verify, self.rewind),
            *(self.fork, self.preempt, self.rest, self.end),
        )
        for _ in range(event_count):
            event = self.random.choice(events)
            if event():
                self.counts[event.__name__] += 1
            self.check()
        for sequence in list(self.all.values()):
            self._stop(sequence)
            self.memory.close(sequence)
            del self.all[sequence.sequence_id]
            self.check()
        assert self.memory.used_block_count == 0, "something was kept"
        self.counts["evicted"] += self.memory.evicted_count
        self.counts["reused"] += self.memory.reused_count
        self.counts["left behind"] += self.memory.leftover_block_count
        return self.counts

    def check(self) -> None:
        self.memory.check_integrity(self.running, self.all)
        for sequence in (*self.all.values(), *self.memory._leftovers.values()):
            remembered = self.model._memories[sequence.sequence_id].token_ids
            assert remembered == sequence.token_ids[: sequence.state_len], "not the sequence's tokens"
        assert len(self.model._memories) == len(self.all) + len(self.memory._leftovers), "nobody's memory"

    # ---- what happens; False if it cannot happen now ----------------------------------------------------------------

    def join(self) -> bool:
        """A sequence is there with a prompt, new or idle, and runs if there is room for all of it."""
        idle = [each for each in self.all.values() if each.sequence_id not in self.running]
        sequence = self.random.choice(idle) if idle and self.random.random() < 0.5 else self._opened()
        room = self.memory.grow(sequence, sequence.base_len)
        if room:
            self.running.add(sequence.sequence_id)
            self.memory.reuse(sequence)
        return room

    def read(self) -> bool:
        """A chunk of what the model has not read."""
        sequence = self._one_running()
        if sequence is None or sequence.state_len == sequence.base_len - 1:
            return False
        self._read(sequence, self.random.randint(1, sequence.base_len - 1 - sequence.state_len))
        return True

    def extend(self) -> bool:
        """Plain decoding: the anchor is read, a token is committed."""
        return self._round(0)

    def verify(self) -> bool:
        """A block is read behind the anchor; some of it is accepted, the rest forgotten."""
        return self._round(self.random.choice((1, 4, 9)))

    def rewind(self) -> bool:
        """Another ending for a conversation."""
        if not self.all:
            return False
        sequence = self.random.choice(list(self.all.values()))
        keep_len = self.random.randint(1, sequence.base_len)
        self.memory.rewind(sequence, keep_len - 1)
        sequence.rewrite(keep_len, ())
        if sequence.sequence_id not in self.running:
            self.memory.rest(sequence)
        return True

    def fork(self) -> bool:
        if not self.all:
            return False
        source = self.random.choice(list(self.all.values()))
        sequence = self._new(source.salt, source.token_ids[: self.random.randint(1, source.base_len)])
        self.memory.fork(source, sequence)
        self.counts["forked with state"] += sequence.state_len > 0
        return True

    def preempt(self) -> bool:
        sequence = self._one_running()
        if sequence is not None:
            self.running.remove(sequence.sequence_id)
            self.memory.release(sequence)
        return sequence is not None

    def rest(self) -> bool:
        sequence = self._one_running()
        if sequence is not None:
            self._stop(sequence)
        return sequence is not None

    def end(self) -> bool:
        if not self.all:
            return False
        sequence = self.random.choice(list(self.all.values()))
        self._stop(sequence)
        self.memory.close(sequence)
        del self.all[sequence.sequence_id]
        return True

    # ---- parts ----------------------------------------------------------------------------------------------------------

    def _new(self, salt: bytes, token_ids: list[int]) -> Sequence:
        sequence = Sequence(f"s{self._next_id}", self._next_id, salt, list(token_ids))
        self._next_id += 1
        self.all[sequence.sequence_id] = sequence
        self.memory.open(sequence)
        return sequence

    def _opened(self) -> Sequence:
        prompt = self.random.choice(SYSTEM_PROMPTS)[: self.random.choice((1, 17, 30, 40))]
        tail = [self.random.randrange(1, VOCAB) for _ in range(self.random.choice((0, 3, 20)))]
        return self._new(self.random.choice((b"one", b"two")), prompt + tail)

    def _one_running(self) -> Sequence | None:
        ids = sorted(self.running)
        return self.all[self.random.choice(ids)] if ids else None

    def _stop(self, sequence: Sequence) -> None:
        if sequence.sequence_id in self.running:
            self.running.remove(sequence.sequence_id)
            self.memory.rest(sequence)

    def _read(self, sequence: Sequence, count: int) -> None:
        rows = sequence.token_ids[sequence.state_len : sequence.state_len + count]
        self.model.forward(RaggedBatch.of([Segment(sequence.sequence_id, sequence.state_len, rows, 1)]))
        sequence.state_len += count
        self.memory.grown(sequence)

    def _round(self, depth: int) -> bool:
        sequence = self._one_running()
        if sequence is None or sequence.base_len > LENGTH_LIMIT:
            return False
        base_len, start = sequence.base_len, sequence.state_len
        if not self.memory.grow(sequence, base_len + depth):
            self.preempt()  # as an engine would; whoever it is
            return False
        drafts = [self.random.randrange(1, VOCAB) for _ in range(depth)]
        rows = sequence.token_ids[start:] + drafts
        self.model.forward(RaggedBatch.of([Segment(sequence.sequence_id, start, rows, depth + 1)]))
        sequence.state_len += len(rows)
        accepted = self.random.randint(0, depth)
        sequence.token_ids.extend([*drafts[:accepted], self.random.randrange(1, VOCAB)])
        self.memory.rewind(sequence, sequence.base_len - 1)
        self.memory.grown(sequence)
        self.counts["accepted"] += accepted
        self.counts["rejected"] += depth - accepted
        return True


@pytest.mark.parametrize("part", range(2))
def test_thousands_of_lives_keep_room_memory_and_index_in_step(part: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(part, 5000, 2):
        try:
            counts += Life(seed).run()
        except AssertionError as error:
            raise AssertionError(f"Life({seed}).run() says: {error}") from error
    happened = ("join", "read", "extend", "verify", "rewind", "fork", "preempt", "rest", "end")
    for what in (*happened, "accepted", "rejected", "evicted", "reused", "left behind", "forked with state"):
        assert counts[what] > 100, f"the lives hardly ever saw: {what}"


def test_a_memory_that_gives_room_away_under_a_sequence_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def rest_without_shrinking_the_count(memory: StateMemory, sequence: Sequence) -> None:
        memory._blocks.shrink(sequence.sequence_id, max(0, sequence.state_len - 8))
        if sequence.state_len > 0:
            memory._resting[sequence.sequence_id] = sequence

    monkeypatch.setattr(StateMemory, "rest", rest_without_shrinking_the_count)
    with pytest.raises(AssertionError):
        _live(50)


def _live(count: int) -> None:
    for seed in range(count):
        Life(seed).run()
