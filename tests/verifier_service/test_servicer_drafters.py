"""Drafters over a real server: joining, blocks, verdicts, and everything that a drafter can do wrong."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from sparkrelay.errors import refusal_of
from sparkrelay.frames import Block, Blocks, Join, Leave
from sparkrelay.outcomes import Reason
from sparkrelay.v1 import generation_pb2
from sparkrelay.v1 import verifier_service_pb2 as pb2
from tests.verifier_service.servicer_rig import RawDrafter, Rig, SlowToyModel, request, rig, rounds, token_ids

FRESH = generation_pb2.RoundReport.BLOCK_STATE_FRESH
LOST = pb2.DrafterStatus.STATE_LOST


async def plain(verifier: Rig, **fields: Any) -> list[int]:
    """The ids of the same turn in a session of its own without drafts."""
    return token_ids(await verifier.generate(request("plain", session="plain", **fields)))


def start(verifier: Rig, *drafters: str, **fields: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(verifier.generate(request(drafters=drafters, **fields)))


async def draft_to_the_end(
    drafter: RawDrafter, handle: int, answer: list[int], turn: asyncio.Task[Any]
) -> None:
    """Drafts the right tokens until the turn is over."""
    ended = len(drafter.of("TurnEnded"))
    while not turn.done() and len(drafter.of("TurnEnded")) == ended:
        await drafter.until(lambda: drafter.side.may_draft(handle) or len(drafter.of("TurnEnded")) > ended)
        done = len(drafter.ids[handle]) - drafter.turns[handle].output_start
        if drafter.side.may_draft(handle) and answer[done : done + 3]:
            await drafter.draft(handle, answer[done : done + 3])
        elif drafter.side.may_draft(handle):
            return


async def test_a_drafter_that_knows_the_answer_has_its_blocks_accepted() -> None:
    async with rig(policy="fixed:3") as verifier:
        answer = await plain(verifier, max_tokens=12)
        drafter = await RawDrafter(verifier).connect()
        turn = start(verifier, "d1", max_tokens=12)
        handle = await drafter.join()
        await draft_to_the_end(drafter, handle, answer, turn)
        responses = await turn
        await drafter.frame("TurnEnded")
        report = await verifier.load_where(lambda load: load.drafters[0].accepted_count > 0)
        assert drafter.ids[handle] == [1, 2, 3, *answer]
        await drafter.close()
    assert token_ids(responses) == answer
    reports = rounds(responses)
    assert all(r.accepted_count == r.depth for r in reports) and sum(r.accepted_count for r in reports) >= 6
    assert {r.drafter_id for r in reports} == {"d1"}
    assert any(r.block_state == FRESH and r.confidences == b"\xff" * r.drafted_count for r in reports)
    status = report.drafters[0]
    assert (
        status.proposal_kind == "raw"
        and status.drafted_count >= status.verified_count >= status.accepted_count
    )
    assert status.turnaround_us > 0


async def test_a_drafter_that_is_always_wrong_changes_no_token() -> None:
    async with rig(policy="fixed:3") as verifier:
        answer = await plain(verifier)
        drafter = await RawDrafter(verifier).connect()
        turn = start(verifier, "d1")
        handle = await drafter.join()
        while not turn.done() and not drafter.of("TurnEnded"):
            await drafter.until(lambda: drafter.side.may_draft(handle) or bool(drafter.of("TurnEnded")))
            if drafter.side.may_draft(handle):
                done = len(drafter.ids[handle]) - 3
                wrong = (answer[done] + 1) % 64 if done < len(answer) else 0
                await drafter.draft(handle, [wrong, wrong])
        responses = await turn
        await drafter.close()
    assert token_ids(responses) == answer
    assert sum(each.depth for each in rounds(responses)) > 0
    assert sum(each.accepted_count for each in rounds(responses)) == 0


async def test_the_next_turn_finds_its_member_again_and_rewinds_it() -> None:
    async with rig(policy="fixed:3") as verifier:
        answer = await plain(verifier, max_tokens=6)
        drafter = await RawDrafter(verifier).connect()
        turn = start(verifier, "d1", max_tokens=6)
        handle = await drafter.join()
        await draft_to_the_end(drafter, handle, answer, turn)
        await turn
        kept = [1, 2, 3, *answer[:2]]
        answer2 = await plain(verifier, ids=[*kept, 9, 9], max_tokens=6)
        turn = start(verifier, "d1", turn="t2", kept=kept, ids=[9, 9], max_tokens=6)
        await drafter.frame("TurnStarted", index=1)
        await draft_to_the_end(drafter, handle, answer2, turn)
        responses = await turn
        await drafter.frame("TurnEnded", index=1)
        assert drafter.ids[handle] == [*kept, 9, 9, *answer2]
        assert len(drafter.of("Invite")) == 1
        await drafter.close()
    assert token_ids(responses) == answer2
    assert sum(each.accepted_count for each in rounds(responses)) > 0


@pytest.mark.parametrize(
    ("fingerprint", "field"),
    [
        ({"target_id": "other"}, "target_id"),
        ({"vocab_size": 65}, "vocab_size"),
        ({"block_size": 16}, "block_size"),
        ({"noise_versions": (7,)}, "noise_versions"),
        ({"tokenizer_hash": "ab"}, "tokenizer_hash"),
    ],
)
async def test_a_drafter_of_another_fingerprint_is_refused_and_listed(
    fingerprint: dict[str, Any], field: str
) -> None:
    async with rig() as verifier:
        drafter = RawDrafter(verifier, **fingerprint)
        await drafter.say(drafter._hello)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drafter.speculate.read()
        refusal = refusal_of(caught.value)
        report = await verifier.load_where(lambda load: len(load.drafters) == 1)
        await drafter.close()
    assert refusal.reason is Reason.FINGERPRINT_MISMATCH
    assert [violation.field for violation in refusal.violations] == [field]
    assert report.drafters[0].state == pb2.DrafterStatus.STATE_REFUSED and field in report.drafters[0].message


async def test_a_stream_without_hello_and_one_with_two_are_closed() -> None:
    async with rig() as verifier:
        silent = RawDrafter(verifier)
        await silent.say(Join("s1", b""), check=False)
        assert await silent.speculate.code() is grpc.StatusCode.FAILED_PRECONDITION
        twice = await RawDrafter(verifier).connect()
        await twice.say(twice._hello, check=False)
        assert await twice.speculate.code() is grpc.StatusCode.FAILED_PRECONDITION
        await silent.close()
        await twice.close()


HOSTILE: list[tuple[str, Any, Reason]] = [
    ("an id outside of the vocabulary", lambda h, n: Block(h, 0, n, (64,), b"\xff"), Reason.INVALID_TOKEN),
    ("a negative id", lambda h, n: Block(h, 0, n, (1, -1), b"\xff\xff"), Reason.INVALID_TOKEN),
    ("a long block", lambda h, n: Block(h, 0, n, (1,) * 16, b"\xff" * 16), Reason.PROTOCOL_VIOLATION),
    ("a base in the future", lambda h, n: Block(h, 0, n + 9, (1,), b"\xff"), Reason.PROTOCOL_VIOLATION),
    ("a base before the turn", lambda h, n: Block(h, 0, 1, (1,), b"\xff"), Reason.PROTOCOL_VIOLATION),
]


@pytest.mark.parametrize(("what", "lie", "reason"), HOSTILE, ids=[what for what, _, _ in HOSTILE])
async def test_a_bad_block_ends_its_own_membership_and_no_other(what: str, lie: Any, reason: Reason) -> None:
    async with rig(policy="fixed:3") as verifier:
        answer = await plain(verifier)
        drafter = await RawDrafter(verifier).connect()
        first_turn = start(verifier, "d1", turn="first", session="good", max_tokens=1)
        good = await drafter.join()
        await first_turn
        bad_turn = start(verifier, "d1", turn="bad", session="bad")
        bad = await drafter.join(index=1)
        held = await drafter.may_draft(bad)
        await drafter.say(Blocks((lie(bad, len(held)),)), check=False)
        left = await drafter.frame("Left")
        assert (left.handle, left.reason) == (bad, reason) and left.message
        assert token_ids(await bad_turn) == answer
        good_turn = start(verifier, "d1", turn="good", session="good")
        await drafter.until(lambda: any(each.turn_id == "good" for each in drafter.turns.values()))
        await draft_to_the_end(drafter, good, answer, good_turn)
        responses = await good_turn
        await drafter.close()
    assert token_ids(responses) == answer and sum(each.accepted_count for each in rounds(responses)) > 0


async def test_two_blocks_in_flight_end_the_membership() -> None:
    async with rig(policy="fixed:3", model=SlowToyModel()) as verifier:
        drafter = await RawDrafter(verifier).connect()
        turn = start(verifier, "d1", max_tokens=4000)
        handle = await drafter.join()
        held = len(await drafter.may_draft(handle))
        blocks = tuple(Block(handle, 0, held, (1, 2), b"\xff\xff") for _ in range(2))
        await drafter.say(Blocks(blocks), check=False)
        left = await drafter.frame("Left")
        turn.cancel()
        await drafter.close()
    assert left.reason is Reason.PROTOCOL_VIOLATION


async def test_a_frame_that_cannot_be_read_ends_only_what_it_names() -> None:
    async with rig(policy="fixed:3") as verifier:
        answer = await plain(verifier)
        drafter = await RawDrafter(verifier).connect()
        turn = start(verifier, "d1")
        handle = await drafter.join()
        await drafter.may_draft(handle)
        uneven = pb2.Blocks(handles=[handle, 77], base_lens=[3])
        await drafter.speculate.write(pb2.SpeculateRequest(blocks=uneven))
        left = await drafter.frame("Left")
        await drafter.speculate.write(pb2.SpeculateRequest())
        assert token_ids(await turn) == answer
        await verifier.connected()
        await drafter.close()
    assert left.handle == handle and left.reason is Reason.PROTOCOL_VIOLATION


async def test_a_join_without_an_invite_is_refused() -> None:
    async with rig() as verifier:
        drafter = await RawDrafter(verifier).connect()
        await drafter.say(Join("s1", b"guess"))
        left = await drafter.frame("Left")
        await drafter.say(Leave(5, Reason.UNSPECIFIED), check=False)
        await verifier.connected()
        await drafter.close()
    assert (left.handle, left.session_id, left.reason) == (0, "s1", Reason.JOIN_REFUSED)


async def test_a_join_that_comes_in_the_next_turn_is_good_for_it() -> None:
    async with rig(policy="fixed:3", model=SlowToyModel(), block_wait_ms=0) as verifier:
        drafter = await RawDrafter(verifier).connect()
        await start(verifier, "d1", max_tokens=2)
        await drafter.frame("Invite")  # the drafter is busy, and does not get to it before the turn is over
        turn = start(verifier, "d1", turn="t2", ids=[5], max_tokens=4000)
        await drafter.frame("Invite", index=1)
        await drafter.may_draft(await drafter.join(index=0))
        turn.cancel()
        await drafter.close()
    assert drafter.of("Left") == []


async def test_a_drafter_whose_join_is_refused_is_invited_again_and_then_replaced() -> None:
    async with rig(policy="fixed:3", model=SlowToyModel()) as verifier:
        first, second = [await RawDrafter(verifier, name).connect() for name in ("d1", "d2")]
        turn = start(verifier, "d1", "d2", max_tokens=4000)
        for index in range(2):
            await first.frame("Invite", index=index)
            await first.say(Join("s1", b"of long ago"))
            await first.frame("Left", index=index)
        await second.may_draft(await second.join())
        turn.cancel()
        for drafter in (first, second):
            await drafter.close()
    assert len(first.of("Invite")) == 2


async def test_a_drafter_that_leaves_is_replaced_by_the_next_one() -> None:
    async with rig(policy="fixed:3", model=SlowToyModel()) as verifier:
        first, second = [await RawDrafter(verifier, name).connect() for name in ("d1", "d2")]
        turn = start(verifier, "absent", "d1", "d2", max_tokens=4000)
        handle = await first.join()
        await first.say(Leave(handle, Reason.DRAFTER_DECLINED))
        handle = await second.join()
        await second.frame("TurnStarted")
        await second.may_draft(handle)
        turn.cancel()
        for drafter in (first, second):
            await drafter.close()
    assert len(first.of("Invite")) == 1


async def test_a_killed_stream_hands_the_turn_to_the_next_drafter_or_to_none() -> None:
    async with rig(policy="fixed:3") as verifier:
        answer = await plain(verifier)
        first, second = [await RawDrafter(verifier, name).connect() for name in ("d1", "d2")]
        turn = start(verifier, "d1", "d2")
        handle = await first.join()
        await first.may_draft(handle)
        await first.close()
        await second.frame("Invite")
        await second.close()
        assert token_ids(await turn) == answer
        report = await verifier.load_where(lambda load: all(each.state == LOST for each in load.drafters))
    assert len(report.drafters) == 2 and all(each.session_count == 0 for each in report.drafters)


async def test_a_drafter_that_returns_in_the_turn_is_invited_again_and_keeps_its_tokens() -> None:
    async with rig(policy="fixed:3", model=SlowToyModel()) as verifier:
        drafter = await RawDrafter(verifier).connect()
        turn = start(verifier, "d1", max_tokens=4000)
        handle = await drafter.join()
        held = list(await drafter.may_draft(handle))
        await drafter.close()
        again = await RawDrafter(verifier).connect()
        handle = await again.join(held=held)
        joined = again.of("Joined")[0]
        turn.cancel()
        await again.close()
    assert joined.keep_tokens == len(held) and handle > 1


async def test_another_drafter_that_joins_supersedes_the_member() -> None:
    async with rig(policy="fixed:3", block_wait_ms=0) as verifier:
        first = await RawDrafter(verifier, "d1").connect()
        turn = start(verifier, "d1", max_tokens=5)
        handle = await first.join()
        await turn
        second = await RawDrafter(verifier, "d2").connect()
        turn = start(verifier, "d2", turn="t2", ids=[1, 2, 3, 4])
        await second.join()
        left = await first.frame("Left")
        await turn
        for drafter in (first, second):
            await drafter.close()
    assert (left.handle, left.reason) == (handle, Reason.SUPERSEDED)


async def test_the_same_drafter_on_a_new_stream_ends_the_old_one() -> None:
    async with rig() as verifier:
        old = await RawDrafter(verifier).connect()
        new = await RawDrafter(verifier).connect()
        assert await old.speculate.code() is grpc.StatusCode.ABORTED
        await verifier.connected(1)
        for drafter in (old, new):
            await drafter.close()


async def test_context_waits_for_credit_and_comes_in_small_frames() -> None:
    prompt = [index % 64 for index in range(4000)]
    async with rig(policy="fixed:3", block_wait_ms=200) as verifier:
        drafter = await RawDrafter(verifier).connect(credit=0)
        turn = start(verifier, "d1", ids=prompt, max_tokens=4)
        handle = await drafter.join()
        await drafter.frame("TurnEnded")
        assert drafter.contexts == []
        await drafter.grant(1 << 16)
        await drafter.until(lambda: not drafter.side.member(handle).owed)  # type: ignore[union-attr]
        assert drafter.ids[handle] == prompt + token_ids(await turn)
        assert drafter.context_bytes <= 1 << 16
        await drafter.close()


async def test_a_session_cut_while_its_context_is_on_the_way_is_joined_anew() -> None:
    async with rig(policy="fixed:3", block_wait_ms=200) as verifier:
        drafter = await RawDrafter(verifier).connect(credit=0)
        turn = start(verifier, "d1", max_tokens=4)
        handle = await drafter.join()
        await turn
        turn = start(verifier, "d1", turn="t2", ids=[6], max_tokens=4)
        left = await drafter.frame("Left")
        again = await drafter.join(index=1)
        await drafter.grant(1 << 16)
        await turn
        responses = await verifier.generate(request("t3", ids=[7], max_tokens=4, drafters=["d1"]))
        expected = [7, *token_ids(responses)]
        await drafter.until(lambda: drafter.ids[again] == expected)
        await drafter.close()
    assert left.handle == handle and again > handle


async def test_a_silent_drafter_is_lost() -> None:
    async with rig(ping_every_s=0.02, silence_limit_s=0.1) as verifier:
        drafter = await RawDrafter(verifier).connect(answer=False)
        assert await drafter.speculate.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        report = await verifier.load_where(lambda load: load.drafters[0].state == LOST)
        await drafter.close()
    assert report.drafters[0].reason == Reason.SILENT


async def test_a_drafter_that_answers_pings_stays_and_its_round_trip_is_known() -> None:
    async with rig(ping_every_s=0.02, silence_limit_s=1.0) as verifier:
        drafter = await RawDrafter(verifier).connect()
        report = await verifier.load_where(lambda load: any(each.round_trip_us for each in load.drafters))
        await drafter.close()
    assert report.drafters[0].state == pb2.DrafterStatus.STATE_CONNECTED


async def test_a_feed_of_no_stream_is_refused() -> None:
    async with rig() as verifier:
        feed = verifier.stub.FeedContext()
        await feed.write(pb2.FeedContextRequest(attach=pb2.FeedAttach(stream_id=b"guess")))
        assert await feed.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_drain_is_announced_and_ends_the_streams() -> None:
    async with rig() as verifier:
        drafter = await RawDrafter(verifier).connect()
        await verifier.servicer.drain(5.0)
        await drafter.frame("Drain")
        assert await drafter.speculate.code() is grpc.StatusCode.OK
        await drafter.close()


async def test_speculation_off_invites_nobody() -> None:
    off = generation_pb2.Speculation(mode=generation_pb2.Speculation.MODE_OFF)
    async with rig() as verifier:
        drafter = await RawDrafter(verifier).connect()
        responses = await verifier.generate(request(drafters=["d1"], speculation=off))
        assert len(token_ids(responses)) == 12 and drafter.of("Invite") == []
        await drafter.close()
