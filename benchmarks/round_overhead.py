"""What a round costs when the models cost nothing: the wall time of verdict -> block -> verdict between two real processes.

    python benchmarks/round_overhead.py [--quick] [--json FILE]

A verifier with the model toy:free and a drafter of kind cycle run as processes on loopback; this process opens 1, 16 and 256
turns at once with the verifier's own Generate call. The time of a round is what the verifier's round reports say: from the end
of the session's previous step to the end of this one (wait_us + verify_us), nothing subtracted, so with N sessions it is the
time of a step of all of them. As a check the same is computed from this process's clock: wall time of N rounds / N.
Bytes are all TCP payload between drafter and verifier, both ways (HTTP/2 framing, pings and acknowledgements included), counted
by a proxy in a run of its own, over rounds x sessions. The second column is the demo model with prompt lookup.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc.aio
from rich.console import Console
from rich.table import Table

from sparkrelay.cli.stack import Stack
from sparkrelay.cli.stack_plan import StackOptions, any_free_port, plan_stack
from sparkrelay.cli.up import core_count
from sparkrelay.server import CHANNEL_OPTIONS
from sparkrelay.v1 import generation_pb2, verifier_service_pb2, verifier_service_pb2_grpc
from sparkrelay.wire import commits

BUDGET_MS = {1: 1.0, 16: 1.2, 256: 2.0}
BUDGET_BYTES = 80
FREE_VOCAB_SIZE = 16
PromptOf = Callable[[int], list[int]]
CAPTION = "wall: of all rounds / their number; drafted: rounds with a block; tokens: a round; bytes: a session and round"
FREE_COLUMN = "zero-cost"
DEMO_COLUMN = "demo model"
FREE_TOKENS_A_ROUND = 5  # `auto` checks 4 draft tokens, the cycle drafter is always right
DEMO_TOKENS_A_ROUND = 2
PROMPT_TEXT = (
    "The boats come back in the evening with fish and stories. The people of the harbour buy the fish and believe some of "
    "the stories. When the boats leave the harbour in the morning the people of the harbour"
)
EDGE_ROUNDS = 5  # at both ends of a turn other turns may not run yet, or no longer


@dataclass(frozen=True, slots=True)
class Workload:
    """One column: which services, what the turns begin with, and how many tokens a round commits (about, for the demo model)."""

    stack: StackOptions
    prompt: PromptOf
    tokens_a_round: int


@dataclass(frozen=True, slots=True)
class Load:
    """How much to run: rounds a session by number of sessions, for both columns."""

    free: dict[int, int]
    demo: dict[int, int]


FULL = Load({1: 4000, 16: 2000, 256: 500}, {1: 100, 16: 40, 256: 12})
QUICK = Load({1: 500, 16: 300, 256: 100}, {1: 40, 16: 20})


@dataclass(frozen=True, slots=True)
class Measured:
    """One run. p50_ms and p99_ms are of single rounds; wall_ms is the wall time of all / the rounds of the longest turn."""

    sessions: int
    round_count: int
    p50_ms: float
    p99_ms: float
    wall_ms: float
    block_share: float
    accepted_length: float


def main() -> None:
    options = _arguments()
    load = QUICK if options.quick else FULL
    console = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="sparkrelay-bench-") as folder:
        columns = {FREE_COLUMN: run_column(FREE, load.free, Path(folder), console)}
        bytes_per_round = count_bytes(FREE, load.free, Path(folder), console)
        if not options.no_demo_model:
            columns[DEMO_COLUMN] = run_column(DEMO, load.demo, Path(folder), console)
    Console(highlight=False).print(table(columns, bytes_per_round))
    result = as_json(columns, bytes_per_round)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def run_column(workload: Workload, rounds: dict[int, int], folder: Path, console: Console) -> list[Measured]:
    """Starts the processes of one column and runs every number of sessions on them."""
    console.print(f"starting {workload.stack.model} + {workload.stack.drafter} ...")
    with Stack(plan_stack(workload.stack, core_count(), any_free_port), folder) as stack:
        stack.wait_until_ready()
        asyncio.run(drive(stack.verifier, 1, 10, workload))  # the first turn warms both processes up
        measured = []
        for sessions, count in rounds.items():
            console.print(f"  {sessions} sessions, {count} rounds each ...")
            measured.append(asyncio.run(drive(stack.verifier, sessions, count, workload)))
        return measured


def count_bytes(
    workload: Workload, rounds: dict[int, int], folder: Path, console: Console
) -> dict[int, float]:
    """Bytes per session and round, by number of sessions, with a proxy between drafter and verifier."""
    console.print("counting bytes ...")
    result = {}
    with CountingProxy() as proxy:
        plan = plan_stack(workload.stack, core_count(), any_free_port, drafters_dial=proxy.listen)
        proxy.target = plan.verifier.listen
        with Stack(plan, folder) as stack:
            stack.wait_until_ready()
            asyncio.run(drive(stack.verifier, 1, 10, workload))
            for sessions, full_count in rounds.items():
                before = proxy.byte_count
                run = asyncio.run(drive(stack.verifier, sessions, max(full_count // 4, 50), workload))
                result[sessions] = (proxy.byte_count - before) / (sessions * run.round_count)
    return result


async def drive(verifier: str, sessions: int, rounds: int, workload: Workload) -> Measured:
    """Runs so many turns at once, each of about so many rounds, and measures them."""
    async with grpc.aio.insecure_channel(verifier, options=CHANNEL_OPTIONS) as channel:
        stub = verifier_service_pb2_grpc.VerifierServiceStub(channel)
        run_id = f"{time.monotonic_ns():x}"
        token_count = rounds * workload.tokens_a_round + 1
        prompts = [workload.prompt(number) for number in range(sessions)]
        started = time.monotonic()
        turns = [
            run_turn(stub, f"{run_id}-{number}", token_count, prompt) for number, prompt in enumerate(prompts)
        ]
        answers = await asyncio.gather(*turns)
        wall_s = time.monotonic() - started
    return measure(sessions, answers, wall_s)


async def run_turn(
    stub: verifier_service_pb2_grpc.VerifierServiceAsyncStub,
    turn_id: str,
    token_count: int,
    prompt: list[int],
) -> list[verifier_service_pb2.CommitBatch]:
    """One turn of exactly `token_count` tokens; returns everything it committed."""
    request = verifier_service_pb2.VerifierServiceGenerateRequest(
        session_id=turn_id,
        turn_id=turn_id,
        append_token_ids=prompt,
        output_start=len(prompt),
        stop=generation_pb2.StopConditions(max_token_count=token_count, ignore_default_stop_ids=True),
        drafter_ids=["drafter-1"],
    )
    batches = [event.committed async for event in stub.Generate(request) if event.HasField("committed")]
    await stub.EndSession(verifier_service_pb2.VerifierServiceEndSessionRequest(session_id=turn_id))
    return batches


def measure(
    sessions: int, answers: Sequence[list[verifier_service_pb2.CommitBatch]], wall_s: float
) -> Measured:
    """Boils the round reports of all turns down. The first and last rounds of each turn are left out: not all turns run then."""
    turns = [
        [commit.report for batch in batches for commit in commits(batch) if commit.report is not None]
        for batches in answers
    ]
    kept = [
        report
        for rounds in turns
        for report in rounds[EDGE_ROUNDS : max(len(rounds) - EDGE_ROUNDS, EDGE_ROUNDS + 1)]
    ]
    times = sorted((report.wait_us + report.verify_us) / 1000 for report in kept)
    return Measured(
        sessions=sessions,
        round_count=max(len(rounds) for rounds in turns),
        p50_ms=times[len(times) // 2],
        p99_ms=times[len(times) * 99 // 100],
        wall_ms=1000 * wall_s / max(len(rounds) for rounds in turns),
        block_share=statistics.fmean(report.depth > 0 for report in kept),
        accepted_length=1 + statistics.fmean(report.accepted_count for report in kept),
    )


def free_prompt(number: int) -> list[int]:
    """Where in the circle of toy:free a session starts."""
    return [number % FREE_VOCAB_SIZE]


def text_prompt(number: int) -> list[int]:
    """A text of about 60 tokens, another one for each session."""
    from tokenizers import Tokenizer

    from sparkrelay.store import resolve

    tokenizer = Tokenizer.from_file(str(Path(resolve(DEMO.stack.model).path) / "tokenizer.json"))
    text = f"{number} boats leave the harbour in the morning. {PROMPT_TEXT}"
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


# Every block is waited for, however late: otherwise a target that costs nothing decodes on alone, faster than anybody can draft.
# Room in a step for all drafted tokens of 256 sessions.
PATIENT = {"verifier": ("--block-wait-ms", "5000", "--step-token-budget", "4096")}
FREE = Workload(
    StackOptions("toy:free", "cycle", log_level="warning", flags=PATIENT), free_prompt, FREE_TOKENS_A_ROUND
)
DEMO = Workload(
    StackOptions("smollm2-135m", "ngram", log_level="warning", flags=PATIENT),
    text_prompt,
    DEMO_TOKENS_A_ROUND,
)


class CountingProxy:
    """Passes TCP connections on to `target` and counts what goes through, both ways. Runs on a thread of its own."""

    def __init__(self) -> None:
        self.target = ""
        self.listen = ""
        self.byte_count = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> CountingProxy:
        self._thread.start()
        start = asyncio.start_server(self._connected, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.listen = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            self._pump(reader, far_writer), self._pump(far_reader, writer), return_exceptions=True
        )

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.byte_count += len(data)
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


def table(columns: dict[str, list[Measured]], bytes_per_round: dict[int, float]) -> Table:
    """One row a number of sessions."""
    result = Table(
        title="A round (verdict -> block -> verdict), all sessions in one step", title_justify="left"
    )
    result.add_column("models")
    for heading in ("sessions", "p50 ms", "budget", "p99 ms", "wall ms", "drafted", "tokens", "bytes"):
        result.add_column(heading, justify="right")
    result.caption = CAPTION
    for name, measured in columns.items():
        for run in measured:
            free = name == FREE_COLUMN
            result.add_row(
                name,
                str(run.sessions),
                f"{run.p50_ms:.2f}",
                f"{BUDGET_MS[run.sessions]:.1f}" if free else "",
                f"{run.p99_ms:.2f}",
                f"{run.wall_ms:.2f}",
                f"{run.block_share:.0%}",
                f"{run.accepted_length:.2f}",
                f"{bytes_per_round[run.sessions]:.0f}" if free else "",
            )
        result.add_section()
    return result


def as_json(columns: dict[str, list[Measured]], bytes_per_round: dict[int, float]) -> dict[str, object]:
    """The result for programs: times of the zero-cost models by number of sessions."""
    free = columns[FREE_COLUMN]
    return {
        "p50_ms": {str(run.sessions): round(run.p50_ms, 3) for run in free},
        "p99_ms": {str(run.sessions): round(run.p99_ms, 3) for run in free},
        "bytes_per_round": round(bytes_per_round[max(bytes_per_round)], 1),
        "bytes_per_round_by_sessions": {
            str(count): round(size, 1) for count, size in bytes_per_round.items()
        },
        "budget_ms": {str(count): budget for count, budget in BUDGET_MS.items()},
        "columns": {name: [asdict(run) for run in measured] for name, measured in columns.items()},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", metavar="FILE", default="", help="write the last line to a file too")
    parser.add_argument("--no-demo-model", action="store_true", help="leave out the column of the demo model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
