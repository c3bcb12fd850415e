"""A turn id that is used again: only once the engine has told the end of the turn that had it."""

from __future__ import annotations

import asyncio
import time

import pytest

from sparkrelay.outcomes import FinishReason, Reason, Refusal
from sparkrelay.sampling import Sampling
from verifier_service.events import (
    CancelTurn,
    Command,
    SpeculationRequest,
    StartTurn,
    TurnAccepted,
    TurnOver,
    TurnRefused,
)
from verifier_service.models.toy import ToyModel
from verifier_service.servicer import VerifierIdentity
from verifier_service.servicer.hub import Hub
from verifier_service.servicer.turn_output import TurnOutput

OVER = TurnOver("t", FinishReason.CANCELLED, 2, 0, 1, 3)
REFUSED = TurnRefused("t", Reason.CANCELLED, "cancelled before it began")


class Desk:
    """A hub whose engine is the test."""

    def __init__(self) -> None:
        self.posted: list[Command] = []
        identity = VerifierIdentity("v", "e", ToyModel().info)
        crashes: list[BaseException] = []
        self.hub = Hub(
            identity.link_settings, post=self.posted.extend, crashed=crashes.append, now_s=time.monotonic
        )

    def open(self) -> TurnOutput:
        output = TurnOutput(asyncio.get_running_loop(), "")
        self.hub.open_turn(turn(), (), output)
        return output


def turn() -> StartTurn:
    return StartTurn(
        session_id="s",
        turn_id="t",
        keep_len=0,
        keep_hash=b"",
        append_ids=(1, 2),
        output_start=2,
        sampling=Sampling(),
        max_tokens=5,
        stop_ids=frozenset(),
        speculation=SpeculationRequest(),
        logprob_count=None,
        received_us=0,
    )


@pytest.mark.parametrize("end", [OVER, REFUSED])
async def test_while_a_cancelled_turn_ends_its_id_is_taken(end: TurnOver | TurnRefused) -> None:
    desk = Desk()
    desk.open()
    desk.hub.close_turn(turn())
    assert desk.posted[-1] == CancelTurn("t")
    with pytest.raises(Refusal, match="wait for its end") as refused:
        desk.open()
    assert refused.value.reason is Reason.SESSION_BUSY
    assert refused.value.violations[0].field == "turn_id"
    desk.hub.handle([TurnAccepted("t", 2, 0)])
    with pytest.raises(Refusal):
        desk.open()
    desk.hub.handle([end])
    second = desk.open()
    assert not second.over, "it heard nothing of the first"
    assert desk.posted[-1].turn_id == "t"  # type: ignore[union-attr]


async def test_a_turn_whose_end_was_told_leaves_its_id_at_once() -> None:
    desk = Desk()
    first = desk.open()
    desk.hub.handle([TurnAccepted("t", 2, 0), OVER])
    assert first.over
    desk.hub.close_turn(turn())
    desk.open()
    assert not any(isinstance(command, CancelTurn) for command in desk.posted)


async def test_turns_that_are_failed_from_outside_end_in_the_engine_too() -> None:
    desk = Desk()
    desk.open()
    desk.hub.fail_turns(Refusal(Reason.VERIFIER_LOST, "gone"))
    desk.hub.close_turn(turn())
    with pytest.raises(Refusal):
        desk.open()
    desk.hub.handle([OVER])
    desk.open()
