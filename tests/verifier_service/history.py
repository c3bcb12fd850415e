"""Random lives of an engine: turns, rewinds, forks, cancels, shared beginnings, drafters good and bad, too little memory; and
what must hold throughout.

`History(seed).run()` plays one and checks, after every step, the engine's own counts and the world's view of it: the
caller of each turn and each drafter rebuild the session's tokens from their events alone.
"""

from __future__ import annotations

import random
from collections import Counter

from sparkrelay.outcomes import BlockState, FinishReason
from sparkrelay.protocol import chain_hash
from tests.verifier_service.history_views import (
    BLOCK_TOKENS,
    CONTEXT_LIMIT,
    SALTS,
    SAMPLINGS,
    SESSIONS,
    VOCAB,
    MemberView,
    TurnView,
    beginning,
    rows_of,
)
from tests.verifier_service.plain_decoder import decode
from verifier_service.depth_policies import parse_depth_policy
from verifier_service.engine import Engine, EngineSettings
from verifier_service.events import (
    AddMember,
    BlockArrived,
    BlockDropped,
    CancelTurn,
    Command,
    Committed,
    DrafterUnavailable,
    EndSession,
    ForkRefused,
    ForkSession,
    MemberAdded,
    MemberContext,
    MemberRemoved,
    MemberRewound,
    MemberTurnEnded,
    MemberTurnStarted,
    MemberVerdict,
    RemoveMember,
    SessionForked,
    SpeculationRequest,
    StartTurn,
    TurnAccepted,
    TurnOver,
    TurnRefused,
)
from verifier_service.models.toy import TOY_CONTEXT, SnapshotToyModel, ToyModel

POLICIES = ("auto", "fixed:7", "fixed:2", "off", "adaptive", "adaptive", "threshold:0.5", "algorithm1")


