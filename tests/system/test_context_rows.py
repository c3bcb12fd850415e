"""Context rows from one service to the other over real streams: a verifier and drafters in this process, a toy target."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc.aio
import numpy as np
import pytest

from drafter_service.models import NOTHING, DraftedBlock, DraftRequest
from sparkrelay.errors import refusal_of
from sparkrelay.frames import ContextKind, Fingerprint
from sparkrelay.outcomes import Reason
from tests.hostile.house import Drafter, until
from tests.verifier_service.servicer_rig import RawDrafter, Rig, request, rig, rounds, token_ids
from verifier_service.models.toy import TOY_CONTEXT, ToyModel, toy_rows_of

ROWS = {
    "context_kind": ContextKind.ROWS,
    "tap_layers": TOY_CONTEXT.tap_layers,
    "context_width": TOY_CONTEXT.width,
    "context_hash": TOY_CONTEXT.hash,
}
LONG = [i * i % 61 + 1 for i in range(2000)]


class RowsEcho:
    """A draft model that knows the text and holds the verifier to its word: the rows of all ids but the last, right ones.

    seen   lengths of the sessions it was asked about
    """

    vocab_size = 0
    fingerprint = Fingerprint(block_size=7, proposal_kind="rows-echo", **ROWS)

    def __init__(self, text: Sequence[int]) -> None:
        self.text = list(text)
        self.seen: list[int] = []

    def draft(self, requests: Sequence[DraftRequest]) -> list[DraftedBlock]:
        return [self._block(each) for each in requests]

    def forget(self, session_key: int) -> None:
        pass

    def _block(self, asked: DraftRequest) -> DraftedBlock:
        length = len(asked.ids)
        assert asked.rows is not None
        (span,) = asked.rows.spans(0, length - 1)
        assert span.start == 0 and np.array_equal(span.rows, toy_rows_of(asked.ids[:-1])), "other rows"
        self.seen.append(length)
        ids = self.text[length : length + asked.token_limit]
        if length % 3 == 0:
            ids = ids[:1]
        elif length % 3 == 1 and ids:
            ids[-1] ^= 1
        return DraftedBlock(ids, [0.9] * len(ids)) if ids else NOTHING


def rows_rig(**settings: Any) -> Any:
    return rig(model=ToyModel(context=TOY_CONTEXT), policy="fixed:7", **settings)


async def answer_of(verifier: Rig, ids: Sequence[int], session: str, **fields: Any) -> list[int]:
    return token_ids(await verifier.generate(request(f"t-{session}", session=session, ids=ids, **fields)))


async def speak(
    verifier: Rig, turn: str, ids: Sequence[int], kept: Sequence[int], max_tokens: int
) -> tuple[list[int], list[Any]]:
    """A turn of session s1 with the drafter: its tokens and rounds."""
    wanted = request(turn, ids=ids, kept=kept, drafters=("d",), max_tokens=max_tokens)
    async with asyncio.timeout(30):
        responses = await verifier.generate(wanted)
    return token_ids(responses), rounds(responses)


async def test_a_drafter_has_the_rows_of_all_but_the_last_id_whenever_it_is_asked() -> None:
    async with rows_rig() as verifier:
        first = await answer_of(verifier, LONG[:700], "plain", max_tokens=40)
        whole = [*LONG[:700], *first]
        second = await answer_of(verifier, [*whole[:720], 9, 8], "plain-2", max_tokens=30)
        echo = RowsEcho(whole)
        async with Drafter([verifier.address], "d", model=echo).running() as drafter:
            await until(lambda: drafter.connected)
            await verifier.connected()
            said, done = await speak(verifier, "t1", LONG[:700], (), 40)
            echo.text = [*whole[:720], 9, 8, *second]
            again, more = await speak(verifier, "t2", (9, 8), whole[:720], 30)
        assert (said, again) == (first, second)
    assert min(echo.seen) >= 700 and len(echo.seen) > 6
    for part in (done, more):
        assert sum(r.depth for r in part) > sum(r.accepted_count for r in part) > 0


async def test_a_drafter_that_is_restarted_goes_on_as_if_it_had_always_been_there() -> None:
    async with rows_rig() as verifier:
        first = await answer_of(verifier, LONG, "plain", max_tokens=12)
        whole = [*LONG, *first]
        second = await answer_of(verifier, [*whole, 5], "plain-2", max_tokens=12)
        text = [*whole, 5, *second]
        async with Drafter([verifier.address], "d", model=RowsEcho(text)).running() as drafter:
            await until(lambda: drafter.connected)
            await verifier.connected()
            said, _ = await speak(verifier, "t1", LONG, (), 12)
        assert said == first
        await verifier.connected(0)
        cold = RowsEcho(text)
        async with Drafter([verifier.address], "d", model=cold).running() as drafter:
            await until(lambda: drafter.connected)
            await verifier.connected()
            again, done = await speak(verifier, "t2", (5,), whole, 12)
    assert again == second
    assert cold.seen[0] in (len(whole) + 1, len(whole) + 2), (
        "it drafts from the first block on, 2,000 tokens in"
    )
    assert sum(r.accepted_count for r in done) > 0


@pytest.mark.parametrize("field", ["context_hash", "context_width", "tap_layers", "context_kind"])
async def test_a_drafter_of_other_rows_is_refused_and_told_which(field: str) -> None:
    others = {"context_hash": "another", "context_width": 8, "tap_layers": (1,)}
    async with rig(model=ToyModel(context=None if field == "context_kind" else TOY_CONTEXT)) as verifier:
        drafter = RawDrafter(verifier, "d", **{**ROWS, **({field: others[field]} if field in others else {})})
        await drafter.say(drafter._hello)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drafter.speculate.read()
        refusal = refusal_of(caught.value)
        report = await verifier.load_where(lambda load: len(load.drafters) == 1)
        await drafter.close()
    assert refusal.reason is Reason.FINGERPRINT_MISMATCH
    assert field in {violation.field for violation in refusal.violations}
    assert field in report.drafters[0].message


async def test_a_drafter_of_tokens_is_welcome_where_rows_are_made_and_gets_none() -> None:
    async with rows_rig(block_wait_ms=200) as verifier:
        answer = await answer_of(verifier, LONG[:100], "plain", max_tokens=12)
        drafter = await RawDrafter(verifier, "d").connect()
        turn = asyncio.create_task(speak(verifier, "t1", LONG[:100], (), 12))
        handle = await drafter.join()
        ids = await drafter.may_draft(handle)
        await drafter.draft(handle, answer[len(ids) - 100 :][:3])
        said, _ = await turn
        await drafter.frame("TurnEnded")
        assert said == answer
        assert drafter.contexts and all(context.rows is None for context in drafter.contexts)
        verdicts = [entry for frame in drafter.of("Verdicts") for entry in frame.entries]
        assert verdicts and all(verdict.rows is None for verdict in verdicts)
        await drafter.close()
