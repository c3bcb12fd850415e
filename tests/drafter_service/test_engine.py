"""The drafter's engine and its sessions against the protocol's verifier side: frames in, frames out, no network."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.engine import DraftEngine
from drafter_service.events import (
    AllLeft,
    Command,
    ContextTaken,
    Event,
    FrameArrived,
    FramesToSend,
    LeaveAll,
    LinkBroken,
    LinkDraining,
    LinkLost,
    LinkOpened,
    LinkWelcomed,
    SessionGivenUp,
)
from drafter_service.kept_sessions import KeepLimits
from drafter_service.models import NOTHING, DraftedBlock, DraftModel, DraftRequest
from drafter_service.models.ngram import NgramModel
from sparkrelay.frames import (
    Blocks,
    Context,
    DrafterFrame,
    Drain,
    Hello,
    Invite,
    Joined,
    Leave,
    Left,
    Ping,
    Pong,
    TurnEnded,
    TurnStarted,
    Verdict,
    Verdicts,
    VerifierFrame,
    Welcome,
)
from sparkrelay.outcomes import FinishReason, Reason
from sparkrelay.sampling import Sampling
from tests.drafter_service.fake_verifier import VOCAB, FakeVerifier, FormulaModel


class Harness:
    """An engine and a fake verifier, and the test's hand on everything between them."""

    def __init__(self, model: DraftModel, limits: KeepLimits | None = None) -> None:
        self.engine = DraftEngine(model, Hello(1, 1, "drafter", "run", model.fingerprint), lambda: 0, limits)
        self.verifier = FakeVerifier()
        self.events: list[Event] = []
        self.link_id = 0
        self.open()

    def open(self) -> None:
        self.link_id += 1
        self.step(LinkOpened(self.link_id))
        self.deliver_all()

    def step(self, *commands: Command) -> list[DrafterFrame]:
        """One engine step; what it says reaches the verifier at once."""
        events = list(self.engine.step(commands, 0).events)
        self.events += events
        frames = [f for event in events if isinstance(event, FramesToSend) for f in event.frames]
        self.verifier.hear(frames)
        return frames

    def tell(self, *frames: VerifierFrame | Context) -> list[DrafterFrame]:
        return self.step(*[FrameArrived(self.link_id, frame, 0) for frame in frames])

    def deliver(self, speculate: int, feed: int) -> None:
        """Hands over so many frames of each stream in one step."""
        verifier = self.verifier
        frames: list[VerifierFrame | Context] = []
        frames += [verifier.feed.popleft() for _ in range(min(feed, len(verifier.feed)))]
        frames += [verifier.speculate.popleft() for _ in range(min(speculate, len(verifier.speculate)))]
        if frames:
            self.tell(*frames)

    def deliver_all(self) -> None:
        while self.verifier.speculate or self.verifier.feed:
            self.deliver(1000, 1000)

    def session_ids(self, session_id: str) -> list[int]:
        for link in self.engine._links.values():
            for member in link.members:
                if member.session_id == session_id:
                    return member.session.ids
        raise AssertionError(f"{session_id} has no member")

    def member(self, session_id: str) -> None:
        """Invites and joins."""
        self.verifier.invite(session_id)
        self.deliver_all()


def given_up(events: Sequence[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, SessionGivenUp)]


def test_a_time_of_hours_is_told_as_the_longest_that_a_frame_carries() -> None:
    world = Harness(FormulaModel())
    world.member("a")
    world.verifier.start("a", 0, [1, 2], 20)
    frames = [*world.verifier.feed, *world.verifier.speculate]
    told = world.engine.step([FrameArrived(world.link_id, frame, 0) for frame in frames], 2**40).events
    blocks = [f for e in told if isinstance(e, FramesToSend) for f in e.frames if isinstance(f, Blocks)]
    assert [block.queue_us for frame in blocks for block in frame.entries] == [2**31 - 1]


# ---- random histories ------------------------------------------------------------------------------