class History:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        kind = self.random.choice((ToyModel, SnapshotToyModel))
        self.context = self.random.choice((None, TOY_CONTEXT))
        self.model = kind(
            vocab_size=VOCAB, context_limit=CONTEXT_LIMIT, block_tokens=BLOCK_TOKENS, context=self.context
        )
        self.block_count = self.random.choice((10, 14, 40))
        self.engine = Engine(
            self.model,
            EngineSettings(
                block_count=self.block_count,
                step_token_budget=self.random.choice((16, 24, 64)),
                block_wait_us=self.random.choice((0, 500, 5000)),
                max_sessions=self.random.choice((3, 8)),
                max_queued_turns=self.random.choice((1, 4)),
                leftover_percent=self.random.choice((0, 25, 100)),
            ),
            parse_depth_policy(self.random.choice(POLICIES)),
        )
        self.context_limit = min(CONTEXT_LIMIT, self.block_count * BLOCK_TOKENS)
        self.now_us = 0
        self.ids: dict[str, list[int]] = {}  # session |-> committed tokens
        self.salts = dict(SALTS)
        self.turns: dict[str, TurnView] = {}  # turn |-> turns that are not over
        self.members: dict[int, MemberView] = {}
        self.in_flight: list[BlockArrived] = []
        self.counts: Counter[str] = Counter()
        self._numbers = iter(range(1, 1_000_000))

    def run(self, step_count: int = 60) -> Counter[str]:
        for _ in range(step_count):
            commands = [self._command() for _ in range(self.random.choice((0, 1, 1, 2, 3)))]
            if self.random.random() < 0.6:
                self._draft()
                commands.append(self._deliver())
            self._step([command for command in commands if command is not None])
            if self.random.random() < 0.01:
                self._end_session(self.random.choice(SESSIONS))
            self.now_us += self.random.choice((1, 100, 2000))
        self._run_dry()
        load = self.engine.load()
        self.counts["preempted"] += load.preempted_count
        self.counts["evicted"] += load.evicted_count
        self.counts["reused"] += load.reused_count
        self.counts["reused tokens"] += load.reused_token_count
        self.counts["left behind"] += load.leftover_block_count
        for session_id in SESSIONS:
            self._end_session(session_id)
        load = self.engine.load()
        assert (load.used_block_count, load.session_count, load.member_count) == (0, 0, 0), (
            "something was kept"
        )
        return self.counts

    def _run_dry(self) -> None:
        """No more commands: every turn comes to its end, and the engine says itself when it must be stepped."""
        for _ in range(2000):
            due_us = self._step([])
            if due_us is None:
                assert not self.turns, f"asleep with turns under way: {list(self.turns)}"
                return
            self.now_us = max(self.now_us + 1, due_us)
        raise AssertionError("the engine did not come to rest")

    # ---- what happens to the engine ---------------------------------------------------------------------------------

    def _end_session(self, session_id: str) -> None:
        self.counts["ended"] += session_id in self.ids
        self._step([EndSession(session_id)])
        self.ids.pop(session_id, None)

    def _command(self) -> Command | None:
        kinds = {
            self._start_turn: 5,
            self._fork: 1,
            self._draft: 6,
            self._deliver: 6,
            self._join: 4,
            self._leave: 1,
            self._cancel: 1,
            self._unavailable: 1,
        }
        make = self.random.choices(list(kinds), list(kinds.values()))[0]
        return make()

    def _start_turn(self) -> StartTurn:
        rng, session_id = self.random, self.random.choice(SESSIONS)
        ids = self.ids.get(session_id, [])
        keep_len = rng.choice((0, len(ids), len(ids), rng.randint(0, len(ids))))
        append = tuple(beginning(rng, self.ids.values()) if keep_len == 0 and rng.random() < 0.6 else ())
        append += tuple(rng.randrange(1, VOCAB) for _ in range(rng.choice((0, 1, 3, 9, 20))))
        length = keep_len + len(append)
        keep_hash = chain_hash(ids[:keep_len]) if rng.random() < 0.95 else b"some other hash!"
        return StartTurn(
            session_id=session_id,
            turn_id=f"turn-{next(self._numbers)}",
            keep_len=keep_len,
            keep_hash=keep_hash,
            append_ids=append,
            output_start=max(0, length - rng.choice((0, 0, 0, 2))),
            sampling=rng.choice(SAMPLINGS),
            max_tokens=rng.choice((1, 5, 20, 40)),
            stop_ids=rng.choice((frozenset(), frozenset({0, 5}))),
            speculation=SpeculationRequest(rng.choice((None, None, 0, 3, 15))),
            expect_drafter=rng.random() < 0.5,
            logprob_count=rng.choice((None, None, 2)),
            tenant_salt=self.salts[session_id] if rng.random() < 0.98 else b"an intruder's",
        )

    def _fork(self) -> ForkSession:
        rng = self.random
        source, target = rng.choice(SESSIONS), rng.choice(SESSIONS)
        length = len(self.ids.get(source, []))
        return ForkSession(source, target, rng.choice((length, rng.randint(-1, length + 1))))

    def _join(self) -> AddMember:
        rng, session_id = self.random, self.random.choice(SESSIONS)
        ids = self.ids.get(session_id, [])
        held = rng.randint(0, len(ids))
        held_hash = chain_hash(ids[:held]) if rng.random() < 0.7 else b"0123456789abcdef"
        member_id = next(self._numbers)
        reads_rows = self.context is not None and rng.random() < 0.7
        rows = dict(rows_of(ids[:held])) if reads_rows else None
        self.members[member_id] = MemberView(session_id, ids=ids[:held], rows=rows)
        block_size = rng.choice((1, 4, 15))
        return AddMember(
            session_id, member_id, f"drafter-{member_id}", held, held_hash, block_size, reads_rows
        )

    def _draft(self) -> None:
        """A drafter that is up to date makes a block: right, half right, random, stale or hostile. It travels a while."""
        rng = self.random
        able = [(i, m) for i, m in self.members.items() if m.turn_id in self.turns and not m.awaited_len]
        if not able:
            return
        member_id, member = rng.choice(able)
        turn = self.turns[member.turn_id]
        done = len(turn.output)
        token_ids = turn.expected[done : done + rng.choice((1, 4, 8))]
        base_len = len(member.ids)
        kind = rng.choice(("right", "right", "half", "random", "stale", "hostile"))
        if kind == "half" and token_ids:
            token_ids = [*token_ids[:-1], rng.randrange(VOCAB)]
        elif kind == "random":
            token_ids = [rng.randrange(VOCAB) for _ in range(rng.choice((1, 7)))]
        elif kind == "stale":
            base_len = max(0, base_len - rng.choice((1, 3)))
        elif kind == "hostile":
            base_len = rng.choice((-5, 0, base_len + 1, 10**6))
        token_ids = token_ids or [1]
        confidences = tuple(rng.choice((0.9, 0.5, 1.0, 0.0, 7.0, -1.0, float("nan"))) for _ in token_ids)
        turn_id = rng.choice(("", member.turn_id))
        block = BlockArrived(member_id, base_len, tuple(token_ids), confidences, 10, 20, self.now_us, turn_id)
        member.blocks.append(block)
        self.in_flight.append(block)

    def _deliver(self) -> BlockArrived | None:
        if not self.in_flight:
            return None
        return self.in_flight.pop(self.random.choice((0, 0, 0, self.random.randrange(len(self.in_flight)))))

    def _leave(self) -> RemoveMember | None:
        if not self.members:
            return None
        member_id = self.random.choice(list(self.members))
        del self.members[member_id]
        return RemoveMember(member_id)

    def _cancel(self) -> CancelTurn | None:
        return CancelTurn(self.random.choice([*self.turns, "no such turn"]))

    def _unavailable(self) -> DrafterUnavailable | None:
        if not self.turns:
            return None
        turn_id = self.random.choice(list(self.turns))
        return DrafterUnavailable(self.turns[turn_id].command.session_id, turn_id)

    # ---- what it says ---------------------------------------------------------------------------------------------------

    def _step(self, commands: list[Command]) -> int | None:
        for command in commands:
            if isinstance(command, StartTurn) and command.turn_id not in self.turns:
                self.turns[command.turn_id] = TurnView(command, [])
        result = self.engine.step(commands, self.now_us)
        self.engine.check_integrity()
        for event in result.events:
            self._HANDLERS[type(event)](self, event)
        for member in self.members.values():
            if member.turn_id and not member.awaited_len:
                assert member.ids == self.ids[member.session_id], "a drafter was not told everything"
                self._check_rows(member)
        return result.next_due_us

    def _check_rows(self, member: MemberView) -> None:
        """A drafter that reads rows has those of a straight run: of all positions but the last, which may have one too."""
        if member.rows is None:
            return
        expected = rows_of(member.ids)
        last = len(member.ids) - 1
        assert {**expected, **member.rows} == expected, "a row is not the one of a straight run"
        assert expected.keys() - member.rows.keys() <= {last}, "a row is missing"
        self.counts["rows checked"] += 1

    def _accepted(self, event: TurnAccepted) -> None:
        turn = self.turns[event.turn_id]
        command = turn.command
        assert not turn.accepted and not turn.output
        before = self.ids.get(command.session_id, [])
        self.counts["rewound"] += 0 < command.keep_len < len(before)
        prompt = before[: command.keep_len] + list(command.append_ids)
        assert event.prompt_token_count == command.output_start
        assert 0 <= event.cached_token_count <= min(command.output_start, len(prompt) - 1)
        self.counts["cached"] += event.cached_token_count
        self.ids[command.session_id] = prompt
        turn.accepted = True
        turn.expected = decode(self.model, prompt, command, self.context_limit)

    def _forked(self, event: SessionForked) -> None:
        """A session of this id was not open: if it ever was, the engine has forgotten it."""
        ids = self.ids[event.session_id]
        assert 0 <= event.state_len < event.token_count <= len(ids)
        self.ids[event.new_session_id] = ids[: event.token_count]
        self.salts[event.new_session_id] = self.salts[event.session_id]
        self.counts["forked with state" if event.state_len else "forked without state"] += 1

    def _fork_refused(self, event: ForkRefused) -> None:
        assert event.message
        self.counts[f"fork refused {event.reason.name}"] += 1

    def _refused(self, event: TurnRefused) -> None:
        turn = self.turns.pop(event.turn_id)
        assert not turn.accepted and event.message
        self.counts[f"refused {event.reason.name}"] += 1

    def _committed(self, event: Committed) -> None:
        turn = self.turns[event.turn_id]
        ids = self.ids[turn.command.session_id]
        assert turn.accepted and event.start == len(ids) and event.token_ids
        ids.extend(event.token_ids)
        self.counts["extended"] += len(event.token_ids)
        turn.output.extend(event.token_ids)
        assert turn.output == turn.expected[: len(turn.output)], "not what the target alone would have said"
        assert len(event.logprobs) == (0 if turn.command.logprob_count is None else len(event.token_ids))
        assert [p.token_id for p in event.logprobs] == list(event.token_ids)[: len(event.logprobs)]
        done = event.round
        assert (done is None) == (len(turn.output) == len(event.token_ids)), (
            "only the prompt's token has no round"
        )
        if done is None:
            return
        assert done.number == turn.next_round and done.base_len == event.start
        turn.next_round += 1
        assert 0 <= done.accepted_count <= done.depth <= done.drafted_count
        assert done.depth == 0 or done.block_state in (BlockState.FRESH, BlockState.REBASED)
        fixed = turn.command.speculation.fixed_depth
        assert fixed is None or done.depth <= fixed
        self.counts["drafted"] += done.drafted_count
        self.counts["verified"] += done.depth
        self.counts["accepted"] += done.accepted_count
        self.counts["rejected"] += done.depth - done.accepted_count
        self.counts[done.block_state.name] += 1

    def _over(self, event: TurnOver) -> None:
        turn = self.turns.pop(event.turn_id)
        ids = self.ids[turn.command.session_id]
        assert turn.accepted
        assert event.session_token_count == len(ids)
        assert 0 <= event.cached_token_count <= min(turn.command.output_start, len(ids) - 1)
        assert event.output_token_count == len(ids) - turn.command.output_start
        if event.finish_reason != FinishReason.CANCELLED:
            assert turn.output == turn.expected, "the turn ended early"
            assert event.finish_reason == self._reason(turn)
        self.counts[f"over {event.finish_reason.name}"] += 1

    def _reason(self, turn: TurnView) -> FinishReason:
        if turn.output[-1] in turn.command.stop_ids:
            return FinishReason.STOP
        if len(self.ids[turn.command.session_id]) == turn.command.output_start + turn.command.max_tokens:
            return FinishReason.LENGTH
        return FinishReason.CONTEXT

    def _added(self, event: MemberAdded) -> None:
        member = self._member(event.member_id)
        if member is not None:
            assert not member.added and event.keep_tokens in (0, len(member.ids))
            self.counts["joined"] += 1
            member.added = True
            member.cut(event.keep_tokens)

    def _removed(self, event: MemberRemoved) -> None:
        self.members.pop(event.member_id, None)

    def _turn_started(self, event: MemberTurnStarted) -> None:
        member = self._member(event.member_id)
        if member is not None:
            assert member.added and not member.turn_id and event.base_len >= len(member.ids)
            member.turn_id = event.turn_id
            member.awaited_len = event.base_len if event.base_len > len(member.ids) else 0

    def _rewound(self, event: MemberRewound) -> None:
        member = self._member(event.member_id)
        if member is not None:
            assert not member.turn_id and event.length < len(member.ids)
            self.counts["drafter rewound"] += 1
            member.cut(event.length)

    def _context(self, event: MemberContext) -> None:
        member = self._member(event.member_id)
        if member is not None:
            assert event.start == len(member.ids) and event.token_ids
            member.ids.extend(event.token_ids)
            assert len(member.ids) <= member.awaited_len
            if event.rows is not None:
                assert event.start <= event.rows_start
                assert event.rows_start + len(event.rows) <= len(member.ids)
                self.counts["rows fed"] += len(event.rows)
                self.counts["fed in part"] += len(member.ids) < member.awaited_len
            member.take_rows(event.rows_start, event.rows)
            if len(member.ids) == member.awaited_len:
                member.awaited_len = 0
            else:
                assert member.rows is not None, "the ids alone come at one go"

    def _verdict(self, event: MemberVerdict) -> None:
        """The drafter knows the accepted tokens from the block that the verdict names."""
        member = self._member(event.handle)
        if member is None:
            return
        assert event.base_len == len(member.ids) and 0 <= event.accepted_count <= event.depth
        assert (event.block_base_len > 0) == (event.depth > 0)
        truth = self.ids[member.session_id][event.base_len :]
        if event.depth:
            offset = event.base_len - event.block_base_len
            named = [b.token_ids[offset:] for b in member.blocks if b.base_len == event.block_base_len]
            accepted = tuple(truth[: event.accepted_count])
            assert any(ids[: event.accepted_count] == accepted for ids in named), "no block that was sent"
        if member.rows is not None:
            assert len(event.rows) == event.accepted_count + 1
            self.counts["rows of verdicts"] += len(event.rows)
        member.take_rows(event.base_len - 1, event.rows)
        member.ids.extend(truth[: event.accepted_count])
        if event.next_token_id >= 0:
            member.ids.append(event.next_token_id)
        assert member.ids == self.ids[member.session_id]

    def _turn_ended(self, event: MemberTurnEnded) -> None:
        member = self._member(event.member_id)
        if member is not None:
            assert member.turn_id == event.turn_id
            member.turn_id = ""

    def _dropped(self, event: BlockDropped) -> None:
        self.counts["dropped stale" if event.stale else "dropped"] += 1

    def _member(self, member_id: int) -> MemberView | None:
        """None for one that left in this very step: it hears no more."""
        return self.members.get(member_id)

    _HANDLERS = {  # noqa: RUF012
        TurnAccepted: _accepted,
        TurnRefused: _refused,
        SessionForked: _forked,
        ForkRefused: _fork_refused,
        Committed: _committed,
        TurnOver: _over,
        MemberAdded: _added,
        MemberRemoved: _removed,
        MemberTurnStarted: _turn_started,
        MemberRewound: _rewound,
        MemberContext: _context,
        MemberVerdict: _verdict,
        MemberTurnEnded: _turn_ended,
        BlockDropped: _dropped,
    }
