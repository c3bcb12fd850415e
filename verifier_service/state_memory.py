"""What the model remembers of each sequence, and the room it has for it: the block manager and the model kept in step."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from verifier_service.block_manager import BlockManager
from verifier_service.models import ContextWords, TargetModel
from verifier_service.prefix_index import PREFIX_BLOCK, PrefixIndex
from verifier_service.sequence import Sequence


class StateMemory:
    """The only caller of the model's open, resize, rewind, fork and close, so that room and memory cannot disagree.

    Sequences that are not running may lose their state to others, least recently used first; their tokens stay. Whatever is
    remembered, of running, idle or ended sessions, is a beginning for prompts that share it: it is copied, never shared.

    leftover_limit  blocks that the state of ended sessions may hold, until somebody needs them
    holds           (sequence id, token count) -> whether the sequence has room for so many tokens
    """

    __slots__ = (
        "_blocks",
        "_leftover_limit",
        "_leftovers",
        "_model",
        "_prefixes",
        "_resting",
        "evicted_count",
        "holds",
        "leftover_block_count",
        "reused_count",
        "reused_token_count",
    )

    def __init__(self, model: TargetModel, block_count: int, leftover_limit: int = 0) -> None:
        self._model = model
        self._blocks = BlockManager(block_count, model.info.block_tokens)
        context = model.info.context
        self._prefixes = PrefixIndex(context.hash.encode() if context is not None else b"")
        self._leftover_limit = leftover_limit
        # By sequence id, oldest first: sequences with state that are not running; and those of them whose session has ended.
        self._resting: dict[int, Sequence] = {}
        self._leftovers: dict[int, Sequence] = {}
        self.leftover_block_count = 0
        self.evicted_count = 0
        self.reused_count = 0
        self.reused_token_count = 0
        self.holds = self._blocks.holds  # not wrapped: it is asked once a session and step

    @property
    def block_count(self) -> int:
        return self._blocks.block_count

    @property
    def used_block_count(self) -> int:
        """Blocks that sessions hold; those of ended ones are as good as free."""
        return self._blocks.used_count - self.leftover_block_count

    @property
    def capacity_tokens(self) -> int:
        return self._blocks.capacity_tokens

    def open(self, sequence: Sequence) -> None:
        self._model.open(sequence.sequence_id)

    def close(self, sequence: Sequence) -> None:
        """The session is over. Its state stays behind as others' beginning, if it can be one and the limit allows."""
        block_count = len(self._blocks.blocks_of(sequence.sequence_id))
        if sequence.state_len < PREFIX_BLOCK or block_count > self._leftover_limit:
            self._forget(sequence)
            return
        assert sequence.sequence_id in self._resting, "a session ended while it ran"
        while self.leftover_block_count + block_count > self._leftover_limit:
            self._forget(next(iter(self._leftovers.values())))
        self._leftovers[sequence.sequence_id] = sequence
        self.leftover_block_count += block_count
        del sequence.token_ids[sequence.state_len :]

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
            self._prefixes.follow(sequence)

    def grown(self, sequence: Sequence) -> None:
        """The sequence remembers more: its tokens up to state_len are final, and a beginning for others from now on."""
        self._prefixes.follow(sequence)

    def context_rows(self, sequence: Sequence, start: int, end: int) -> ContextWords:
        """[end - start, width] the context rows of these positions, which the sequence remembers."""
        assert 0 <= start <= end <= sequence.state_len, "rows of positions that are not remembered"
        return self._model.context_rows(sequence.sequence_id, start, end)

    # ---- one sequence's state for another ---------------------------------------------------------------------------

    def reuse(self, sequence: Sequence) -> None:
        """Takes over from whoever shares the longest beginning, if that is worth it. The last token is left to be read.

        The sequence has room for all its tokens.
        """
        hit = self._prefixes.find(sequence.salt, sequence.token_ids, sequence.base_len - 1, sequence)
        if hit is None:
            return
        known = sequence.state_len
        self.rewind(sequence, 0)
        self._copy(hit.sequence_id, sequence, hit.length)
        self.reused_count += 1
        self.reused_token_count += max(0, sequence.state_len - known)
        leftover = self._leftovers.get(hit.sequence_id)
        if leftover is not None and leftover.state_len == sequence.state_len:
            self._forget(leftover)  # all of it lives on in this sequence
        else:
            self._touch(hit.sequence_id)

    def prefer(self, salt: bytes, token_ids: Ordered[int]) -> None:
        """A prompt that begins like this is about to come: what it can begin with is evicted last."""
        hit = self._prefixes.find(salt, token_ids, len(token_ids) - 1)
        if hit is not None:
            self._touch(hit.sequence_id)

    def fork(self, source: Sequence, sequence: Sequence) -> None:
        """Copies what the source remembers of a new sequence's tokens, if there is room that nobody holds."""
        length = min(source.state_len, sequence.base_len - 1)
        if length > 0 and self._blocks.extend(sequence.sequence_id, length):
            self._resize(sequence)
            self._copy(source.sequence_id, sequence, length)
            self.rest(sequence)

    def _copy(self, source_id: int, sequence: Sequence, length: int) -> None:
        sequence.state_len = self._model.fork(source_id, sequence.sequence_id, length)
        assert 0 <= sequence.state_len <= length, "a model copied more than it was asked for"
        self._prefixes.follow(sequence)

    def _touch(self, sequence_id: int) -> None:
        """Used just now, if it rests."""
        for table in (self._resting, self._leftovers):
            if sequence_id in table:
                table[sequence_id] = table.pop(sequence_id)

    # ---- rest and eviction --------------------------------------------------------------------------------------------

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
        self._prefixes.check_integrity([*all_sequences.values(), *self._leftovers.values()])
        for sequence_id, sequence in all_sequences.items():
            assert self._blocks.holds(sequence_id, sequence.state_len) or sequence.state_len == 0
            if self._blocks.blocks_of(sequence_id):
                assert (sequence_id in running) != (sequence_id in self._resting), "held by nobody, or twice"
        assert not self._leftovers.keys() & all_sequences.keys(), "a session has ended and lives"
        assert self._resting.keys() - self._leftovers.keys() <= all_sequences.keys(), "an ended session rests"
        assert self._leftovers.keys() <= self._resting.keys(), "what is left behind can never be evicted"
        for sequence_id, sequence in self._leftovers.items():
            assert len(sequence.token_ids) == sequence.state_len >= PREFIX_BLOCK, "kept for nothing"
            assert self._blocks.holds(sequence_id, sequence.state_len)
        left = sum(len(self._blocks.blocks_of(sequence_id)) for sequence_id in self._leftovers)
        assert left == self.leftover_block_count <= self._leftover_limit

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
            if sequence.sequence_id in self._leftovers:
                self._forget(sequence)
            else:
                self.release(sequence)
        self.evicted_count += len(victims)
        return True

    def _forget(self, sequence: Sequence) -> None:
        """The end of a sequence: nothing of it is left."""
        sequence_id = sequence.sequence_id
        if self._leftovers.pop(sequence_id, None) is not None:
            self.leftover_block_count -= len(self._blocks.blocks_of(sequence_id))
        self._resting.pop(sequence_id, None)
        sequence.state_len = 0
        self._prefixes.follow(sequence)
        self._blocks.free(sequence_id)
        self._model.close(sequence_id)

    def _resize(self, sequence: Sequence) -> None:
        self._model.resize(sequence.sequence_id, self._blocks.blocks_of(sequence.sequence_id))
