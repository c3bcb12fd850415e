"""A verifier without a network: the protocol's own verifier side, a target that is a formula, and two queues to a drafter."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from drafter_service.models import DraftedBlock, DraftRequest
from sparkrelay.frames import (
    Context,
    DrafterFrame,
    Fingerprint,
    Invite,
    Join,
    Joined,
    Left,
    Ping,
    Pong,
    Rewound,
    TurnEnded,
    TurnStarted,
    Verdict,
    Verdicts,
    VerifierFrame,
    Welcome,
)
from sparkrelay.outcomes import FinishReason
from sparkrelay.protocol import (
    AnswerPong,
    BlocksAccepted,
    EndMembership,
    Greeted,
    JoinAsked,
    MemberLeft,
    RefuseJoin,
    VerifierSide,
    chain_hash,
)
from sparkrelay.sampling import Sampling

VOCAB = 8


def next_token(ids: Sequence[int]) -> int:
    """The target: a formula of the last two ids, with loops that a drafter can find and jumps that it cannot."""
    last, before = ids[-1], ids[-2] if len(ids) > 1 else 0
    return (last * 3 + before + 1) % VOCAB if len(ids) % 11 else len(ids) % VOCAB


class FormulaModel:
    """Drafts what the fake target will choose, but for every fifth position."""

    fingerprint = Fingerprint(block_size=4, proposal_kind="formula")
    vocab_size = VOCAB

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.forgotten: list[int] = []

    def draft(self, requests: Sequence[DraftRequest]) -> list[DraftedBlock | None]:
        self.calls.append(len(requests))
        return [self._one(request) for request in requests]

    def _one(self, request: DraftRequest) -> DraftedBlock | None:
        ids = list(request.ids)
        for _ in range(request.token_limit):
            ids.append(next_token(ids) if len(ids) % 5 else 0)
        drafted = ids[len(request.ids) :]
        return DraftedBlock(drafted, [0.5] * len(drafted))

    def forget(self, session_key: int) -> None:
        self.forgotten.append(session_key)


@dataclass
class FakeSession:
    ids: list[int] = field(default_factory=list)
    handle: int = 0
    turn: str = ""
    end_len: int = 0


class FakeVerifier:
    """What it wants to say stands in `speculate` and `feed`, in order; what it heard is counted in `seen`."""

    def __init__(self, fingerprint: Fingerprint | None = None) -> None:
        self.side = VerifierSide(fingerprint or Fingerprint(vocab_size=VOCAB, block_size=15))
        self.speculate: deque[VerifierFrame] = deque()
        self.feed: deque[Context] = deque()
        self.sessions: dict[str, FakeSession] = {}
        self.seen: Counter[str] = Counter()
        self.faults: list[str] = []
        self._last_handle = 0
        self._turns = 0
        self._pings = 0

    def by_handle(self, handle: int) -> FakeSession | None:
        return next((s for s in self.sessions.values() if s.handle == handle and handle), None)

    # ---- what it hears -----------------------------------------------------------------------------------------------------

    def hear(self, frames: Iterable[DrafterFrame]) -> None:
        for frame in frames:
            for decision in self.side.receive(frame):
                match decision:
                    case Greeted():
                        self._say(Welcome(1, "fake", "epoch", b"stream", 64, 15, 2**22))
                    case JoinAsked(join):
                        self._join(join)
                    case AnswerPong(sequence):
                        self._say(Pong(sequence))
                    case BlocksAccepted(entries):
                        self.seen["blocks"] += len(entries)
                    case MemberLeft(handle, session_id):
                        self.seen["left"] += 1
                        self._left(handle)
                    case EndMembership(handle, session_id, reason, message):
                        self.faults.append(message)
                        self._left(handle)
                        self._say(Left(handle, session_id, reason, message))
                    case RefuseJoin(session_id, reason, message):
                        self._say(Left(0, session_id, reason, message))

    def _join(self, join: Join) -> None:
        session = self.sessions[join.session_id]
        held = join.tokens_held
        keep = held if held <= len(session.ids) and chain_hash(session.ids[:held]) == join.held_hash else 0
        self.seen["kept"] += keep
        self._last_handle += 1
        session.handle = self._last_handle
        self._say(Joined(join.session_id, session.handle, keep))
        if session.turn:
            self._tell_turn(session, 4)

    def _left(self, handle: int) -> None:
        session = self.by_handle(handle)
        if session is not None:
            session.handle = 0

    # ---- what it does ------------------------------------------------------------------------------------------------------

    def invite(self, session_id: str) -> None:
        self.sessions.setdefault(session_id, FakeSession())
        self._say(Invite(session_id, b"token"))

    def start(
        self, session_id: str, keep_len: int, append: Sequence[int], remaining: int, budget: int = 4
    ) -> None:
        session = self.sessions[session_id]
        assert not session.turn
        if keep_len < len(session.ids):
            del session.ids[keep_len:]
            if session.handle:
                self._say(Rewound(session.handle, keep_len))
        session.ids += append
        self._turns += 1
        session.turn = f"turn {self._turns}"
        session.end_len = len(session.ids) + remaining
        if session.handle:
            self._tell_turn(session, budget)

    def _tell_turn(self, session: FakeSession, budget: int) -> None:
        member = self.side.member(session.handle)
        assert member is not None
        start, base_len = member.length, len(session.ids)
        self._say(
            TurnStarted(
                session.handle,
                session.turn,
                base_len,
                Sampling(),
                1,
                session.end_len - base_len,
                base_len,
                (),
                budget,
            )
        )
        for begin in range(start, base_len, 3):
            context = Context(session.handle, begin, tuple(session.ids[begin : min(begin + 3, base_len)]))
            self.side.send(context)
            self.feed.append(context)

    def commit(self, session_ids: Iterable[str], *, use_blocks: bool = True, budget: int = 4) -> None:
        """One round of each: plain, or with the block that is in flight."""
        entries = []
        for session_id in session_ids:
            session = self.sessions[session_id]
            entries.append(self._round(session, use_blocks, budget))
        told = [entry for entry in entries if entry is not None]
        if told:
            self._say(Verdicts(tuple(told)))

    def _round(self, session: FakeSession, use_blocks: bool, budget: int) -> Verdict | None:
        ids, base_len = session.ids, len(session.ids)
        member = self.side.member(session.handle)
        block = member.block if member is not None and use_blocks else None
        offset = base_len - block.base_len if block is not None else 0
        draft = block.token_ids[offset:] if block is not None else ()
        draft = draft[: session.end_len - base_len - 1]
        accepted = 0
        while accepted < len(draft) and next_token(ids) == draft[accepted]:
            ids.append(draft[accepted])
            accepted += 1
        token = next_token(ids)
        ids.append(token)
        self.seen["accepted"] += accepted
        self.seen["rejected"] += len(draft) - accepted
        self.seen["rebased"] += offset > 0
        if member is None:
            return None
        named = block.base_len if block is not None else 0
        return Verdict(session.handle, 0, base_len, named, len(draft), accepted, token, budget)

    def end(self, session_id: str) -> None:
        session = self.sessions[session_id]
        if session.handle:
            self._say(TurnEnded(session.handle, session.turn, FinishReason.STOP))
            self._pings += 1
            self._say(Ping(self._pings))
        session.turn = ""

    def _say(self, frame: VerifierFrame) -> None:
        self.side.send(frame)
        self.speculate.append(frame)
