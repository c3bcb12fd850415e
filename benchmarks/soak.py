"""Does the stack hold for long? Many sessions for minutes, then: does memory grow, and is anything left behind?

    python benchmarks/soak.py [--minutes 10] [--sessions 32] [--quick] [--json FILE]

Starts gateway, verifier and prompt-lookup drafter as `sparkrelay up` does. Each of the users leads sessions of several turns in a
closed loop: prompts of 4 to 400 tokens, greedy and sampled, with and without drafter, a fifth of the turns cancelled on the way,
a quarter of the next prompts take back a part of the conversation, a tenth of the sessions stay open until the end. What the
services keep on purpose is bounded so that it is full before the measuring begins: the room for sessions' state
(--state-memory-mib; sessions are evicted and read again, too) and how long an ended turn can be resumed (10 s).

Resident memory of each process is sampled all the time; the slope is that of a straight line through the samples after the
warm-up (the first 30 %), with a 95 % interval. When all users have ended their sessions, nothing may be left: no state blocks in
use, no drafter memberships (handles), no open turns, no sessions of the gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import sparkrelay.client.aio
from benchmarks.measuring import finish, machine, show
from benchmarks.memory_slope import Sample, Slope, resident_mib, slope_of
from benchmarks.soak_users import Habits, Tally, User
from benchmarks.workload import as_tokens, default_prompts
from sparkrelay.cli.demo import interrupted_by_sigterm
from sparkrelay.cli.stack import Stack, list_workers
from sparkrelay.cli.stack_plan import StackOptions, any_free_port, plan_stack
from sparkrelay.cli.up import core_count
from sparkrelay.store import resolve

WARM_UP_SHARE = 0.3
RESUME_KEEP_MS = 10_000
SAMPLES = 600  # at most, over the whole run
LEAST_INTERVAL_S = 0.1
SETTLE_S = 20.0
POLL_S = 0.1
TOY_VOCAB_SIZE = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What to run, for how long."""

    model: str = "smollm2-135m"
    minutes: float = 10.0
    sessions: int = 32
    drafter: str = "ngram"
    state_memory_mib: int = 512
    threads: int = 0
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What is there when nobody has a session any more."""

    blocks: int
    handles: int
    open_turns: int
    gateway_sessions: int

    @property
    def nothing(self) -> bool:
        return not (self.blocks or self.handles or self.open_turns or self.gateway_sessions)


@dataclass(slots=True)
class Soaked:
    """What a run has shown. samples by process, seconds since the users began."""

    tally: Tally
    seconds: float = 0.0
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    leftovers: Leftovers | None = None

    def slopes(self) -> dict[str, Slope | None]:
        begin = WARM_UP_SHARE * self.seconds
        return {
            name: slope_of([sample for sample in samples if sample[0] >= begin])
            for name, samples in self.samples.items()
        }


def main() -> None:
    options, json_file = _arguments()
    console = Console(stderr=True, highlight=False)
    with interrupted_by_sigterm(), tempfile.TemporaryDirectory(prefix="sparkrelay-bench-") as folder:
        soaked = soak(options, Path(folder), console)
    result = as_result(soaked, options)
    show(table(soaked, result))
    finish(result, json_file)


def soak(options: Options, folder: Path, console: Console) -> Soaked:
    """Starts the stack, lets the users loose, and counts what is left."""
    toy = options.model.partition(":")[0] == "toy"
    texts: Sequence[Sequence[int]] = ()
    if not toy:
        texts = as_tokens(default_prompts(), resolve(options.model).path).prompts
    habits = Habits(TOY_VOCAB_SIZE)
    with Stack(plan_stack(stack_options(options), core_count(), any_free_port), folder) as stack:
        console.print("starting the stack ...")
        stack.wait_until_ready()
        soaked = asyncio.run(run_users(stack, options, habits, texts, console))
        soaked.leftovers = wait_for_nothing(stack)
    return soaked


def stack_options(options: Options) -> StackOptions:
    flags = ("--state-memory-mib", str(options.state_memory_mib))
    threads = ("--threads", str(options.threads or core_count()))
    bounds = {"verifier": (*flags, *threads), "gateway": ("--resume-keep-ms", str(RESUME_KEEP_MS))}
    return StackOptions(
        options.model,
        options.drafter,
        log_level="warning",
        drain_ms=500,
        flags=bounds,
    )


async def run_users(
    stack: Stack, options: Options, habits: Habits, texts: Sequence[Sequence[int]], console: Console
) -> Soaked:
    """All users at once for so many minutes, while memory is sampled."""
    soaked = Soaked(Tally())
    begun = time.monotonic()
    end = begun + 60 * options.minutes
    async with sparkrelay.client.aio.connect(stack.gateway) as client, asyncio.TaskGroup() as group:
        users = [
            User(client, habits, 1000 * options.seed + number, texts, soaked.tally)
            for number in range(options.sessions)
        ]
        sampler = group.create_task(
            sample_memory(stack.pids, soaked.samples, begun, end, soaked.tally, console)
        )
        await asyncio.gather(*(user.live(lambda: time.monotonic() < end) for user in users))
        await sampler
    soaked.seconds = 60 * options.minutes
    return soaked


async def sample_memory(
    pids: Mapping[str, int],
    samples: dict[str, list[Sample]],
    begun: float,
    end: float,
    tally: Tally,
    console: Console,
) -> None:
    """Notes the processes' resident memory at equal distances until the end, and shows how far it is."""
    interval_s = max((end - begun) / SAMPLES, LEAST_INTERVAL_S)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=end - begun)
        while (now := time.monotonic()) < end:
            for name, pid in pids.items():
                mib = resident_mib(pid)
                if mib is not None:
                    samples.setdefault(name, []).append((now - begun, mib))
            spoken = f"{tally.turns} turns, {tally.tokens} tokens, {sum(tally.errors.values())} errors"
            progress.update(task, completed=now - begun, description=spoken)
            await asyncio.sleep(interval_s)


