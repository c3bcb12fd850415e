"""One session that a drafter and a verifier share: its phases as a table, and what is committed, in flight and still to come.

Both sides keep one `Membership` each and apply the same functions to the same frames, the verifier when it sends them, the
drafter when it receives them. So the two views are equal, the drafter's a little older.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from sparkrelay.frames import NO_TOKEN, Block, Context, Rewound, TurnEnded, TurnStarted, Verdict
from sparkrelay.protocol.tokens import match_block

TAIL_LIMIT = 1024  # committed ids that are kept to tell late blocks; far more than any block is long


class Phase(Enum):
    """Where a membership stands."""

    IDLE = "joined, no turn runs"
    RUNNING = "a turn runs"


# (phase, frame of the verifier) -> next phase. What is not here is against the rules.
TRANSITIONS: dict[tuple[Phase, type], Phase] = {
    (Phase.IDLE, Rewound): Phase.IDLE,
    (Phase.IDLE, TurnStarted): Phase.RUNNING,
    (Phase.RUNNING, Verdict): Phase.RUNNING,
    (Phase.RUNNING, TurnEnded): Phase.IDLE,
}


class Broken(Exception):
    """A frame does not fit the membership. Whose fault it is depends on the side: the caller knows."""


@dataclass(slots=True)
class Membership:
    """One side's view.

    length        committed tokens as far as this side has told (verifier) or heard (drafter)
    turn_id       the turn under way, or the last one
    turn_base     length when it started
    block         the block in flight, None if there is none
    last_base     base_len of the newest block of this turn, -1 before the first: they only grow
    tail          the newest ids committed in this turn, those from tail_start to length - 1
    owed          intervals [start, end) of ids that come as context, oldest first
    fence         blocks are of an earlier turn until the peer has answered the ping of this sequence (verifier's side)
    """

    handle: int
    session_id: str
    length: int
    phase: Phase = Phase.IDLE
    turn_id: str = ""
    turn_base: int = 0
    block: Block | None = None
    last_base: int = -1
    tail: list[int] = field(default_factory=list)
    tail_start: int = 0
    owed: deque[tuple[int, int]] = field(default_factory=deque)
    fence: int = 0

    def step(self, frame: type) -> None:
        """Takes the transition of the table, or says why there is none."""
        following = TRANSITIONS.get((self.phase, frame))
        if following is None:
            raise Broken(f"{frame.__name__} is not allowed: {self.phase.value}")
        self.phase = following

    def rewind(self, frame: Rewound) -> None:
        self.step(Rewound)
        if frame.length < 0:
            raise Broken(f"Rewound to {frame.length} tokens")
        if self.owed:
            raise Broken("Rewound while context is on its way")
        self.length = min(self.length, frame.length)

    def start_turn(self, frame: TurnStarted) -> None:
        self.step(TurnStarted)
        if frame.base_len < max(self.length, 1):
            raise Broken(
                f"TurnStarted with base_len {frame.base_len}: {self.length} tokens are committed, and a turn has at least 1"
            )
        if frame.base_len > self.length:
            self.owed.append((self.length, frame.base_len))
        self.length = self.turn_base = self.tail_start = frame.base_len
        self.turn_id, self.block, self.last_base = frame.turn_id, None, -1
        self.tail.clear()

    def end_turn(self) -> None:
        self.step(TurnEnded)
        self.block = None

    def take_context(self, frame: Context) -> None:
        """Pays what is owed, in order and without gaps."""
        if not self.owed:
            raise Broken(f"Context from {frame.start}: nothing is owed")
        start, end = self.owed[0]
        until = frame.start + len(frame.token_ids)
        if frame.start != start or not start < until <= end:
            raise Broken(f"Context of ids {frame.start} to {until - 1}: {start} to {end - 1} are owed")
        if until == end:
            self.owed.popleft()
        else:
            self.owed[0] = (until, end)

    def commit(self, verdict: Verdict) -> tuple[int, ...]:
        """The ids that the verdict commits. Ends the flight of a block that it names, contradicts or spends."""
        if self.phase is not Phase.RUNNING:
            self.step(Verdict)
        length = self.length
        if verdict.base_len != length:
            raise Broken(f"verdict with base_len {verdict.base_len}: {length} tokens are committed")
        accepted, token = verdict.accepted_count, verdict.next_token_id
        block, named = self.block, verdict.block_base_len
        if named == 0 and accepted:
            raise Broken(f"verdict accepts {accepted} tokens of no block")
        if accepted > verdict.depth or accepted < 0 or (token < 0 and (token != NO_TOKEN or not accepted)):
            raise Broken(f"verdict accepts {accepted} of {verdict.depth} tokens and adds token {token}")
        ids: tuple[int, ...] = (token,) if token >= 0 else ()
        if named:
            if block is None or block.base_len != named:
                raise Broken(f"verdict names a block of base_len {named}: none is in flight")
            offset = length - named
            if offset < 0 or offset + verdict.depth > len(block.token_ids):
                raise Broken(
                    f"verdict checks {verdict.depth} tokens from offset {offset} of a block of {len(block.token_ids)}"
                )
            if accepted:
                ids = block.token_ids[offset : offset + accepted] + ids
            self.block = None
        elif block is not None:
            offset = length - block.base_len
            if offset + 1 >= len(block.token_ids) or block.token_ids[offset] != token:
                self.block = None  # spent, or contradicted
        self.length = length + len(ids)
        tail = self.tail
        tail += ids
        if len(tail) > TAIL_LIMIT:
            del tail[: TAIL_LIMIT // 2]
            self.tail_start += TAIL_LIMIT // 2
        return ids

    def put_in_flight(self, block: Block) -> bool:
        """A block is sent (drafter) or has come (verifier). False: what was committed since its base_len
        contradicts or spends it."""
        base = block.base_len
        if self.phase is not Phase.RUNNING:
            raise Broken("block without a turn")
        if self.block is not None:
            raise Broken(
                f"block of base_len {base} while the one of base_len {self.block.base_len} is in flight"
            )
        if base <= self.last_base:
            raise Broken(f"block of base_len {base} after the one of base_len {self.last_base}")
        if not self.turn_base <= base <= self.length:
            raise Broken(
                f"block of base_len {base}: the turn began at {self.turn_base} and {self.length} tokens are committed"
            )
        self.last_base = base
        if base != self.length and match_block(base - self.tail_start, block.token_ids, self.tail) is None:
            return False
        self.block = block
        return True
