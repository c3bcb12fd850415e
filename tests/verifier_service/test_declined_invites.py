"""A drafter that declines an invite: the alternate is asked at once, and nobody waits for the one that is full."""

from __future__ import annotations

import asyncio

from sparkrelay.frames import Join, Leave
from sparkrelay.outcomes import Reason
from tests.verifier_service.servicer_rig import RawDrafter, request, rig, rounds, token_ids

NEVER_MS = 60_000  # the engine would wait so long for a drafter that says nothing


async def decline(drafter: RawDrafter, *, index: int = 0) -> None:
    invite = await drafter.frame("Invite", index=index)
    await drafter.say(Leave(0, Reason.DRAFTER_DECLINED, invite.session_id))


async def test_the_alternate_is_invited_at_once_and_drafts() -> None:
    async with rig(policy="fixed:3", block_wait_ms=NEVER_MS) as verifier:
        plain = token_ids(await verifier.generate(request("plain", session="plain")))
        full = await RawDrafter(verifier, "full").connect()
        free = await RawDrafter(verifier, "free").connect()
        await verifier.connected(2)
        turn = asyncio.create_task(verifier.generate(request(drafters=("full", "free"))))
        await decline(full)
        handle = await free.join()
        await free.until(lambda: free.side.may_draft(handle))
        done = len(free.ids[handle]) - 3
        await free.draft(handle, plain[done : done + 3])
        await free.until(lambda: any(each.entries[0].accepted_count for each in free.of("Verdicts")))
        await free.close()  # the rest is plain decoding
        responses = await turn
        await full.close()
    assert token_ids(responses) == plain
    assert {report.drafter_id for report in rounds(responses)} >= {"free"}
    assert len(full.of("Invite")) == 1, "asked once in this turn"


async def test_if_all_decline_the_turn_waits_for_nobody_and_the_next_turn_asks_again() -> None:
    async with rig(policy="fixed:3", block_wait_ms=NEVER_MS) as verifier:
        full = await RawDrafter(verifier, "full").connect()
        await verifier.connected()
        for index in range(2):
            turn = asyncio.create_task(
                verifier.generate(request(f"t{index}", session=f"s{index}", drafters=("full",)))
            )
            await decline(full, index=index)
            async with asyncio.timeout(30):
                assert len(token_ids(await turn)) == 12
        await full.close()
    assert len(full.of("Left")) == 0


async def test_a_leave_that_declines_nothing_is_ignored() -> None:
    async with rig() as verifier:
        drafter = await RawDrafter(verifier).connect()
        await drafter.say(Leave(0, Reason.DRAFTER_DECLINED, "nobody invited"))
        await drafter.say(Leave(0, Reason.UNSPECIFIED))
        turn = asyncio.create_task(verifier.generate(request(drafters=("d1",), max_tokens=3)))
        await drafter.join()
        await drafter.close()
        assert len(token_ids(await turn)) == 3


async def test_who_declined_may_not_join_with_the_same_token() -> None:
    async with rig() as verifier:
        full = await RawDrafter(verifier, "full").connect()
        turn = asyncio.create_task(verifier.generate(request(drafters=("full",), max_tokens=4)))
        await decline(full)
        invite = await full.frame("Invite")
        await full.say(Join(invite.session_id, invite.token))
        left = await full.frame("Left")
        assert (left.session_id, left.reason) == (invite.session_id, Reason.JOIN_REFUSED)
        await turn
        await full.close()
