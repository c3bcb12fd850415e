"""A drafter at its own limit, or at its verifier's, or leaving: it says so, so that another is asked at once."""

from __future__ import annotations

from drafter_service.engine import DraftEngine
from drafter_service.events import FrameArrived, FramesToSend, LeaveAll, LinkOpened
from sparkrelay.frames import DrafterFrame, Hello, Invite, Join, Joined, Leave, Left, Welcome
from sparkrelay.outcomes import Reason
from tests.drafter_service.fake_verifier import FormulaModel

DECLINED = Reason.DRAFTER_DECLINED


class Links:
    """An engine and what it says on each of its links."""

    def __init__(self, *, max_sessions: int = 0, session_limit: int = 64) -> None:
        model = FormulaModel()
        hello = Hello(1, 1, "drafter", "run", model.fingerprint)
        self.engine = DraftEngine(model, hello, lambda: 0, max_sessions=max_sessions)
        for link_id in (1, 2):
            self.engine.step([LinkOpened(link_id)], 0)
            self.hear(link_id, Welcome(1, "v", "e", b"stream", session_limit, 15, 1 << 22))

    def hear(self, link_id: int, frame: object) -> list[DrafterFrame]:
        events = self.engine.step([FrameArrived(link_id, frame, 0)], 0).events  # type: ignore[arg-type]
        return [each for event in events if isinstance(event, FramesToSend) for each in event.frames]

    def invite(self, link_id: int, session_id: str) -> DrafterFrame:
        (answer,) = self.hear(link_id, Invite(session_id, b"token"))
        return answer


def test_beyond_its_own_limit_over_all_links_an_invite_is_declined() -> None:
    links = Links(max_sessions=2)
    assert isinstance(links.invite(1, "a"), Join)
    links.hear(1, Joined("a", 1, 0))
    assert isinstance(links.invite(2, "b"), Join)
    assert links.invite(2, "c") == Leave(0, DECLINED, "c")
    assert links.invite(1, "d") == Leave(0, DECLINED, "d")


def test_a_session_that_ends_makes_room_whether_it_had_joined_or_not() -> None:
    links = Links(max_sessions=1)
    links.invite(1, "a")
    assert links.invite(1, "b") == Leave(0, DECLINED, "b")
    links.hear(1, Left(0, "a", Reason.JOIN_REFUSED))
    assert isinstance(links.invite(1, "b"), Join)
    links.hear(1, Joined("b", 7, 0))
    assert links.invite(2, "c") == Leave(0, DECLINED, "c")
    links.hear(1, Left(7, "", Reason.SESSION_ENDED))
    assert isinstance(links.invite(2, "c"), Join)


def test_beyond_the_verifiers_limit_an_invite_is_declined() -> None:
    links = Links(session_limit=1)
    assert isinstance(links.invite(1, "a"), Join)
    assert links.invite(1, "b") == Leave(0, DECLINED, "b")
    assert isinstance(links.invite(2, "b"), Join), "the other verifier has a limit of its own"


def test_who_leaves_declines() -> None:
    links = Links()
    links.engine.step([LeaveAll()], 0)
    assert links.invite(1, "a") == Leave(0, DECLINED, "a")


def test_an_invite_that_comes_twice_is_answered_once() -> None:
    links = Links(max_sessions=1)
    assert isinstance(links.invite(1, "a"), Join)
    assert links.hear(1, Invite("a", b"token")) == []
