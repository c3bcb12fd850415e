"""What can be measured, each behind one call: so many users' prompts in, what they saw out.

`StackSystem` is what `sparkrelay up` starts, through the SDK; `ChildSystem` is anything that speaks the JSON lines of
`benchmarks.child` in a process of its own: transformers, vLLM, our engine without its services.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import sparkrelay.client.aio
from benchmarks.figures import Answer, Mark, Run
from sparkrelay.cli.stack import Stack
from sparkrelay.cli.stack_plan import StackOptions, any_free_port, plan_stack
from sparkrelay.cli.up import core_count

ROOT = Path(__file__).resolve().parents[1]
CHILD_END_S = 15.0
START_LIMIT_S = 600.0  # as long as others may take to compile
Mode = Mapping[str, Any]
Prompts = Sequence[Sequence[int]]


class Gap(Exception):
    """A system that cannot be measured here; the text says why, for the table and the JSON object."""


class System(Protocol):
    """Something that answers users. While it is not asked it leaves the cores alone."""

    def run(self, prompts: Prompts, token_count: int, mode: Mode) -> Run:
        """One user a prompt, all at once, exactly token_count greedy tokens each. Raises Gap if it cannot."""
        ...


def stack_options_of(model: str, dtype: str, threads: int, drafter: str = "ngram") -> StackOptions:
    """A stack as `sparkrelay up` plans it, with so many threads for the verifier; the drafter's are its plan's."""
    flags: dict[str, tuple[str, ...]] = {"verifier": ("--threads", str(threads))}
    return StackOptions(model, drafter, dtype=dtype, log_level="warning", drain_ms=500, flags=flags)


class StackSystem:
    """Gateway, verifier and drafter as `sparkrelay up` plans them; a context manager.

    A run's mode is {"speculation": "off", "auto" or "fixed:K"}.
    """

    def __init__(self, options: StackOptions, folder: Path) -> None:
        self.stack = Stack(plan_stack(options, core_count(), any_free_port), folder)

    def __enter__(self) -> Self:
        self.stack.__enter__()
        try:
            self.stack.wait_until_ready(timeout_s=START_LIMIT_S)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.__exit__(kind, error, trace)

    def run(self, prompts: Prompts, token_count: int, mode: Mode) -> Run:
        return asyncio.run(self._run(prompts, token_count, str(mode["speculation"])))

    async def _run(self, prompts: Prompts, token_count: int, speculation: str) -> Run:
        async with sparkrelay.client.aio.connect(self.stack.gateway) as client:
            await client.list_models()  # the connection is not part of what is measured
            begun = time.perf_counter()
            answers = await asyncio.gather(
                *(_ask(client, ids, token_count, speculation, begun) for ids in prompts)
            )
            return Run(tuple(answers), time.perf_counter() - begun)


async def _ask(
    client: sparkrelay.client.aio.AsyncClient,
    prompt: Sequence[int],
    token_count: int,
    speculation: str,
    begun: float,
) -> Answer:
    ids: list[int] = []
    marks: list[Mark] = []
    stream = client.generate_stream(
        token_ids=prompt, max_tokens=token_count, speculation=speculation, ignore_default_stop_ids=True
    )
    async with stream:
        async for delta in stream:
            ids += delta.token_ids
            marks.append((time.perf_counter() - begun, len(ids)))
        rounds = (await stream.result()).totals.rounds  # tokens of several rounds may come in one delta
    return Answer(tuple(ids), tuple(marks), rounds)


class ChildSystem:
    """A process that answers JSON lines; a context manager. What it prints besides goes to a file of `folder`.

    about  what the child says of itself: versions, settings
    """

    def __init__(
        self,
        name: str,
        module: str,
        options: Mapping[str, Any],
        folder: Path,
        *,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.about: dict[str, Any] = {}
        self._command = [python, "-m", module, json.dumps(dict(options))]
        self._environment = {**os.environ, **(environment or {})}
        self._log_file = folder / f"{name.replace(' ', '-')}.log"
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def __enter__(self) -> Self:
        """Returns when it is ready. Raises Gap if it ends instead."""
        self._log = self._log_file.open("w", encoding="utf-8")
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                cwd=ROOT,
                env=self._environment,
            )
        except OSError as error:
            self._log.close()
            raise Gap(f"{self._command[0]} cannot be started: {error}") from None
        try:
            self.about = self._read()["about"]
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, prompts: Prompts, token_count: int, mode: Mode) -> Run:
        assert self._process is not None and self._process.stdin is not None
        request = {
            "prompts": [list(ids) for ids in prompts],
            "token_count": token_count,
            "mode": dict(mode),
        }
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Gap(self._last_words()) from None
        return run_of(self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Gap(self._last_words())
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise Gap(str(message["error"]))
        return message

    def _last_words(self) -> str:
        lines = self._log_file.read_text(encoding="utf-8", errors="replace").split("\n")
        tail = " / ".join(line.strip() for line in lines if line.strip())[-400:]
        return f"the process of {self.name} ended: {tail}"

    def _end(self) -> None:
        """Its input ends, so it does; if not, it is killed."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None and self._log is not None
        try:
            process.stdin.close()
            process.wait(CHILD_END_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
        process.stdout.close()
        self._log.close()
        self._process = None


def run_of(message: Mapping[str, Any]) -> Run:
    """A child's answer as a run."""
    answers = tuple(
        Answer(tuple(each["token_ids"]), tuple((float(at), int(count)) for at, count in each["marks"]))
        for each in message["answers"]
    )
    return Run(answers, float(message["wall_s"]), message.get("notes", {}))