def play(seed: int, model: DraftModel, steps: int = 60) -> Harness:
    """A random history of three sessions: turns, rewinds, rounds, and frames of both streams delivered in any interleaving."""
    dice = random.Random(seed)
    world = Harness(model)
    verifier = world.verifier
    names = ["a", "b", "c"]
    for _ in range(steps):
        name = dice.choice(names)
        session = verifier.sessions.get(name)
        action = dice.random()
        if session is None:
            verifier.invite(name)
        elif not session.turn and action < 0.5:
            # The protocol forbids a rewind while context is on its way.
            settled = not any(context.handle == session.handle for context in verifier.feed)
            keep = dice.randint(0, len(session.ids)) if settled else len(session.ids)
            append = [dice.randrange(VOCAB) for _ in range(dice.randint(0 if keep else 1, 10))]
            verifier.start(name, keep, append, dice.randint(1, 12), dice.choice((0, 1, 4, 15)))
        elif session.turn and action < 0.6:
            if len(session.ids) >= session.end_len or action < 0.05:
                verifier.end(name)
            else:
                verifier.commit([name], use_blocks=dice.random() < 0.8, budget=dice.choice((0, 1, 4, 4, 4)))
        else:
            world.deliver(dice.randint(0, 3), dice.randint(0, 3))
    world.deliver_all()
    return world


