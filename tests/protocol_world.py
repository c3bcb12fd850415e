"""A small world in which two drafters and a verifier talk through the product's own state machines over queues of random delay.

The verifier's half is a dumb engine: it commits target tokens one round at a time, with or without a block. The
drafter's half keeps
plain lists of ids. Every frame of the verifier carries, outside of the protocol, what the verifier's ids were when
it was sent, so that
the drafter's list can be compared with the truth of that moment.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from random import Random
from typing import Any

from sparkrelay.frames import (
    Block,
    Blocks,
    Context,
    Fingerprint,
    Hello,
    Invite,
    Join,
    Joined,
    Leave,
    Left,
    Ping,
    Pong,
    Rewound,
    TurnEnded,
    TurnStarted,
    Verdict,
    Verdicts,
    Welcome,
)
from sparkrelay.outcomes import FinishReason, Reason
from sparkrelay.protocol import (
    AnswerPong,
    BlocksAccepted,
    ContextArrived,
    DrafterSide,
    EndMembership,
    Greeted,
    Invited,
    JoinAsked,
    JoinRefused,
    MemberJoined,
    MemberLeft,
    MembershipOver,
    RefuseJoin,
    RemoteProtocolError,
    SessionRewound,
    VerdictsArrived,
    VerifierSide,
    chain_hash,
    match_block,
)
from sparkrelay.sampling import Sampling

VOCAB = 3  # so few that wrong blocks are right now and then
BLOCK = 4


@dataclass
class Session:
    ids: list[int] = field(default_factory=list)
    turn: int = 0  # number of the turn under way, 0 for none
    member: tuple[Link, int] | None = None  # link and handle
    known: int = 0  # ids that the member was told of
    block: tuple[Block, int] | None = None  # what the engine holds, and the turn it was drafted in


class Link:
    """One pair of streams: three queues, a side at each end, and what the drafter holds."""

    def __init__(self, name: str, invites: dict[str, bytes], hostile: bool) -> None:
        self.name = name
        self.hostile = hostile
        self.verifier = VerifierSide(Fingerprint(block_size=15), invites=invites)
        self.drafter = DrafterSide()
        self.to_drafter: deque[tuple[Any, Any]] = deque()
        self.to_verifier: deque[tuple[Any, Any]] = deque()
        self.feed: deque[tuple[Any, Any]] = deque()
        self.feed_open: Counter[int] = Counter()  # handle -> context frames that have not arrived
        self.ids: dict[int, list[int]] = {}  # handle -> what the drafter holds
        self.offered: dict[str, list[int]] = {}  # session -> ids of the join that is not answered yet
        self.turn_at: dict[int, int] = {}  # handle -> turn, as the drafter knows it
        self.pings = 0


class World:
    def __init__(self, seed: int, *, hostile: bool = False) -> None:
        self.random = Random(seed)
        self.counts: Counter[str] = Counter()
        self.sessions = {f"s{index}": Session() for index in range(3)}
        self.invites: dict[str, dict[str, bytes]] = {"a": {}, "b": {}}
        self.kept: dict[str, dict[str, list[int]]] = {
            "a": {},
            "b": {},
        }  # drafter -> session -> ids from before
        self.links = {name: self.dial(name, hostile and name == "b") for name in self.invites}
        self.handle = 0
        self.turns = 0

    def dial(self, name: str, hostile: bool) -> Link:
        link = Link(name, self.invites[name], hostile)
        self.tell_verifier(link, Hello(1, 1, name, "run", Fingerprint(block_size=BLOCK)))
        return link

    # ---- saying --------------------------------------------------------------------------------------------

    def tell_drafter(self, link: Link, frame: Any, truth: Any = None) -> None:
        link.verifier.send(frame)
        (link.feed if isinstance(frame, Context) else link.to_drafter).append((frame, truth))

    def tell_verifier(self, link: Link, frame: Any, truth: Any = None) -> None:
        link.drafter.send(frame)
        link.to_verifier.append((frame, truth))

    # ---- the verifier hears --------------------------------------------------------------------------------

    def verifier_hears(self, link: Link) -> None:
        frame, turn = link.to_verifier.popleft()
        for decision in link.verifier.receive(frame):
            self.counts[type(decision).__name__] += 1
            match decision:
                case Greeted():
                    self.tell_drafter(link, Welcome(1, "v", "e", b"stream", 100, 15, 1 << 22))
                case JoinAsked(join):
                    self.join(link, join)
                case RefuseJoin(session_id, reason, message):
                    self.tell_drafter(link, Left(0, session_id, reason, message))
                case BlocksAccepted(entries):
                    for block in entries:
                        self.take_block(link, block, turn)
                case MemberLeft(handle=handle):
                    self.forget(link, handle)
                case EndMembership(handle=handle):
                    assert link.hostile, f"an honest drafter was thrown out: {decision}"
                    self.tell_drafter(link, Left(handle, "", decision.reason, decision.message))
                    self.forget(link, handle)
                case AnswerPong(sequence):
                    self.tell_drafter(link, Pong(sequence))

    def join(self, link: Link, join: Join) -> None:
        session = self.sessions[join.session_id]
        if session.member is not None:
            old, handle = session.member
            if old.verifier.member(handle) is not None:
                self.tell_drafter(old, Left(handle, "", Reason.SUPERSEDED))
            self.forget(old, handle)
        fits = chain_hash(session.ids[: join.tokens_held]) == join.held_hash and join.tokens_held <= len(
            session.ids
        )
        keep = join.tokens_held if fits else 0
        self.handle += 1
        session.member, session.known = (link, self.handle), keep
        self.counts["kept"] += keep > 0
        self.tell_drafter(link, Joined(join.session_id, self.handle, keep))
        if session.turn:
            self.introduce(session)

    def take_block(self, link: Link, block: Block, turn: int | None) -> None:
        session = next((each for each in self.sessions.values() if each.member == (link, block.handle)), None)
        assert session is not None, "a block of no membership was accepted"
        if not link.hostile:
            assert turn == session.turn, "a block of another turn was accepted"
        if match_block(block.base_len, block.token_ids, session.ids) is not None:
            session.block = (block, session.turn)

    def forget(self, link: Link, handle: int) -> None:
        for session in self.sessions.values():
            if session.member == (link, handle):
                session.member = session.block = None

    # ---- the engine ----------------------------------------------------------------------------------------

    def target(self, session: Session) -> int:
        return hash((session.turn, len(session.ids), tuple(session.ids[-2:]))) % VOCAB

    def start_turn(self, session: Session) -> None:
        keep = self.random.choice([len(session.ids), self.random.randint(0, len(session.ids))])
        self.turns += 1
        session.turn = self.turns
        del session.ids[keep:]
        grow = self.random.randint(0 if keep else 1, 6)
        session.ids += [self.random.randrange(VOCAB) for _ in range(grow)]
        if session.member is not None and session.known > keep:
            link, handle = session.member
            session.known = keep
            member = link.verifier.member(handle)
            if member is not None and (member.owed or link.feed_open[handle]):
                # The rule of the verifier: never Rewound while context is on its way.
                self.tell_drafter(link, Left(handle, "", Reason.SLOW))
                self.forget(link, handle)
                self.counts["ended for context"] += 1
            else:
                self.counts["rewound"] += 1
                self.tell_drafter(link, Rewound(handle, keep))
        self.introduce(session)

    def introduce(self, session: Session) -> None:
        if session.member is None:
            return
        link, handle = session.member
        base_len = len(session.ids)
        turn = TurnStarted(handle, str(session.turn), base_len, Sampling(), 1, 99, base_len, (), BLOCK)
        self.tell_drafter(link, turn, session.turn)
        for start in range(session.known, base_len, 2):
            ids = tuple(session.ids[start : min(start + 2, base_len)])
            self.tell_drafter(link, Context(handle, start, ids))
            link.feed_open[handle] += 1
        session.known = base_len

    def commit(self, session: Session) -> None:
        """One round: uses the block if it fits and the coin says so."""
        base_len, draft, named = len(session.ids), (), 0
        if session.block is not None:
            block, turn = session.block
            offset = match_block(block.base_len, block.token_ids, session.ids)
            if offset is None or turn != session.turn:
                session.block = None
            elif self.random.random() < 0.7:
                left = block.token_ids[offset:]
                draft, named = left[: self.random.randint(1, len(left))], block.base_len
                session.block = None
                self.counts["used" if offset == 0 else "rebased"] += 1
        accepted = 0
        for token in draft:
            if token != self.target(session):
                break
            session.ids.append(token)
            accepted += 1
        token = self.target(session)
        session.ids.append(token)
        self.counts["accepted"] += accepted
        if session.member is not None:
            link, handle = session.member
            verdict = Verdict(handle, 0, base_len, named, len(draft), accepted, token, BLOCK)
            self.tell_drafter(link, Verdicts((verdict,)), {handle: tuple(session.ids)})
            session.known = len(session.ids)

    def end_turn(self, session: Session) -> None:
        turn, session.turn, session.block = session.turn, 0, None
        if session.member is not None:
            link, handle = session.member
            self.tell_drafter(link, TurnEnded(handle, str(turn), FinishReason.LENGTH))
            if self.random.random() < 0.8:  # else the regular ping has to do
                self.ping(link)

    def ping(self, link: Link) -> None:
        link.pings += 1
        self.tell_drafter(link, Ping(link.pings))

    def invite(self, session_id: str, link: Link) -> None:
        self.tell_drafter(link, Invite(session_id, bytes([self.random.randrange(256)])))

    # ---- the drafter hears ---------------------------------------------------------------------------------

    def drafter_hears(self, link: Link, queue: deque[tuple[Any, Any]]) -> None:
        frame, truth = queue.popleft()
        if isinstance(frame, Context):
            link.feed_open[frame.handle] -= 1
        if isinstance(frame, TurnStarted):
            link.turn_at[frame.handle] = truth
        for decision in link.drafter.receive(frame):
            self.counts[type(decision).__name__] += 1
            self.drafter_obeys(link, decision, truth)

    def drafter_obeys(self, link: Link, decision: Any, truth: Any) -> None:
        match decision:
            case Invited(invite):
                held = self.kept[link.name].get(invite.session_id, [])
                if invite.session_id not in link.offered:
                    link.offered[invite.session_id] = held
                    join = Join(invite.session_id, invite.token, len(held), chain_hash(held))
                    self.tell_verifier(link, join)
            case MemberJoined(joined):
                link.ids[joined.handle] = link.offered.pop(joined.session_id)[: joined.keep_tokens]
            case JoinRefused(left):
                link.offered.pop(left.session_id, None)
            case SessionRewound(rewound):
                del link.ids[rewound.handle][rewound.length :]
            case ContextArrived(context):
                self.fill(link, context.handle, context.start, context.token_ids)
            case VerdictsArrived(entries):
                for verdict, ids in entries:
                    self.fill(link, verdict.handle, verdict.base_len, ids)
                    self.compare(link, verdict.handle, truth[verdict.handle])
            case MembershipOver(left, session_id):
                self.keep(link, left.handle, session_id)
            case EndMembership():
                raise AssertionError(f"an honest verifier was left: {decision}")
            case AnswerPong(sequence):
                self.tell_verifier(link, Pong(sequence))

    def liar_hears(self, link: Link, queue: deque[tuple[Any, Any]]) -> None:
        """Who says what its own side knows nothing of gets answers that it cannot make sense of: it dials again."""
        try:
            self.drafter_hears(link, queue)
        except (AssertionError, KeyError, RemoteProtocolError):
            self.lose(link)

    def fill(self, link: Link, handle: int, start: int, ids: tuple[int, ...]) -> None:
        """Writes ids by position; -1 marks what context still has to bring."""
        held = link.ids[handle]
        held += [-1] * (start + len(ids) - len(held))
        assert all(token == -1 for token in held[start : start + len(ids)]), "ids were told twice"
        held[start : start + len(ids)] = ids

    def compare(self, link: Link, handle: int, truth: tuple[int, ...]) -> None:
        held = link.ids[handle]
        assert len(held) == len(truth), "the drafter's count is not the verifier's of that moment"
        assert all(mine in (-1, theirs) for mine, theirs in zip(held, truth, strict=True)), "other ids"
        member = link.drafter.member(handle)
        assert member is not None and bool(member.owed) == (-1 in held)

    def keep(self, link: Link, handle: int, session_id: str) -> None:
        held = link.ids.pop(handle, [])
        self.kept[link.name][session_id] = held[: held.index(-1)] if -1 in held else held

    def draft(self, link: Link, handle: int) -> None:
        held = link.ids[handle]
        session_id = link.drafter.member(handle).session_id  # type: ignore[union-attr]
        guess = Session(list(held), turn=link.turn_at[handle])
        tokens = []
        for _ in range(self.random.randint(1, BLOCK)):
            right = self.target(guess)
            token = right if self.random.random() < 0.8 else self.random.randrange(VOCAB)
            tokens.append(token)
            guess.ids.append(token)
        assert session_id in self.sessions
        block = Block(handle, 0, len(held), tuple(tokens), bytes(len(tokens)))
        self.tell_verifier(link, Blocks((block,)), link.turn_at[handle])

    def lie(self, link: Link) -> None:
        """Says something that the rules forbid, past our own checks."""
        handle = self.random.randint(-1, self.handle + 2)
        ids = tuple(self.random.randrange(VOCAB) for _ in range(self.random.choice([0, 1, 3, 16])))
        block = Block(
            handle,
            0,
            self.random.randint(-1, 30),
            ids,
            bytes(len(ids)),
            assumed_count=self.random.choice([0, 0, 1]),
        )
        frame = self.random.choice(
            [
                Blocks((block, block)),
                Blocks((block,)),
                Join("s0", b"guess"),
                Join("nowhere", b""),
                Leave(handle, Reason.UNSPECIFIED),
                Pong(self.random.randint(-5, 2**40)),
            ]
        )
        link.to_verifier.append((frame, None))

    # ---- fate ----------------------------------------------------------------------------------------------

    def lose(self, link: Link) -> None:
        """The streams break: what was under way is gone."""
        for handle in link.verifier.handles:
            self.forget(link, handle)
        for handle in [handle for handle in link.drafter.handles if handle in link.ids]:
            self.keep(link, handle, link.drafter.member(handle).session_id)  # type: ignore[union-attr]
        self.links[link.name] = self.dial(link.name, link.hostile)
        self.counts["lost"] += 1

    def step(self) -> None:
        random = self.random
        session_id = random.choice(list(self.sessions))
        session, link = self.sessions[session_id], random.choice(list(self.links.values()))
        choice = random.random()
        if choice < 0.55:
            self.deliver_one(link)
        elif choice < 0.75:
            if session.turn:
                self.commit(session)
            else:
                self.start_turn(session)
        elif choice < 0.80:
            if session.turn:
                self.end_turn(session)
        elif choice < 0.83:
            if link.verifier.state.name == "OPEN":
                self.invite(session_id, link)
        elif choice < 0.835:
            self.lose(link)
        elif choice < 0.85:
            if link.verifier.state.name == "OPEN":
                self.ping(link)
        elif choice < 0.88 and link.hostile:
            self.lie(link)
        else:
            self.draft_something(link)

    def draft_something(self, link: Link) -> None:
        ready = [handle for handle in link.drafter.handles if link.drafter.may_draft(handle)]
        if ready:
            self.draft(link, self.random.choice(ready))

    def deliver_one(self, link: Link) -> None:
        queue = self.random.choice([link.to_drafter, link.to_verifier, link.feed])
        if not queue:
            return
        if queue is link.to_verifier:
            self.verifier_hears(link)
        elif not link.hostile:
            self.drafter_hears(link, queue)
        else:
            self.liar_hears(link, queue)

    def settle(self) -> None:
        """Everything that is under way arrives."""
        while any(link.to_drafter or link.to_verifier or link.feed for link in self.links.values()):
            for link in list(self.links.values()):
                self.deliver_one(link)

    def check_settled(self) -> None:
        for session in self.sessions.values():
            if session.member is None or session.member[0].hostile:
                continue
            link, handle = session.member
            held = link.ids[handle]
            assert held == session.ids[: len(held)], "other ids after everything has arrived"
            assert len(held) == session.known, "ids are missing after everything has arrived"
