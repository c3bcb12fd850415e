"""The users of a soak run: each leads one session after another, each with several turns, some cancelled, some taken back.

What a user does is drawn from a generator with a seed of its own; when it happens depends on the machine.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparkrelay.client.aio import AsyncClient, AsyncSession
from sparkrelay.client.aio_stream import AsyncGenerationStream
from sparkrelay.client.errors import SparkRelayError

CANCEL_SHARE = 0.2
REWIND_SHARE = 0.25
SAMPLED_SHARE = 0.4
PLAIN_SHARE = 0.2
STAY_SHARE = 0.1  # sessions that are not ended when their user goes on to the next one
TEMPERATURE = 0.8
BUSY = "SESSION_BUSY"
BUSY_PAUSES_S = (0.01, 0.05, 0.2, 1.0, 5.0)


@dataclass(frozen=True, slots=True)
class Habits:
    """Bounds of what users ask for, in tokens and turns, both ends included.

    vocab_size   prompts are drawn from the ids below it
    context      a conversation never grows beyond
    """

    vocab_size: int
    context: int = 900
    first_prompt: tuple[int, int] = (4, 400)
    later_prompt: tuple[int, int] = (2, 60)
    answer: tuple[int, int] = (4, 64)
    turns: tuple[int, int] = (1, 6)


@dataclass(slots=True)
class Tally:
    """What all users have done so far. errors by reason; busy: how often a turn came before the cancelled one had ended."""

    turns: int = 0
    tokens: int = 0
    cancelled: int = 0
    rewinds: int = 0
    sessions: int = 0
    busy: int = 0
    drafted: int = 0
    accepted: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class User:
    """One user of a closed loop: the next request goes out when the last answer is there."""

    def __init__(
        self, client: AsyncClient, habits: Habits, seed: int, texts: Sequence[Sequence[int]], tally: Tally
    ) -> None:
        """texts  what prompts are made of; without any they are drawn at random."""
        self._client = client
        self._habits = habits
        self._random = random.Random(seed)
        self._texts = texts
        self._tally = tally
        self._left_open: list[AsyncSession] = []

    async def live(self, goes_on: Callable[[], bool]) -> None:
        """One session after another while `goes_on`; ends every session before it returns."""
        while goes_on():
            try:
                await self._one_session(goes_on)
            except SparkRelayError as error:
                self._tally.errors[error.reason] += 1
        for session in self._left_open:
            await session.end()

    async def _one_session(self, goes_on: Callable[[], bool]) -> None:
        session = await self._client.create_session()
        self._tally.sessions += 1
        stays = self._random.random() < STAY_SHARE
        try:
            conversation = self._words(*self._habits.first_prompt)
            for _ in range(self._random.randint(*self._habits.turns)):
                conversation = await self._turn(session, conversation)
                conversation = self._next_prompt(conversation)
                if not goes_on() or len(conversation) > self._habits.context:
                    break
        finally:
            if stays:
                self._left_open.append(session)
            else:
                await session.end()

    async def _turn(self, session: AsyncSession, conversation: list[int]) -> list[int]:
        """Asks, perhaps cancels on the way, and returns the conversation with what came."""
        draw = self._random
        most = draw.randint(*self._habits.answer)
        cancel_after = draw.randint(1, most) if draw.random() < CANCEL_SHARE else None
        ids: list[int] = []
        async with await self._open(session, conversation, most) as stream:
            async for delta in stream:
                ids += delta.token_ids
                if cancel_after is not None and len(ids) >= cancel_after:
                    break
            else:
                totals = (await stream.result()).totals
                self._tally.drafted += totals.drafted
                self._tally.accepted += totals.accepted
                cancel_after = None
        self._tally.turns += 1
        self._tally.tokens += len(ids)
        self._tally.cancelled += cancel_after is not None
        return conversation + ids

    async def _open(self, session: AsyncSession, conversation: list[int], most: int) -> AsyncGenerationStream:
        """Begins a turn; asks again for a while when the one that was just cancelled has not ended yet."""
        options = self._options()
        for pause_s in (*BUSY_PAUSES_S, None):
            stream = session.generate_stream(token_ids=conversation, max_tokens=most, **options)
            try:
                return await stream.__aenter__()
            except SparkRelayError as error:
                if pause_s is None or error.reason != BUSY:
                    raise
                self._tally.busy += 1
                await asyncio.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def _options(self) -> dict[str, Any]:
        draw = self._random
        options: dict[str, Any] = {"ignore_default_stop_ids": True}
        if draw.random() < SAMPLED_SHARE:
            options |= {"temperature": TEMPERATURE, "seed": draw.getrandbits(32)}
        if draw.random() < PLAIN_SHARE:
            options["speculation"] = "off"
        return options

    def _next_prompt(self, conversation: list[int]) -> list[int]:
        """What is asked next: the conversation, perhaps with its end taken back, and something new."""
        if self._random.random() < REWIND_SHARE:
            self._tally.rewinds += 1
            conversation = conversation[: self._random.randint(1, len(conversation))]
        return conversation + self._words(*self._habits.later_prompt)

    def _words(self, least: int, most: int) -> list[int]:
        """So many ids: the beginning of a text over and over, which gives prompt lookup something to find, or random ones."""
        count = self._random.randint(least, most)
        if not self._texts:
            return [self._random.randrange(self._habits.vocab_size) for _ in range(count)]
        text = self._random.choice(self._texts)
        return (list(text) * (count // len(text) + 1))[:count]
