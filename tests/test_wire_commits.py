"""CommitBatch: what a verifier's columns become again at a gateway, and what it refuses."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay import wire
from sparkrelay.frames import INT32_MAX
from sparkrelay.outcomes import BlockState, Refusal
from sparkrelay.v1 import generation_pb2
from sparkrelay.v1 import verifier_service_pb2 as pb2
from verifier_service.events import Committed, Round, TokenLogprob
from verifier_service.servicer.commit_batch import commit_batch

count = st.integers(0, INT32_MAX)
token_ids = st.lists(count, min_size=1, max_size=16).map(tuple)


@st.composite
def commits(draw: st.DrawFn) -> list[Committed]:
    """Neighbouring commits of a turn; with log-probabilities or without."""
    ids = draw(st.lists(token_ids, min_size=1, max_size=6))
    opens, with_logprobs, number = draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 1000))
    starts = accumulate(map(len, ids), initial=draw(st.integers(0, 10**6)))
    made = []
    for index, (start, part) in enumerate(zip(starts, ids, strict=False)):
        report = None if opens and index == 0 else draw(rounds(number + index - opens, start))
        logprobs = tuple(TokenLogprob(each, -0.5, ((each, -0.5), (3, -1.5))) for each in part)
        made.append(Committed("t", start, part, report, logprobs if with_logprobs else ()))
    return made


@st.composite
def rounds(draw: st.DrawFn, number: int, base_len: int) -> Round:
    confidences = tuple(step / 255 for step in draw(st.binary(max_size=15)))
    state, drafter_id = draw(st.sampled_from(BlockState)), draw(st.sampled_from(("", "d1", "d2")))
    some = [draw(count) for _ in range(9)]
    return Round(
        number, base_len, len(confidences), some[0], some[1], state, confidences, *some[2:], drafter_id
    )


@given(commits())
def test_commits_come_back_as_they_were(made: list[Committed]) -> None:
    sent = commit_batch(made).SerializeToString()
    back = wire.commits(pb2.CommitBatch.FromString(sent))
    assert [(each.start, tuple(each.token_ids)) for each in back] == [(c.start, c.token_ids) for c in made]
    assert [[p.token_id for p in each.logprobs] for each in back] == [
        [p.token_id for p in c.logprobs] for c in made
    ]
    assert [each.report and _round(each.report) for each in back] == [each.round for each in made]


def _round(report: generation_pb2.RoundReport) -> Round:
    values = {field.name: getattr(report, field.name) for field in report.DESCRIPTOR.fields}
    values["confidences"] = tuple(byte / 255 for byte in report.confidences)
    return Round(*values.values())


def test_a_message_without_commits_has_none() -> None:
    assert wire.commits(pb2.CommitBatch()) == []


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("token_counts", {"token_counts": [2, 2]}),
        ("token_counts", {"token_counts": [4, -1]}),
        ("logprobs", {"logprobs": [generation_pb2.TokenLogprob()]}),
        ("rounds.drafted_counts", {"opens": True}),
        ("rounds.depths", {"rounds": {"depths": [1]}}),
        ("rounds.confidences", {"rounds": {"confidences": b"\xff"}}),
        ("rounds.confidences", {"rounds": {"drafted_counts": [3, -1]}}),
        ("rounds.drafter_ids", {"rounds": {"drafter_ids": ["a", "b", "c"]}}),
        ("rounds.drafter_ids", {"rounds": {"drafter_ids": []}}),
    ],
)
def test_columns_that_do_not_fit_each_other_are_refused_by_name(field: str, change: dict[str, Any]) -> None:
    report = Round(0, 5, 1, 1, 0, BlockState.FRESH, (1.0,), *range(7), "d")
    good = [
        Committed("t", 5, (7,), report),
        Committed("t", 6, (8, 9), report._replace(number=1, base_len=6)),
    ]
    message = commit_batch(good)
    for name, value in change.items():
        _set(message.rounds if name == "rounds" else message, value if name == "rounds" else {name: value})
    with pytest.raises(Refusal, match=f"committed.{field}"):
        wire.commits(message)


def _set(message: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        message.ClearField(name)
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
