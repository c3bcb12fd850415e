"""What the model remembers of each sequence, and the room it has for it: the block manager and the model kept in step."""

from __future__ import annotations

from verifier_service.block_manager import BlockManager
from verifier_service.models import TargetModel
from verifier_service.sequence import Sequence


class StateMemory:
    """The only caller of the model's open, resize, rewind and close, so that room and memory cannot disagree.

    Sequences that are not running may lose their state to others, least recently used first; their tokens stay.

    holds  (sequence id, token count) -> whether the sequence has room for so many tokens
    """

    __slots__ = ("_blocks", "_model", "_resting", "evicted_count", "holds")

    def __init__(self, model: TargetModel, block_count: int) -> None:
        self._model = model
        self._blocks = BlockManager(block_count, model.info.block_tokens)
        self._resting: dict[
            int, Sequence
        ] = {}  # sequence id |-> sequence with state that is not running, oldest first
        self.evicted_count = 0
        self.holds = self._blocks.holds  # not wrapped: it is asked once a session and step

    @property
    def block_count(self) -> int:
        return self._blocks.block_count

    @property
    def used_block_count(self) -> int:
        return self._blocks.used_count

    @property
    def capacity_tokens(self) -> int:
        return self._blocks.capacity_tokens

    def open(self, sequence: Sequence) -> None:
        self._model.open(sequence.sequence_id)

    def close(self, sequence: Sequence) -> None:
        self._resting.pop(sequence.sequence_id, None)
        self._blocks.free(sequence.sequence_id)
        self._model.close(sequence.sequence_id)

    def grow(self, sequence: Sequence, token_count: int) -> bool:
        """Makes room for so many tokens, evicting resting sequences if need be. False: not even that would do.

        The caller is about to run the sequence: it no longer rests.
        """
        was_resting = self._resting.pop(sequence.sequence_id, None)
        if not self._evict(self._blocks.lacks(sequence.sequence_id, token_count)):
            if was_resting is not None:
                self._resting = {sequence.sequence_id: sequence, **self._resting}
            return False
        if not self._blocks.holds(sequence.sequence_id, token_count):
            grown = self._blocks.extend(sequence.sequence_id, token_count)
            assert grown, "what was evicted did not suffice"
            self._resize(sequence)
        return True

    def rewind(self, sequence: Sequence, length: int) -> None:
        """Forgets the state from `length` on; the model may have to forget more."""
        if sequence.state_len > length:
            sequence.state_len = self._model.rewind(sequence.sequence_id, length)
            assert 0 <= sequence.state_len <= length, "a model rewound to more than it was asked for"

    def rest(self, sequence: Sequence) -> None:
        """The sequence stops running: it keeps its state until somebody needs the room."""
        if self._blocks.shrink(sequence.sequence_id, sequence.state_len):
            self._resize(sequence)
        if sequence.state_len > 0:
            self._resting[sequence.sequence_id] = sequence

    def release(self, sequence: Sequence) -> None:
        """Forgets all state and gives back the room."""
        self._resting.pop(sequence.sequence_id, None)
        self.rewind(sequence, 0)
        self._blocks.free(sequence.sequence_id)
        self._resize(sequence)

    def check_integrity(self, running: set[int], all_sequences: dict[int, Sequence]) -> None:
        """running: ids of the sequences that may hold blocks without resting."""
        self._blocks.check_integrity()
        for sequence_id, sequence in all_sequences.items():
            assert self._blocks.holds(sequence_id, sequence.state_len) or sequence.state_len == 0
            if self._blocks.blocks_of(sequence_id):
                assert (sequence_id in running) != (sequence_id in self._resting), "held by nobody, or twice"
        assert self._resting.keys() <= all_sequences.keys(), "an ended session rests"

    def _evict(self, block_count: int) -> bool:
        """Frees so many blocks. False, and nothing evicted, if all resting sequences together do not hold as many."""
        victims = []
        for sequence in self._resting.values():
            if block_count <= 0:
                break
            victims.append(sequence)
            block_count -= len(self._blocks.blocks_of(sequence.sequence_id))
        if block_count > 0:
            return False
        for sequence in victims:
            self.release(sequence)
        self.evicted_count += len(victims)
        return True

    def _resize(self, sequence: Sequence) -> None:
        self._model.resize(sequence.sequence_id, self._blocks.blocks_of(sequence.sequence_id))
