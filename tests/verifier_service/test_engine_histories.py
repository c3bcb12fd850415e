"""Every turn of thousands of random lives says what the target alone would have said."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.verifier_service.history import History
from verifier_service import state_memory
from verifier_service.models.toy import ToyModel
from verifier_service.prefix_index import PREFIX_BLOCK, PrefixIndex
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
        "joined",
        "extended",
        "rewound",
        "drafter rewound",
        "ended",
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
        "reused",
        "reused tokens",
        "left behind",
        "rows fed",
        "fed in part",
        "rows of verdicts",
        "rows checked",
        "forked with state",
        "forked without state",
        "fork refused OVERLOADED",
        "fork refused INVALID_FIELD",
        "fork refused SESSION_EXISTS",
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


def test_a_beginning_that_is_not_the_sources_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = ToyModel.fork

    def one_position_wrong(model: ToyModel, source_id: int, sequence_id: int, length: int) -> int:
        length = fork(model, source_id, sequence_id, length)
        memory = model._memories[sequence_id]
        memory.hashes[-1:] = [hash_ ^ 2**40 for hash_ in memory.hashes[-1:]]
        return length

    monkeypatch.setattr(ToyModel, "fork", one_position_wrong)
    # In a life on a target with context rows, a drafter may be told a wrong row before the target says a wrong token.
    found = "not what the target alone would have said|a row is not the one of a straight run"
    with pytest.raises(AssertionError, match=found):
        _play(100)


def test_an_index_that_does_not_forget_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    follow = PrefixIndex.follow

    def follow_growth_only(index: PrefixIndex, holder: Sequence) -> None:
        held = index._held.get(holder.sequence_id)
        if held is None or holder.state_len // PREFIX_BLOCK > len(held.links):
            follow(index, holder)

    monkeypatch.setattr(PrefixIndex, "follow", follow_growth_only)
    with pytest.raises(AssertionError, match=r"an entry (is not the state's|outlived its state)"):
        _play(50)
