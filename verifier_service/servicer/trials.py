"""Response formats are tried in a process beside this one, which can be ended: no text hangs or breaks the verifier."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import structlog

from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.response_format import ResponseFormat
from verifier_service.grammar import Grammar
from verifier_service.grammar_compiler import GrammarCompiler, refusal_of

log = structlog.get_logger(__name__)

TRIAL_LIMIT_S = 2.0
START_LIMIT_S = 30.0
ENDING_LIMIT_S = 1.0


class TriedCompiler:
    """Makes a grammar once the process beside us has made it in time. Lives on the event loop.

    argv      the process: `python -m verifier_service.grammar_trial` with its arguments
    executor  where this process compiles what has passed
    """

    def __init__(
        self,
        compiler: GrammarCompiler,
        argv: Sequence[str],
        executor: Executor,
        *,
        limit_s: float = TRIAL_LIMIT_S,
    ) -> None:
        self._compiler = compiler
        self._argv = argv
        self._executor = executor
        self._limit_s = limit_s
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()
        self.ended_count = 0  # processes that a format has ended

    @classmethod
    def load(cls, tokenizer_file: Path, vocab_size: int, end_ids: Sequence[int]) -> Self:
        """As `GrammarCompiler.load`, with a process that does the same."""
        compiler = GrammarCompiler.load(tokenizer_file, vocab_size, end_ids)
        program = [sys.executable, "-m", "verifier_service.grammar_trial"]
        argv = [*program, str(tokenizer_file), str(vocab_size), json.dumps(list(end_ids))]
        return cls(compiler, argv, ThreadPoolExecutor(1, "grammar"))

    async def compile(self, wanted: ResponseFormat) -> Grammar:
        """Raises Refusal(GRAMMAR_REFUSED)."""
        async with self._one_at_a_time:
            message = await self._trial(wanted)
        if message:
            raise refusal_of(wanted, message)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._compiler.compile, wanted)

    async def warm(self) -> None:
        """Starts the process, so that the first format need not wait for it."""
        async with self._one_at_a_time:
            try:
                await self._running()
            except Refusal as refusal:
                log.warning("response formats will be refused", reason=refusal.message)

    async def close(self) -> None:
        async with self._one_at_a_time:
            await self._end()

    async def _trial(self, wanted: ResponseFormat) -> str:
        """Why a format is refused, "" if it is not."""
        process = await self._running()
        line = json.dumps({"kind": wanted.kind.value, "text": wanted.text}) + "\n"
        try:
            async with asyncio.timeout(self._limit_s):
                message = (await _ask(process, line)).get("message", "")
        except TimeoutError:
            message = f"takes more than {self._limit_s:g} s to compile; make it simpler"
        except EOFError:
            message = "is more than the grammar compiler can bear; make it simpler"
        except asyncio.CancelledError:
            await self._end()  # its answer would be taken for the next one's
            raise
        else:
            return message
        self.ended_count += 1
        await self._end()
        return message

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        pipe = asyncio.subprocess.PIPE
        # Its own session: Ctrl-C at a terminal is for the verifier, and this one ends with its input.
        process = await asyncio.create_subprocess_exec(
            *self._argv, stdin=pipe, stdout=pipe, start_new_session=True
        )
        self._process = process
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await _ask(process, "")
        except (TimeoutError, EOFError):
            await self._end()
            message = f"the grammar compiler's process does not start (exit code {process.returncode})"
            raise Refusal(Reason.INTERNAL, message) from None
        except asyncio.CancelledError:
            await self._end()
            raise
        return process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdout is not None
        # One that has ended is waited for, not killed: `kill` would take its exit code away from asyncio.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDING_LIMIT_S if process.stdout.at_eof() else 0):
                await process.wait()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _ask(process: asyncio.subprocess.Process, line: str) -> dict[str, str]:
    """Sends a line (none if empty) and reads one. Raises EOFError if the process is gone."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line.encode())
        await process.stdin.drain()
    except ConnectionError:
        raise EOFError from None
    answer = await process.stdout.readline()
    if not answer:
        raise EOFError
    found: dict[str, str] = json.loads(answer)
    return found
