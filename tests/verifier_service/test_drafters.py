"""Who is invited to what, and what happens when drafters come, go and are refused."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from sparkrelay.frames import Fingerprint, Hello
from sparkrelay.outcomes import Reason
from verifier_service.drafters import REMEMBERED_LIMIT, CloseLink, Drafters, DrafterState, SendInvite
from verifier_service.events import DrafterUnavailable, RemoveMember


def hello(name: str) -> Hello:
    return Hello(1, 1, name, "run", Fingerprint(proposal_kind="kind"))


def drafters(*names: str) -> Drafters:
    """These drafters, connected over links 1, 2, ..."""
    tokens = count()
    made = Drafters(lambda: b"token %d" % next(tokens))
    for link_id, name in enumerate(names, 1):
        assert made.connect(link_id, hello(name), 7) == []
    return made


def member(made: Drafters, link_id: int, session_id: str = "s") -> int:
    """A drafter that joined; its member id."""
    joined = made.join(link_id, session_id)
    made.joined(joined.member_id)
    return joined.member_id


def invited(effects: Iterable[object]) -> list[int]:
    return [effect.link_id for effect in effects if isinstance(effect, SendInvite)]


def test_the_first_named_drafter_that_is_connected_is_invited() -> None:
    made = drafters("a", "b")
    expected, effects = made.want("s", "t", ["absent", "b", "a"])
    assert expected and effects == [SendInvite(2, "s", "t", b"token 0")]


def test_no_drafter_connected_means_that_none_is_awaited() -> None:
    assert drafters().want("s", "t", ["a"]) == (False, [])
    assert drafters("a").want("s", "t", []) == (False, [])


def test_a_member_that_the_next_turn_names_first_stays_without_an_invite() -> None:
    made = drafters("a", "b")
    made.want("s", "t1", ["a"])
    member(made, 1)
    made.turn_over("s", "t1")
    assert made.want("s", "t2", ["a", "b"]) == (False, [])
    made.turn_over("s", "t2")
    expected, effects = made.want("s", "t3", ["b", "a"])
    assert expected and invited(list(effects)) == [2]


def test_a_drafter_that_leaves_makes_room_for_the_next_and_is_not_asked_again() -> None:
    made = drafters("a", "b")
    made.want("s", "t", ["a", "b"])
    first = member(made, 1)
    assert invited(list(made.end(first, Reason.DRAFTER_DECLINED))) == [2]
    second = member(made, 2)
    assert made.end(second, Reason.SLOW) == [DrafterUnavailable("s", "t")]
    assert made.connect(3, hello("a"), 7) == [CloseLink(1)]


def test_a_member_that_may_return_is_asked_again() -> None:
    made = drafters("a")
    made.want("s", "t", ["a"])
    assert invited(list(made.end(member(made, 1), Reason.SLOW, may_return=True))) == [1]


def test_a_refused_join_asks_the_next() -> None:
    made = drafters("a", "b")
    made.want("s", "t", ["a", "b"])
    joining = made.join(1, "s")
    assert invited(list(made.end(joining.member_id, Reason.SESSION_NOT_FOUND))) == [2]


def test_the_same_drafter_asked_again_keeps_its_invitation() -> None:
    made = drafters("a")
    _, first = made.want("s", "t1", ["a"])
    made.turn_over("s", "t1")  # while its join is on the way
    expected, second = made.want("s", "t2", ["a"])
    assert expected and first == [SendInvite(1, "s", "t1", b"token 0")]
    assert second == [SendInvite(1, "s", "t2", b"token 0")]


def test_a_join_with_a_void_invitation_is_invited_once_more_and_then_the_next_is() -> None:
    made = drafters("a", "b")
    made.want("s", "t", ["a", "b"])
    assert invited(made.join_refused(1, "s", Reason.JOIN_REFUSED)) == [1]
    assert invited(made.join_refused(1, "s", Reason.JOIN_REFUSED)) == [2]
    assert made.join_refused(1, "s", Reason.JOIN_REFUSED) == [], "it is not the one that was asked"


def test_a_join_of_a_full_drafter_asks_the_next_or_tells_the_engine() -> None:
    made = drafters("a", "b")
    made.want("s", "t", ["a", "b"])
    assert invited(made.join_refused(1, "s", Reason.OVERLOADED)) == [2]
    assert made.join_refused(2, "s", Reason.OVERLOADED) == [DrafterUnavailable("s", "t")]


def test_a_join_that_is_refused_disturbs_no_member_and_no_other_session() -> None:
    made = drafters("a", "b")
    made.want("s", "t", ["a", "b"])
    member(made, 1)
    assert made.join_refused(1, "s", Reason.JOIN_REFUSED) == []
    assert made.join_refused(2, "s", Reason.JOIN_REFUSED) == []
    assert (
        made.join_refused(1, "unknown", Reason.JOIN_REFUSED) == made.join_refused(9, "s", Reason.SLOW) == []
    )


def test_a_session_that_was_ended_wants_nobody() -> None:
    made = drafters("a", "b")
    made.want("s", "t", ["a", "b"])
    joined = member(made, 1)
    made.session_over("s")
    assert made.end(joined, Reason.SESSION_ENDED) == []
    assert made.connect(3, hello("a"), 7) == [CloseLink(1)]


def test_a_drafter_that_restarted_is_known_by_what_its_new_stream_says() -> None:
    made = drafters("a")
    made.connect(2, Hello(1, 1, "a", "run 2", Fingerprint(proposal_kind="other")), 3)
    (known,) = made.all()
    assert (known.incarnation, known.proposal_kind, known.block_size) == ("run 2", "other", 3)


def test_a_lost_stream_ends_its_members_and_asks_the_next_for_each() -> None:
    made = drafters("a", "b")
    for session in ("s", "r"):
        made.want(session, f"turn of {session}", ["a", "b"])
    first, second = member(made, 1, "s"), member(made, 1, "r")
    made.turn_over("r", "turn of r")
    effects = made.lose(1, Reason.SILENT, "silent")
    assert [e for e in effects if isinstance(e, RemoveMember)] == [RemoveMember(first), RemoveMember(second)]
    assert invited(list(effects)) == [2]
    (lost,) = [each for each in made.all() if each.drafter_id == "a"]
    assert (lost.state, lost.reason, lost.message) == (DrafterState.LOST, Reason.SILENT, "silent")
    assert lost.members == set() and made.lose(1, Reason.SILENT, "") == []


def test_the_last_one_lost_tells_the_engine_and_a_return_brings_an_invite() -> None:
    made = drafters("a")
    made.want("s", "t", ["a"])
    assert made.lose(1, Reason.UNSPECIFIED, "") == [DrafterUnavailable("s", "t")]
    assert invited(list(made.connect(2, hello("a"), 7))) == [2]


def test_a_superseded_member_calls_for_nobody() -> None:
    made = drafters("a", "b")
    made.want("s", "t1", ["a"])
    old = member(made, 1)
    made.want("s", "t2", ["b"])
    new = member(made, 2)
    assert made.end(old, Reason.SUPERSEDED) == []
    current = made.member_of("s")
    assert current is not None and current.member_id == new


def test_a_new_stream_of_the_same_name_closes_the_old_one_and_moves_its_invites() -> None:
    made = drafters("a")
    made.want("s", "t", ["a"])
    first = member(made, 1)
    effects = made.connect(2, hello("a"), 7)
    assert RemoveMember(first) in effects and CloseLink(1) in effects and invited(list(effects)) == [2]


def test_only_the_newest_invitation_to_a_session_is_good() -> None:
    made = drafters("a", "b")
    made.want("s", "t1", ["a"])
    made.want("s", "t2", ["b"])
    first, second = made.linked(1), made.linked(2)
    assert first is not None and second is not None
    assert first.invites == {} and second.invites == {"s": b"token 1"}
    made.session_over("s")
    assert second.invites == {}


def test_refused_drafters_are_listed_with_the_reason_and_bounded() -> None:
    made = drafters("good")
    for index in range(REMEMBERED_LIMIT + 50):
        made.refuse(hello(f"bad{index}"), Reason.FINGERPRINT_MISMATCH, "vocab_size")
    made.refuse(hello("good"), Reason.FINGERPRINT_MISMATCH, "an impostor")
    states = {each.drafter_id: each.state for each in made.all()}
    assert states["good"] is DrafterState.CONNECTED
    assert (
        len(states) <= REMEMBERED_LIMIT + 1 and states[f"bad{REMEMBERED_LIMIT + 49}"] is DrafterState.REFUSED
    )


def test_member_numbers_are_never_used_again() -> None:
    made = drafters("a")
    numbers = []
    for _ in range(5):
        numbers.append(member(made, 1))
        made.end(numbers[-1], Reason.UNSPECIFIED)
    assert numbers == sorted(set(numbers)) and made.end(99, Reason.UNSPECIFIED) == []