@settings(max_examples=1000, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_in_any_interleaving_the_drafter_ends_with_the_committed_ids_and_breaks_no_rule(seed: int) -> None:
    world = play(seed, FormulaModel())
    assert world.verifier.faults == []
    assert given_up(world.events) == []
    for name, session in world.verifier.sessions.items():
        if session.handle:
            assert world.session_ids(name) == session.ids


def test_random_histories_accept_reject_and_rebase_blocks() -> None:
    seen = sum(
        (play(seed, FormulaModel(), 200).verifier.seen for seed in range(30)), start=FakeVerifier().seen
    )
    assert min(seen["blocks"], seen["accepted"], seen["rejected"], seen["rebased"]) > 50


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_prompt_lookup_follows_every_history_too(seed: int) -> None:
    world = play(seed, NgramModel(4, 1, 3), 120)
    assert world.verifier.faults == []
    assert given_up(world.events) == []


# ---- the rules, one by one ------------------------------------------------------------------------------


@pytest.fixture
def world() -> Harness:
    return Harness(FormulaModel())


def test_a_block_goes_out_as_soon_as_the_prompt_is_here_and_is_rebased_behind_the_first_token(
    world: Harness,
) -> None:
    world.member("s")
    world.verifier.start("s", 0, [1, 2, 3], 20)
    world.deliver(1000, 0)
    assert world.verifier.seen["blocks"] == 0
    world.deliver(0, 1000)
    assert world.verifier.seen["blocks"] == 1
    world.verifier.commit(["s"], use_blocks=False)  # the token that ends the prompt's reading
    world.deliver_all()
    assert world.verifier.seen["blocks"] == 1
    world.verifier.commit(["s"])
    assert world.verifier.seen["rebased"] == 1


def test_verdicts_that_overtake_the_prompt_wait_behind_it(world: Harness) -> None:
    world.member("s")
    world.verifier.start("s", 0, [1, 2, 3, 4, 5], 20)
    world.verifier.commit(["s"])
    world.verifier.commit(["s"])
    world.deliver(1000, 0)
    assert world.session_ids("s") == []
    world.deliver_all()
    assert world.session_ids("s") == world.verifier.sessions["s"].ids
    assert world.verifier.seen["blocks"] == 1


def test_a_drafter_whose_budget_is_zero_rests_until_a_verdict_asks_again(world: Harness) -> None:
    world.member("s")
    world.verifier.start("s", 0, [1], 20, budget=0)
    world.deliver_all()
    assert world.verifier.seen["blocks"] == 0
    world.verifier.commit(["s"], budget=2)
    world.deliver_all()
    assert world.verifier.seen["blocks"] == 1


def test_the_last_token_of_a_turn_is_not_drafted(world: Harness) -> None:
    world.member("s")
    world.verifier.start("s", 0, [1], 1)
    world.deliver_all()
    assert world.verifier.seen["blocks"] == 0


def test_all_sessions_that_want_a_block_are_drafted_in_one_call(world: Harness) -> None:
    model = world.engine._model
    assert isinstance(model, FormulaModel)
    for name in "abcd":
        world.member(name)
    for name in "abcd":
        world.verifier.start(name, 0, [1, 2], 20)
    world.deliver(1000, 1000)
    assert model.calls == [4]


def test_a_pong_comes_before_the_blocks_of_its_step(world: Harness) -> None:
    world.member("s")
    world.verifier.start("s", 0, [1, 2], 20)
    frames = world.tell(Ping(7), *world.verifier.speculate, *world.verifier.feed)
    assert [type(frame) for frame in frames] == [Pong, Blocks]


def test_a_session_that_comes_back_brings_the_ids_it_still_holds(world: Harness) -> None:
    world.member("s")
    world.verifier.start("s", 0, [1, 2, 3], 20)
    world.deliver_all()
    world.verifier.end("s")
    world.deliver_all()
    world.step(LinkLost(world.link_id))
    again = Harness.__new__(Harness)
    again.__dict__.update(world.__dict__)
    again.verifier = FakeVerifier()
    again.verifier.sessions["s"] = world.verifier.sessions["s"]
    again.open()
    again.member("s")
    assert again.verifier.seen["kept"] == 3
    assert again.session_ids("s") == [1, 2, 3]


def test_ids_that_are_not_the_verifiers_any_more_are_forgotten(world: Harness) -> None:
    world.member("s")
    world.verifier.start("s", 0, [1, 2, 3], 20)
    world.deliver_all()
    world.step(LinkLost(world.link_id))
    world.verifier = FakeVerifier()
    world.open()
    world.member("s")
    assert world.verifier.seen["kept"] == 0
    assert world.session_ids("s") == []


def test_sessions_kept_beyond_the_limit_are_forgotten_oldest_first() -> None:
    model = FormulaModel()
    world = Harness(model, KeepLimits(session_count=2))
    for name in "abc":
        world.member(name)
    world.step(LinkLost(world.link_id))
    assert model.forgotten == [1]


def test_an_ended_session_is_forgotten_and_a_superseded_one_is_kept(world: Harness) -> None:
    model = world.engine._model
    assert isinstance(model, FormulaModel)
    world.member("a")
    world.member("b")
    world.tell(Left(1, "a", Reason.SESSION_ENDED), Left(2, "b", Reason.SUPERSEDED))
    assert model.forgotten == [1]


def test_a_model_that_is_still_reading_is_asked_again_at_once() -> None:
    class SlowReader(FormulaModel):
        def _one(self, request: DraftRequest) -> DraftedBlock | None:
            return super()._one(request) if len(self.calls) >= 3 else None

    world = Harness(SlowReader())
    world.member("s")
    world.verifier.start("s", 0, [1, 2], 20)
    frames = [*world.verifier.speculate, *world.verifier.feed]
    result = world.engine.step([FrameArrived(world.link_id, frame, 0) for frame in frames], 5)
    assert result.next_due_us == 5
    assert world.engine.step([], 6).next_due_us == 6
    last = world.engine.step([], 7)
    assert last.next_due_us is None
    assert any(isinstance(event, FramesToSend) for event in last.events)


def test_a_model_with_nothing_to_say_is_asked_again_only_when_more_is_committed() -> None:
    class Mute(FormulaModel):
        def _one(self, request: DraftRequest) -> DraftedBlock | None:
            return NOTHING

    model = Mute()
    world = Harness(model)
    world.member("s")
    world.verifier.start("s", 0, [1, 2], 20)
    world.deliver_all()
    world.step()
    assert model.calls == [1]
    world.verifier.commit(["s"])
    world.deliver_all()
    assert model.calls == [1, 1]


def test_leaving_all_says_leave_for_each_session_and_declines_what_comes_then(world: Harness) -> None:
    world.member("a")
    world.member("b")
    frames = world.step(LeaveAll())
    assert frames == [Leave(1, Reason.DRAINING), Leave(2, Reason.DRAINING)]
    assert isinstance(world.events[-1], AllLeft)
    assert world.tell(Invite("c", b"token")) == [Leave(0, Reason.DRAFTER_DECLINED, "c")]


def test_context_frames_are_reported_when_the_engine_has_taken_them(world: Harness) -> None:
    world.member("s")
    world.verifier.start("s", 0, [1, 2, 3, 4], 20)
    world.deliver_all()
    assert ContextTaken(world.link_id, 2) in world.events


def test_welcome_and_drain_reach_the_link(world: Harness) -> None:
    assert any(isinstance(event, LinkWelcomed) for event in world.events)
    world.tell(Drain(500))
    assert LinkDraining(world.link_id, 500) in world.events


# ---- a verifier that breaks the rules ------------------------------------------------------------------------------


def turn(handle: int, **changes: object) -> TurnStarted:
    fields = {
        "handle": handle,
        "turn_id": "t",
        "base_len": 2,
        "sampling": Sampling(),
        "noise_version": 1,
        "remaining_count": 20,
        "output_start": 2,
        "stop_token_ids": (),
        "draft_budget": 4,
    }
    return TurnStarted(**(fields | changes))  # type: ignore[arg-type]


HOSTILE: dict[str, list[VerifierFrame | Context]] = {
    "an id outside of the vocabulary": [turn(1), Context(1, 0, (VOCAB, 1))],
    "a stop id outside of the vocabulary": [turn(1, stop_token_ids=(VOCAB,))],
    "a temperature that is no number": [turn(1, sampling=Sampling(temperature=float("nan")))],
    "a bias for an id that does not exist": [turn(1, sampling=Sampling(logit_bias=((VOCAB, 1.0),)))],
    "an output that begins after the end": [turn(1, output_start=3)],
    "a session without end": [turn(1, base_len=2**21)],
    "context with a hole": [turn(1), Context(1, 1, (1,))],
    "context beyond the turn": [turn(1), Context(1, 0, (1, 2, 3))],
    "a turn in a turn": [turn(1), turn(1, turn_id="u", base_len=3)],
    "a verdict without a turn": [Verdicts((Verdict(1, 0, 2, 0, 0, 0, 1, 4),))],
    "a verdict for another length": [turn(1), Verdicts((Verdict(1, 0, 9, 0, 0, 0, 1, 4),))],
    "acceptance of a block that was never sent": [turn(1), Verdicts((Verdict(1, 0, 2, 2, 4, 4, 1, 4),))],
    "a token outside of the vocabulary": [turn(1), Verdicts((Verdict(1, 0, 2, 0, 0, 0, VOCAB, 4),))],
    "the end of no turn": [TurnEnded(1, "t", FinishReason.STOP)],
}


@pytest.mark.parametrize("frames", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_verifier_that_breaks_the_rules_of_a_session_loses_that_one_alone(
    world: Harness, frames: list[VerifierFrame | Context]
) -> None:
    world.member("victim")
    world.member("other")
    said = world.tell(*frames)
    assert Leave(1, Reason.PROTOCOL_VIOLATION) in said
    assert len(given_up(world.events)) == 1
    world.verifier.start("other", 0, [1, 2], 20)
    world.deliver_all()
    assert world.verifier.seen["blocks"] == 1


@pytest.mark.parametrize(
    "frame", [Welcome(1, "v", "e", b"", 1, 1, 1), Joined("nobody", 1, 0)], ids=["second welcome", "no join"]
)
def test_a_verifier_that_breaks_the_stream_loses_the_link(world: Harness, frame: VerifierFrame) -> None:
    world.tell(frame)
    assert [event.reason for event in world.events if isinstance(event, LinkBroken)] == [
        Reason.PROTOCOL_VIOLATION
    ]
    assert world.tell(Ping(1)) == []


def test_a_keep_beyond_what_is_held_ends_the_membership(world: Harness) -> None:
    world.verifier.invite("s")
    world.tell(world.verifier.speculate.popleft())
    world.verifier.speculate.clear()
    said = world.tell(Joined("s", 1, 5))
    assert said == [Leave(1, Reason.PROTOCOL_VIOLATION)]
