"""The conversation as a recorded dialogue, the handshake, keepalive, and what each side refuses to say itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkrelay import frames, protocol
from sparkrelay.frames import (
    Block,
    Blocks,
    Context,
    ContextKind,
    Fingerprint,
    Hello,
    Invite,
    Join,
    Joined,
    Leave,
    Left,
    Ping,
    Rewound,
    TurnEnded,
    TurnStarted,
    Verdict,
    Verdicts,
    Welcome,
)
from sparkrelay.outcomes import FinishReason, Reason
from sparkrelay.protocol import (
    DrafterSide,
    Keepalive,
    LocalProtocolError,
    RemoteProtocolError,
    VerifierSide,
    negotiate,
)
from sparkrelay.protocol.drafter_side import EARLY_LIMIT
from sparkrelay.sampling import Sampling

TRANSCRIPT = Path(__file__).parent / "data" / "conversation.txt"
WORDS = {**vars(frames), "Reason": Reason, "FinishReason": FinishReason, "Sampling": Sampling}

# ---- the recorded conversation ----------------------------------------------------------------------------------------------


def show(decision: Any) -> str:  # noqa: C901  one case a decision
    """One line a decision, as the transcript has them."""
    name = type(decision).__name__
    match decision:
        case protocol.Greeted():
            return f"{name} version {decision.version}, blocks of {decision.block_size}"
        case protocol.RefuseJoin():
            return f"{name} {decision.session_id}: {decision.reason.name}"
        case protocol.JoinRefused(left):
            return f"{name} {left.session_id}"
        case protocol.Invited(invite):
            return f"{name} {invite.session_id}"
        case protocol.JoinAsked(join):
            return f"{name} {join.session_id} holding {join.tokens_held}"
        case protocol.MemberJoined(joined):
            return f"{name} {joined.session_id} as {joined.handle}, keeps {joined.keep_tokens}"
        case protocol.SessionTurnStarted(turn):
            return f"{name} {turn.turn_id} at {turn.base_len}"
        case protocol.SessionTurnEnded(turn):
            return f"{name} {turn.turn_id}"
        case protocol.SessionRewound(rewound):
            return f"{name} {rewound.handle} to {rewound.length}"
        case protocol.ContextArrived(context):
            return f"{name} {context.start} to {context.start + len(context.token_ids) - 1}"
        case protocol.BlocksAccepted(entries):
            return f"{name} " + (", ".join(f"{each.handle} at {each.base_len}" for each in entries) or "none")
        case protocol.VerdictsArrived(entries):
            told = [f"{each.handle}: {each.base_len} ({', '.join(map(str, ids))})" for each, ids in entries]
            return f"{name} " + (", ".join(told) or "none")
        case protocol.EndMembership():
            return f"{name} {decision.handle}: {decision.reason.name} {decision.message}"
        case protocol.MembershipOver(left, session_id):
            return f"{name} {session_id}: {left.reason.name}"
        case protocol.Ignored():
            return f"{name} {decision.handle}: {decision.message}"
        case protocol.AnswerPong(sequence) | protocol.PongReceived(sequence):
            return f"{name} {sequence}"
    return name


def steps() -> Iterator[tuple[int, str, str, list[str]]]:
    """(line, direction, frame, expected decisions) of each step of the transcript."""
    step: tuple[int, str, str, list[str]] | None = None
    for number, line in enumerate(TRANSCRIPT.read_text().splitlines(), 1):
        if line[:1] in (">", "<"):
            if step is not None:
                yield step
            direction, _, frame = line.partition(" ")
            step = (number, direction, frame, [])
        elif line and line != "----" and not line.startswith("#"):
            assert step is not None
            step[3].append(line)
    assert step is not None
    yield step


def test_a_recorded_conversation_is_answered_as_it_was() -> None:
    verifier, drafter = VerifierSide(Fingerprint(vocab_size=64, block_size=15)), DrafterSide()
    for number, direction, text, expected in steps():
        frame = eval(text, WORDS)
        speaker: Any = drafter if direction[0] == ">" else verifier
        hearer: Any = verifier if direction[0] == ">" else drafter
        if len(direction) == 1 or direction == "<.":
            speaker.send(frame)
        if direction == "<.":
            continue
        try:
            decided = [show(decision) for decision in hearer.receive(frame)]
        except RemoteProtocolError as error:
            decided = [f"close the stream: {error.reason.name} {error.message}"]
        assert decided == expected, f"{TRANSCRIPT.name}:{number}: {text}"


# ---- the handshake ----------------------------------------------------------------------------------------------------------

VERIFIER = Fingerprint(
    target_id="m",
    tokenizer_hash="t",
    vocab_size=9,
    block_size=15,
    context_kind=ContextKind.TOKENS,
    noise_versions=(1, 2),
)


def hello(low: int = 1, high: int = 1, name: str = "d", **fingerprint: Any) -> Hello:
    return Hello(low, high, name, "run", Fingerprint(**{"noise_versions": (), **fingerprint}))


@pytest.mark.parametrize(
    ("spoken", "version"), [((1, 1), 1), ((1, 3), 2), ((2, 9), 2)], ids=["older", "wider", "newer"]
)
def test_the_highest_common_version_is_spoken(spoken: tuple[int, int], version: int) -> None:
    assert negotiate(hello(*spoken), VERIFIER, (1, 2)).version == version


@pytest.mark.parametrize("spoken", [(3, 4), (0, 0), (2, 1)], ids=["newer", "older", "crossed"])
def test_no_common_version_is_a_refusal(spoken: tuple[int, int]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        negotiate(hello(*spoken), VERIFIER, (1, 2))
    assert caught.value.reason is Reason.PROTOCOL_VERSION


def test_an_empty_fingerprint_fits_and_its_blocks_may_be_as_long_as_any() -> None:
    assert negotiate(hello(), VERIFIER).block_size == 15
    assert negotiate(hello(block_size=4, noise_versions=(2, 7)), VERIFIER).block_size == 4


def test_every_field_that_differs_is_named_at_once() -> None:
    wrong = hello(target_id="x", tokenizer_hash="y", vocab_size=8, block_size=16, noise_versions=(3,))
    with pytest.raises(RemoteProtocolError) as caught:
        negotiate(wrong, VERIFIER)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["target_id", "tokenizer_hash", "vocab_size", "block_size", "noise_versions"]
    assert all(field in caught.value.message for field in fields)


def test_row_fields_matter_only_to_a_drafter_that_reads_rows() -> None:
    rows = {"tap_layers": (1, 2), "context_width": 8, "context_hash": "h"}
    assert negotiate(hello(**rows), VERIFIER)
    with pytest.raises(RemoteProtocolError) as caught:
        negotiate(hello(context_kind=ContextKind.ROWS, **rows), VERIFIER)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["context_kind", "tap_layers", "context_width", "context_hash"]


@pytest.mark.parametrize("name", ["", "x" * 129])
def test_a_drafter_needs_a_name(name: str) -> None:
    with pytest.raises(RemoteProtocolError, match="drafter_id"):
        negotiate(hello(name=name), VERIFIER)


# ---- what each side refuses to say -------------------------------------------------------------------------------------------


def pair(block_size: int = 7) -> tuple[VerifierSide, DrafterSide]:
    """Both sides with one running turn: session s1, handle 1, 5 tokens committed and held."""
    verifier, drafter = VerifierSide(Fingerprint(block_size=15)), DrafterSide()
    start = TurnStarted(1, "t1", 5, Sampling(), 1, 20, 5, (), 7)
    for frame in [
        Hello(1, 1, "d", "run", Fingerprint(block_size=block_size)),
        Welcome(1, "v", "e", b"", 2, 15, 1),
        Invite("s1", b"x"),
        Join("s1", b"x"),
        Joined("s1", 1, 5),
        start,
    ]:
        says, hears = (drafter, verifier) if isinstance(frame, Hello | Join) else (verifier, drafter)
        says.send(frame)  # type: ignore[attr-defined]
        hears.receive(frame)  # type: ignore[attr-defined]
    return verifier, drafter


def block(base_len: int, *ids: int, handle: int = 1) -> Blocks:
    return Blocks((Block(handle, 0, base_len, ids, bytes(len(ids))),))


def verdict(
    base_len: int, token: int, *, named: int = 0, depth: int = 0, accepted: int = 0, handle: int = 1
) -> Verdicts:
    return Verdicts((Verdict(handle, 0, base_len, named, depth, accepted, token, 7),))


@pytest.mark.parametrize(
    "frame",
    [
        Welcome(1, "v", "e", b"", 2, 15, 1),
        Joined("s2", 2, 0),
        TurnStarted(1, "t2", 5, Sampling(), 1, 20, 5, (), 7),
        TurnStarted(9, "t2", 5, Sampling(), 1, 20, 5, (), 7),
        Rewound(1, 3),
        TurnEnded(2, "t", FinishReason.STOP),
        Context(1, 5, (1,)),
        verdict(4, 9),
        verdict(5, -1),
        verdict(5, 9, named=5, depth=1, accepted=1),
        verdict(5, 9, accepted=1),
        verdict(5, 9, handle=3),
        Ping(0),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_a_verifier_that_is_about_to_break_the_rules_has_a_bug(frame: Any) -> None:
    verifier, _ = pair()
    with pytest.raises(LocalProtocolError):
        verifier.send(frame)


def test_an_empty_block_is_in_flight_until_the_next_commit() -> None:
    verifier, drafter = pair()
    drafter.send(block(5))
    assert verifier.receive(block(5)) == [protocol.BlocksAccepted(list(block(5).entries))]
    assert not drafter.may_draft(1)
    verifier.send(verdict(5, 9))
    drafter.receive(verdict(5, 9))
    assert drafter.may_draft(1)
    drafter.send(block(6, 1))
    assert verifier.receive(block(6, 1)) == [protocol.BlocksAccepted(list(block(6, 1).entries))]


@pytest.mark.parametrize(
    "frame",
    [
        hello(),
        block(4, 1),
        block(6, 1),
        block(5, *range(16)),
        block(5, 1, handle=2),
        Blocks((*block(5, 1).entries, *block(5, 2).entries)),
    ],
)
def test_a_drafter_that_is_about_to_break_the_rules_has_a_bug(frame: Any) -> None:
    _, drafter = pair()
    with pytest.raises(LocalProtocolError):
        drafter.send(frame)


def test_a_drafter_waits_for_its_context_before_it_drafts() -> None:
    verifier, drafter = pair()
    for frame in (
        TurnEnded(1, "t1", FinishReason.LENGTH),
        TurnStarted(1, "t2", 8, Sampling(), 1, 20, 8, (), 7),
    ):
        verifier.send(frame)
        drafter.receive(frame)
    assert not drafter.may_draft(1)
    with pytest.raises(LocalProtocolError, match="context"):
        drafter.send(block(8, 1))
    drafter.receive(Context(1, 5, (1, 2, 3)))
    assert drafter.may_draft(1)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (verdict(4, 9), "base_len 4"),
        (verdict(5, 9, named=5, depth=1), "none is in flight"),
        (verdict(5, 9, depth=1, accepted=2), "accepts 2"),
        (Context(1, 9, (1,)), ""),
        (Rewound(1, 2), "not allowed"),
        (TurnStarted(1, "t2", 5, Sampling(), 1, 20, 5, (), 7), "not allowed"),
    ],
)
def test_a_verifier_that_breaks_the_rules_of_a_session_loses_the_member(frame: Any, message: str) -> None:
    _, drafter = pair()
    decisions = drafter.receive(frame)
    ended = [each for each in decisions if isinstance(each, protocol.EndMembership)]
    if isinstance(frame, Context):  # early context waits for a turn that never comes: harmless
        assert decisions == []
        return
    assert len(ended) == 1 and ended[0].session_id == "s1" and message in ended[0].message
    drafter.send(Leave(1, ended[0].reason))
    assert drafter.handles == []


@pytest.mark.parametrize(("block_size", "block_limit"), [(7, 6), (7, 0), (0, 0), (1, -1)])
def test_a_welcome_that_takes_no_blocks_of_the_announced_size_closes_the_stream(
    block_size: int, block_limit: int
) -> None:
    drafter = DrafterSide()
    drafter.send(hello(block_size=block_size))
    with pytest.raises(protocol.RemoteProtocolError, match="block_limit"):
        drafter.receive(Welcome(1, "v", "e", b"s", 4, block_limit, 1))


def test_context_that_never_finds_its_turn_is_bounded() -> None:
    _, drafter = pair()
    for start in range(EARLY_LIMIT):
        drafter.receive(Context(1, start, (1,)))
    with pytest.raises(RemoteProtocolError, match="never started"):
        drafter.receive(Context(1, EARLY_LIMIT, (1,)))


def test_the_session_limit_is_kept_by_both_sides() -> None:
    _, drafter = pair()
    drafter.send(Join("s2", b""))
    with pytest.raises(LocalProtocolError, match="2 sessions"):
        drafter.send(Join("s3", b""))
    full = VerifierSide(Fingerprint(), session_limit=0, invites={"s": b"x"})
    full.receive(hello())
    full.send(Welcome(1, "v", "e", b"", 0, 15, 1))
    (decision,) = full.receive(Join("s", b"x"))
    assert isinstance(decision, protocol.RefuseJoin) and decision.reason is Reason.OVERLOADED


def test_a_block_is_free_again_when_the_verdicts_have_spent_it() -> None:
    verifier, drafter = pair()
    drafter.send(block(5, 1, 2))
    verifier.receive(block(5, 1, 2))
    for base_len, token in ((5, 1), (6, 2)):
        assert not drafter.may_draft(1)
        verifier.send(verdict(base_len, token))
        drafter.receive(verdict(base_len, token))
    assert drafter.may_draft(1)
    decisions = verifier.receive(block(7, 3))
    assert decisions == [protocol.BlocksAccepted(list(block(7, 3).entries))]


def test_handles_grow_and_a_left_one_is_not_used_again() -> None:
    verifier, drafter = pair()
    left = Left(1, "", Reason.SESSION_ENDED)
    verifier.send(left)
    drafter.receive(left)
    invite, join = Invite("s1", b"y"), Join("s1", b"y")
    verifier.send(invite)
    drafter.receive(invite)
    drafter.send(join)
    verifier.receive(join)
    with pytest.raises(LocalProtocolError, match="grow"):
        verifier.send(Joined("s1", 1, 0))
    verifier.send(Joined("s1", 2, 0))


# ---- keepalive --------------------------------------------------------------------------------------------------------------


def test_pings_are_due_every_second_and_silence_is_a_loss_after_three() -> None:
    alive = Keepalive(100.0)
    assert alive.tick(100.9) is None
    assert alive.tick(101.0) == Ping(1) and alive.tick(101.5) is None and alive.tick(102.0) == Ping(2)
    assert not alive.silent(103.0)
    alive.heard(102.5)
    assert not alive.silent(105.5) and alive.silent(105.6)


def test_the_round_trip_time_is_smoothed_and_foreign_pongs_measure_nothing() -> None:
    alive = Keepalive(0.0)
    alive.pong(5, 1.0)
    assert alive.round_trip_s is None
    first, second = alive.ping(1.0), alive.ping(2.0)
    alive.pong(first.sequence, 1.1)
    alive.pong(first.sequence, 9.0)
    assert alive.round_trip_s == pytest.approx(0.1)
    alive.pong(second.sequence, 2.5)
    assert alive.round_trip_s == pytest.approx(0.2)
