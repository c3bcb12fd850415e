"""Every turn of thousands of random lives says what the target alone would have said."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.verifier_service.history import History
from verifier_service import state_memory
from verifier_service.models.toy import ToyModel
from verifier_service.sequence import Sequence

HISTORIES = 1000


@pytest.mark.parametrize("part", range(4))
def test_no_schedule_drafter_or_shortage_changes_a_token(part: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(part, HISTORIES, 4):
        try:
            counts += History(seed).run()
        except AssertionError as error:
            raise AssertionError(f"History({seed}).run() says: {error}") from error
    for what in (
        "drafted",
        "verified",
        "accepted",
        "rejected",
        "FRESH",
        "REBASED",
        "LATE",
        "NOT_ASKED",
        "NO_DRAFTER",
        "dropped",
        "dropped stale",
        "preempted",
        "evicted",
        "cached",
        "over STOP",
        "over LENGTH",
        "over CONTEXT",
        "over CANCELLED",
        "refused OVERLOADED",
        "refused OUT_OF_MEMORY",
        "refused PREFIX_MISMATCH",
    ):
        assert counts[what] > 0, f"the histories never saw: {what}"


def _play(count: int) -> None:
    for seed in range(count):
        History(seed).run()


def test_an_engine_that_does_not_roll_back_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_rejected_tokens(memory: state_memory.StateMemory, sequence: Sequence, length: int) -> None:
        sequence.state_len = min(sequence.state_len, length)

    monkeypatch.setattr(state_memory.StateMemory, "rewind", keep_rejected_tokens)
    with pytest.raises(AssertionError, match=r"begin where the memory ends|room was taken"):
        _play(50)


def test_a_stale_row_behind_a_rejection_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rewind = ToyModel.rewind

    def leave_a_rejected_token(model: ToyModel, sequence_id: int, length: int) -> int:
        memory = model._memories[sequence_id]
        rejected = memory.token_ids[-1]
        left = rewind(model, sequence_id, length)
        memory.token_ids[-1:] = [rejected] if memory.token_ids else []
        return left

    monkeypatch.setattr(ToyModel, "rewind", leave_a_rejected_token)
    with pytest.raises(AssertionError, match="not what the target alone would have said"):
        _play(50)
