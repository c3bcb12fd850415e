"""What waits for FeedContext: frames, credit, bounds, and the proof of arrival."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparkrelay.frames import Context
from sparkrelay.wire import feed_response, feed_response_pb
from verifier_service.context_feed import ContextFeed


def taken(feed: ContextFeed, size: int = 10) -> list[Context]:
    """All frames that credit allows, each of this size."""
    frames = []
    while (head := feed.head()) is not None and feed.take(size):
        frames.append(head)
    return frames


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), max_size=8), st.integers(1, 9))
def test_every_id_comes_once_and_in_order(pushes: list[tuple[int, int]], frame_ids: int) -> None:
    feed = ContextFeed(frame_ids=frame_ids)
    feed.grant(10_000)
    for handle, count in pushes:
        assert feed.push(Context(handle, 100, tuple(range(count))))
    frames = taken(feed)
    assert all(len(frame.token_ids) <= frame_ids for frame in frames)
    told = [(frame.handle, id_) for frame in frames for id_ in frame.token_ids]
    assert told == [(handle, id_) for handle, count in pushes for id_ in range(count)]
    assert all(frame.start == 100 + frame.token_ids[0] for frame in frames)


@given(st.integers(1, 300), st.integers(0, 40), st.integers(0, 300), st.sampled_from((4, 576, 16_384)))
def test_rows_travel_with_the_ids_of_their_positions_in_frames_of_64_kib(
    count: int, ahead: int, row_count: int, width: int
) -> None:
    ahead = min(ahead, count)
    row_count = min(row_count, count - ahead)
    rows = np.random.default_rng(count).integers(0, 2**16, (row_count, width), dtype=np.uint16)
    feed = ContextFeed()
    feed.grant(2**40)
    assert feed.push(Context(2**31 - 1, 2**20, (2**31 - 1,) * count, 2**20 + ahead, rows))
    ids, found = 0, {}
    for frame in taken(feed):
        message = feed_response_pb(frame)
        assert message.ByteSize() <= 64 * 1024
        heard = feed_response(message)
        assert isinstance(heard, Context) and heard.start == 2**20 + ids
        ids += len(heard.token_ids)
        if heard.rows is not None:
            assert heard.start <= heard.rows_start
            assert heard.rows_start + len(heard.rows) <= heard.start + len(heard.token_ids)
            found.update({heard.rows_start + index: row for index, row in enumerate(heard.rows)})
    assert ids == count and sorted(found) == list(range(2**20 + ahead, 2**20 + ahead + row_count))
    assert all(np.array_equal(row, rows[position - 2**20 - ahead]) for position, row in found.items())


def test_rows_that_wait_are_bounded_by_their_bytes() -> None:
    feed = ContextFeed(backlog_row_bytes=100)
    rows = np.zeros((10, 4), np.uint16)
    assert feed.push(Context(1, 0, (1,) * 10, 0, rows)) and not feed.push(Context(2, 0, (1,) * 10, 0, rows))
    assert feed.push(Context(3, 0, (1,) * 10)), "ids alone are another matter"
    feed.forget(1)
    assert feed.push(Context(2, 0, (1,) * 10, 0, rows))
    feed.grant(2**20)
    taken(feed)
    assert feed.push(Context(2, 10, (1,) * 10, 10, rows))


def test_a_frame_waits_until_all_of_it_is_covered_by_credit() -> None:
    feed = ContextFeed(frame_ids=1)
    feed.push(Context(1, 0, (1, 2, 3)))
    assert taken(feed) == []
    feed.grant(25)
    assert [frame.start for frame in taken(feed)] == [0, 1]
    feed.grant(5)
    assert [frame.start for frame in taken(feed)] == [2]


def test_a_full_backlog_takes_nothing_until_there_is_room() -> None:
    feed = ContextFeed(backlog_ids=4)
    assert feed.push(Context(1, 0, (1, 2, 3))) and not feed.push(Context(2, 0, (1, 2)))
    feed.forget(1)
    assert feed.head() is None and feed.push(Context(2, 0, (1, 2, 3, 4)))


def test_context_is_on_its_way_until_a_later_ping_is_answered() -> None:
    feed = ContextFeed()
    feed.grant(1000)
    feed.pinged(1)
    feed.push(Context(1, 0, (1,)))
    assert feed.on_its_way(1) and not feed.on_its_way(2) and not feed.ping_wanted
    taken(feed)
    feed.ponged(1)
    feed.ponged(99)
    assert feed.on_its_way(1) and feed.ping_wanted
    feed.pinged(2)
    assert not feed.ping_wanted
    feed.ponged(2)
    assert not feed.on_its_way(1)
