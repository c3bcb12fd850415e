"""A session as the engine sees it: its committed tokens, what the model remembers of them, its turn, its member.

Plain data. Every count that follows from these fields is a property or a function of them and is never stored beside them.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from sparkrelay.device.choice import Chooser
from sparkrelay.protocol import ChainHash, match_block
from verifier_service.events import BlockArrived, StartTurn


@dataclass(slots=True, eq=False)
class Block:
    """What can be used of a drafted block: tokens that follow the committed ones.

    sent       the block as the drafter sent it
    offset     how many of its tokens were committed by other means since; above 0 the block is rebased
    token_ids  [n] n >= 1, from there on, up to the first stop id
    """

    sent: BlockArrived
    offset: int
    token_ids: tuple[int, ...]

    @property
    def base_len(self) -> int:
        """Where token_ids begin."""
        return self.sent.base_len + self.offset

    @property
    def confidences(self) -> tuple[float, ...]:
        """[n] P(token matches given that all before it match), as the drafter said."""
        every = self.sent.confidences
        count = len(self.token_ids)
        return every if len(every) == count else every[self.offset : self.offset + count]


def usable_part(sent: BlockArrived, stop_ids: frozenset[int], committed_ids: list[int]) -> Block | None:
    """Rebases a block onto the committed tokens: used from where they have got to, if its first tokens are theirs.

    Cut after its first stop id: what would follow can never be committed.
    """
    if sent.base_len < 1:
        return None  # a block follows an anchor; a verdict says 0 for no block
    offset = match_block(sent.base_len, sent.token_ids, committed_ids)
    if offset is None:
        return None
    token_ids = sent.token_ids[offset:] if offset else sent.token_ids
    if not stop_ids.isdisjoint(token_ids):
        first = next(index for index, token_id in enumerate(token_ids) if token_id in stop_ids)
        token_ids = token_ids[: first + 1]
    return Block(sent, offset, token_ids)


def is_spent(sent: BlockArrived, committed_ids: list[int]) -> bool:
    """Whether all tokens of a block were committed by other means: it came too late, but it was right."""
    since = committed_ids[sent.base_len : sent.base_len + len(sent.token_ids)] if sent.base_len >= 0 else []
    return tuple(since) == sent.token_ids


@dataclass(slots=True, eq=False)
class Member:
    """A drafter's membership.

    known_len   how many of the committed tokens it holds or was sent
    reads_rows  its draft model reads context rows
    rows_len    then: how many positions, from 0, it holds the rows of or was sent them
    """

    member_id: int
    drafter_id: str
    block_size: int
    known_len: int
    reads_rows: bool = False
    rows_len: int = 0


@dataclass(slots=True, eq=False)
class Wait:
    """Whether a step may wait for this turn's drafter.

    A block that does not come in time is waited for once; then the turn goes on without, until one arrives again.

    patient         a wait is allowed
    join_expected   a drafter was invited and has not joined yet; its join is awaited like a block, once a turn
    deadline_us     end of the wait in progress, None if there is none
    skipped         a step went ahead without this session since its last commit
    passed          the drafter has said that it has nothing for this round
    """

    join_expected: bool
    patient: bool = True
    deadline_us: int | None = None
    skipped: bool = False
    passed: bool = False

    def renew(self) -> None:
        """A block has arrived, or the drafter has changed: waiting may pay again."""
        self.patient, self.deadline_us, self.skipped = True, None, False

    def give_up(self) -> None:
        self.patient, self.join_expected, self.deadline_us = False, False, None


@dataclass(slots=True, eq=False)
class Turn:
    """A turn under way.

    command         what was asked
    opened_len      committed tokens when it opened: its prompt, replayed output included
    end_len         the committed length at which it must end: max_tokens or the context limit
    cached_count    prompt tokens whose state was there when their reading began
    age             ordinal of admission: the youngest is preempted first
    chooser         chooses its tokens; None for greedy decoding without filters and grammar: the best logit is the token
    reading         its state is still to be built (prompt, or again after preemption): no draft is checked meanwhile
    reading_begun   a row of it was read since it was opened or preempted
    round_count     rounds so far; the number of the next one
    rested_us       when its last step ended
    block           the drafted block at hand; it fits the committed tokens
    dropped_count   blocks of no use since the last round
    """

    command: StartTurn
    opened_len: int
    end_len: int
    cached_count: int
    age: int
    chooser: Chooser | None
    wait: Wait
    rested_us: int
    reading: bool = True
    reading_begun: bool = False
    round_count: int = 0
    block: Block | None = None
    dropped_count: int = 0

    def draft_budget(self, policy_budget: int, base_len: int) -> int:
        """How many draft tokens this turn can use at base_len: what was asked for or the policy wants, up to its end."""
        asked = self.command.speculation.fixed_depth
        wanted = policy_budget if asked is None else asked
        left = self.end_len - base_len - 1
        return wanted if wanted < left else left


@dataclass(slots=True, eq=False)
class Sequence:
    """A session. See the module's docstring.

    salt        whose tokens they are, from its first turn; state is shared only between equal salts
    token_ids   committed tokens; a token's position is its index here
    chain       their chain hash, as far as it was ever asked for
    state_len   positions the model remembers, from 0; below len(token_ids): the anchor's own state does not exist
    requested   a turn that waits to be opened
    turn        the turn under way; it may itself wait for room after a preemption
    """

    session_id: str
    sequence_id: int
    salt: bytes = b""
    token_ids: list[int] = field(default_factory=list)
    chain: ChainHash = field(default_factory=ChainHash)
    state_len: int = 0
    requested: StartTurn | None = None
    turn: Turn | None = None
    member: Member | None = None

    @property
    def base_len(self) -> int:
        return len(self.token_ids)

    @property
    def busy(self) -> bool:
        return self.turn is not None or self.requested is not None

    @property
    def pending_row_count(self) -> int:
        """Committed tokens that the model has not read: at least the anchor."""
        return len(self.token_ids) - self.state_len

    def has_prefix(self, length: int, prefix_hash: bytes) -> bool:
        """Whether the first `length` committed tokens are those of the hash."""
        if not 0 <= length <= len(self.token_ids):
            return False
        return length == 0 or self.chain.digest(self.token_ids, length) == prefix_hash

    def rewrite(self, keep_len: int, append_ids: Ordered[int]) -> None:
        """Cuts the tokens to the first `keep_len` and appends others."""
        del self.token_ids[keep_len:]
        self.chain.rewind(keep_len)
        self.token_ids.extend(append_ids)

    def check_integrity(self) -> None:
        turn = self.turn
        assert self.requested is None or turn is None, f"{self.session_id}: two turns at once"
        assert 0 <= self.state_len <= max(0, self.base_len - 1), f"{self.session_id}: remembers the anchor"
        if turn is None:
            return
        assert turn.opened_len <= self.base_len < turn.end_len, f"{self.session_id}: turn outlived its end"
        assert turn.reading or self.base_len > turn.opened_len, (
            f"{self.session_id}: decodes before its prompt was read"
        )
        assert turn.chooser is None or turn.chooser.length == self.base_len, (
            f"{self.session_id}: chooser out of step"
        )
        if turn.block is not None:
            assert self.member is not None and turn.block.base_len == self.base_len, (
                f"{self.session_id}: unfit block"
            )
            assert len(turn.block.token_ids) == len(turn.block.confidences) > 0
        if self.member is not None:
            self._check_member(self.member)

    def _check_member(self, member: Member) -> None:
        if not member.reads_rows:
            assert member.known_len == self.base_len, f"{self.session_id}: its member lacks tokens"
            return
        # Its tokens come with their rows, so no sooner than they are read, and no later.
        assert min(self.base_len, self.state_len) <= member.known_len <= self.base_len, (
            f"{self.session_id}: its member lacks tokens"
        )
        assert member.rows_len >= member.known_len - 1, f"{self.session_id}: its member lacks rows"