def wait_for_nothing(stack: Stack, limit_s: float = SETTLE_S) -> Leftovers:
    """What is left as soon as nothing is, or when the limit is over: load reports are a moment old."""
    deadline = time.monotonic() + limit_s
    while True:
        leftovers = count_leftovers(stack)
        if leftovers.nothing or time.monotonic() > deadline:
            return leftovers
        time.sleep(POLL_S)


def count_leftovers(stack: Stack) -> Leftovers:
    """As the gateway and the verifier report it."""
    from sparkrelay.client.blocking import connect

    with connect(stack.gateway) as client:
        gateway_sessions = len(client.list_sessions(limit=1000))
    loads = [worker.load for worker in list_workers(stack.gateway)]
    return Leftovers(
        blocks=sum(load.used_block_count for load in loads),
        handles=sum(drafter.session_count for load in loads for drafter in load.drafters),
        open_turns=sum(load.active_turn_count + load.queued_turn_count for load in loads),
        gateway_sessions=gateway_sessions,
    )


def as_result(soaked: Soaked, options: Options) -> dict[str, Any]:
    """The JSON object."""
    tally, leftovers, slopes = soaked.tally, soaked.leftovers, soaked.slopes()
    assert leftovers is not None, "counted at the end of every run"
    return {
        "rss_slope_mib_per_min": {name: each and round(each.per_min, 3) for name, each in slopes.items()},
        "rss_slope_interval": {
            name: each and [round(each.low, 3), round(each.high, 3)] for name, each in slopes.items()
        },
        "rss_mib": {
            name: {"first": round(samples[0][1], 1), "last": round(samples[-1][1], 1)}
            for name, samples in soaked.samples.items()
        },
        "leaked_blocks": leftovers.blocks,
        "leaked_handles": leftovers.handles,
        "open_turns": leftovers.open_turns,
        "gateway_sessions": leftovers.gateway_sessions,
        "turns": tally.turns,
        "tokens": tally.tokens,
        "sessions": tally.sessions,
        "cancelled_turns": tally.cancelled,
        "rewinds": tally.rewinds,
        "busy_retries": tally.busy,
        "drafted_tokens": tally.drafted,
        "accepted_tokens": tally.accepted,
        "errors": dict(tally.errors),
        "minutes": options.minutes,
        "users": options.sessions,
        "machine": machine(),
    }


def table(soaked: Soaked, result: Mapping[str, Any]) -> Table:
    """Memory by process; below it what was done and what was left."""
    drawn = Table(title="Resident memory, MiB", title_justify="left", caption_justify="left")
    drawn.add_column("process")
    for name in ("first", "last", "slope a minute", "95 % interval"):
        drawn.add_column(name, justify="right")
    for name, slope in soaked.slopes().items():
        rss = result["rss_mib"][name]
        spoken = (f"{slope.per_min:+.3f}", f"{slope.low:+.3f} to {slope.high:+.3f}") if slope else ("-", "-")
        drawn.add_row(name, str(rss["first"]), str(rss["last"]), *spoken)
    drawn.caption = (
        f"{result['users']} users, {result['minutes']:g} min: {result['turns']} turns ({result['cancelled_turns']} cancelled, "
        f"{result['rewinds']} rewinds), {result['sessions']} sessions, {result['tokens']} tokens\n"
        f"errors: {result['errors'] or 'none'}\n"
        f"left: {result['leaked_blocks']} blocks, {result['leaked_handles']} handles, {result['open_turns']} open turns, "
        f"{result['gateway_sessions']} sessions"
    )
    return drawn


def _arguments() -> tuple[Options, str]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Options()
    add = parser.add_argument
    add("--quick", action="store_true", help="half a minute")
    add("--json", metavar="FILE", default="", help="write the JSON object to a file too")
    add("--minutes", type=float, default=None, help="how long the users go on (10)")
    add("--sessions", type=int, default=usual.sessions, help="how many users at once (32)")
    add("--model", default=usual.model, help="catalogue name, folder, hub id or toy")
    add("--drafter", default=usual.drafter, help="kind of draft model (ngram)")
    add("--state-memory-mib", type=int, default=usual.state_memory_mib, help="room for sessions' state (512)")
    add("--threads", type=int, default=0, help="threads of the verifier (one a core)")
    add("--seed", type=int, default=usual.seed, help="of what users do")
    given = parser.parse_args()
    minutes = given.minutes or (0.5 if given.quick else usual.minutes)
    return (
        Options(
            given.model,
            minutes,
            given.sessions,
            given.drafter,
            given.state_memory_mib,
            given.threads,
            given.seed,
        ),
        given.json,
    )


if __name__ == "__main__":
    main()
