"""What a client makes of a turn's events: whatever comes twice is taken once; and how often it asks again."""

from __future__ import annotations

import grpc
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.client.calls import TurnTranscript
from sparkrelay.client.retries import RetryBudget, RetryPolicy
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import generation_pb2 as generation_pb

Event = gateway_pb.GenerateResponse
# Tokens of each delta and its characters: deltas without tokens, and text that runs ahead of tokens, among them.
SHAPES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=12)


def events_of(shapes: list[tuple[int, int]]) -> list[Event]:
    events, index, text_index = [], 0, 0
    for number, (token_count, char_count) in enumerate(shapes):
        ids = range(index, index + token_count)
        delta = gateway_pb.TurnDelta(
            index=index,
            token_ids=ids,
            text="".join(chr(0x4E00 + text_index + offset) for offset in range(char_count)),
            logprobs=[generation_pb.TokenLogprob(token_id=each) for each in ids],
            rounds=[generation_pb.RoundReport(index=number)],
            text_index=text_index,
        )
        events.append(Event(delta=delta))
        index, text_index = index + token_count, text_index + char_count
    return events


@given(SHAPES, st.data())
def test_streams_that_overlap_make_the_undisturbed_turn(
    shapes: list[tuple[int, int]], data: st.DataObject
) -> None:
    started = Event(started=gateway_pb.TurnAccepted(turn_id="turn"))
    finished = Event(finished=gateway_pb.TurnFinished(finish_reason=generation_pb.FINISH_REASON_STOP))
    events = events_of(shapes)
    plain, broken = TurnTranscript(), TurnTranscript()
    for event in (started, *events, finished):
        plain.add(event)
    position, repeated = 0, 0
    while position < len(events):
        broken.add(started)
        start = data.draw(st.integers(0, position))
        end = data.draw(st.integers(position + 1, len(events)))
        repeated += position - start
        shown = [broken.add(event) for event in events[start:end]]
        assert all(delta is None for delta in shown[: position - start]), "what is known is not shown again"
        position = end
    broken.add(finished)
    assert broken.whole == plain.whole
    assert broken.next_index == sum(token_count for token_count, _ in shapes)


@given(SHAPES, st.data())
def test_a_turn_that_is_taken_over_begins_where_it_was_asked_to(
    shapes: list[tuple[int, int]], data: st.DataObject
) -> None:
    events = events_of(shapes)
    number = data.draw(st.integers(0, len(events) - 1))
    taken_over = TurnTranscript(events[number].delta.index)
    deltas = [delta for event in events[number:] if (delta := taken_over.add(event)) is not None]
    assert "".join(delta.text for delta in deltas) == "".join(event.delta.text for event in events[number:])


class Away(grpc.RpcError):  # type: ignore[misc]  # the library's class has no types
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE


def test_attempts_are_few_their_pauses_grow_and_vary_and_one_budget_bounds_them_all() -> None:
    budget = RetryBudget(limit=3.0, refund=0.5)
    low, high = RetryPolicy(lambda: 0.0, budget=budget), RetryPolicy(lambda: 1.0, budget=RetryBudget())
    pauses = [high.repeat_pause_s(Away(), attempt, is_read=True) for attempt in range(4)]
    assert pauses == [0.15 * 1.2, 0.3 * 1.2, 0.6 * 1.2, None]
    assert low.repeat_pause_s(Away(), 0, is_read=True) == 0.15 * 0.8
    assert low.repeat_pause_s(Away(), 0, is_read=False) is None, "it may have been heard"
    assert [low.resume_pause_s(Away(), 0) is None for _ in range(3)] == [False, False, True]
    budget.succeeded()
    assert low.resume_pause_s(Away(), 0) is None
    budget.succeeded()
    assert low.resume_pause_s(Away(), 0) is not None
