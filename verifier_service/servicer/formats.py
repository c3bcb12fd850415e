"""Response formats become grammars beside the event loop and the device: one text once, few at a time, in bounded time."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from sparkrelay.outcomes import FieldViolation, Reason, Refusal
from sparkrelay.response_format import ResponseFormat
from verifier_service.grammar import Grammar
from verifier_service.grammar_compiler import refusal_of

Compile = Callable[[ResponseFormat], Awaitable[Grammar]]

KEPT_GRAMMARS = 64
COMPILING_LIMIT = 32  # texts that may be under way or wait; beyond it a turn is refused
COMPILE_LIMIT_S = 5.0  # for a turn, waiting included
RETRY_AFTER_MS = 500


class Formats:
    """The grammars of late, by their text. Lives on the event loop.

    compile_format  makes a grammar, raises Refusal. None: this verifier can keep to no format
    """

    def __init__(
        self,
        compile_format: Compile | None,
        *,
        limit_s: float = COMPILE_LIMIT_S,
    ) -> None:
        self._compile = compile_format
        self._limit_s = limit_s
        self._grammars: OrderedDict[ResponseFormat, Grammar] = OrderedDict()  # least recently used first
        self._compiling: dict[ResponseFormat, asyncio.Task[Grammar]] = {}

    @property
    def available(self) -> bool:
        """Whether any format can be kept to."""
        return self._compile is not None

    async def grammar(self, wanted: ResponseFormat) -> Grammar:
        """The grammar of a format, from the cache or compiled. Raises Refusal."""
        known = self._grammars.get(wanted)
        if known is not None:
            self._grammars.move_to_end(wanted)
            return known
        task = self._compiling.get(wanted) or self._start(wanted)
        try:
            async with asyncio.timeout(self._limit_s):
                # Others may wait for the same text: only this turn gives up.
                return await asyncio.shield(task)
        except TimeoutError:
            message = f"is not compiled after {self._limit_s:g} s; send a simpler one, or try again"
            raise refusal_of(wanted, message) from None

    def _start(self, wanted: ResponseFormat) -> asyncio.Task[Grammar]:
        if self._compile is None:
            message = (
                "cannot be kept: this verifier's model has no text, or none that can be read; leave it out"
            )
            raise Refusal(
                Reason.INVALID_FIELD,
                f"response_format: {message}",
                violations=(FieldViolation("response_format", message),),
            )
        if len(self._compiling) >= COMPILING_LIMIT:
            message = f"{COMPILING_LIMIT} response formats are being compiled already; try again"
            raise Refusal(Reason.OVERLOADED, message, retry_after_ms=RETRY_AFTER_MS)
        task = asyncio.create_task(self._made(wanted, self._compile))
        task.add_done_callback(_retrieved)
        self._compiling[wanted] = task
        return task

    async def _made(self, wanted: ResponseFormat, compile_format: Compile) -> Grammar:
        try:
            grammar = await compile_format(wanted)
        finally:
            del self._compiling[wanted]
        self._grammars[wanted] = grammar
        if len(self._grammars) > KEPT_GRAMMARS:
            self._grammars.popitem(last=False)
        return grammar


def _retrieved(task: asyncio.Task[Grammar]) -> None:
    """All who waited may be gone: then nobody asks for the failure, and that is no reason to warn."""
    if not task.cancelled():
        task.exception()
