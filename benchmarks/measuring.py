"""The loop that all comparisons share: lanes in turn, repeat by repeat, every lane with the same prompts in the same repeat.

A lane is one row of a table: a system in one mode. A lane that fails becomes a gap with its reason; the others go on.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.figures import (
    Run,
    Spread,
    as_json,
    common_start,
    decode_rate,
    ratios,
    rounded,
    share_cut,
    spread,
    tokens_a_round,
    turns_of,
    wall_rate,
)
from benchmarks.systems import Gap, Mode, System
from benchmarks.workload import Workload
from sparkrelay.cli.up import core_count

SETTLE_S = 0.3  # threads of the system that ran last stop spinning
WARM_UP_TOKENS = 8
TRIALS = 2
BUSY_LOOK_S = 0.5
TABLE_WIDTH = 130


@dataclass(frozen=True, slots=True)
class Lane:
    """One row: a system in one mode, and for how many users at once it is asked."""

    name: str
    system: System
    mode: Mode
    user_counts: tuple[int, ...]


@dataclass(slots=True)
class Measured:
    """Runs by lane and number of users, in the order of the repeats, and why lanes are missing.

    busy_share  of all cores, just before, while every system waited: above a few percent something else ran, and figures suffer
    """

    runs: dict[str, dict[int, list[Run]]] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)
    busy_share: float | None = None

    def of(self, lane: str, user_count: int) -> list[Run]:
        """Empty if it was not measured, or became a gap on the way."""
        return [] if lane in self.gaps else self.runs.get(lane, {}).get(user_count, [])

    def rates(self, lane: str, user_count: int, *, cut_loops: bool = True) -> list[float]:
        """Tokens a second of all users together, one a repeat; see `figures.decode_rate`."""
        return [decode_rate(run, cut_loops=cut_loops).per_s for run in self.of(lane, user_count)]

    def rate(self, lane: str, user_count: int, *, cut_loops: bool = True) -> Spread | None:
        return spread(self.rates(lane, user_count, cut_loops=cut_loops))

    def ratio(self, above: str, below: str, user_count: int) -> Spread | None:
        """One lane over another, within each repeat."""
        return ratios(self.rates(above, user_count), self.rates(below, user_count))

    def agreement(self, lane: str, other: str) -> float | None:
        """How much of the lane's tokens come before the first one that the other lane chose otherwise, 0 to 1: the same model and
        prompts, if it is near 1; near ties fall either way in another order of sums. None without runs of both.
        """
        pairs = [
            (mine.token_ids, yours.token_ids)
            for count in self.runs.get(lane, {})
            for run, reference in zip(self.of(lane, count), self.of(other, count), strict=False)
            for mine, yours in zip(run.answers, reference.answers, strict=True)
        ]
        total = sum(len(mine) for mine, _ in pairs)
        return round(sum(common_start(mine, yours) for mine, yours in pairs) / total, 3) if total else None


def measure(
    lanes: Sequence[Lane], workload: Workload, token_count: int, repeats: int, console: Console
) -> Measured:
    """Warms every lane up, then runs all of them `repeats` times in turn."""
    measured = Measured(busy_share=busy_share())
    cells = {f"{lane.name}|{count}": (lane, count) for lane in lanes for count in lane.user_counts}
    with progress_on(console) as progress:
        task = progress.add_task("", total=(repeats + 1) * len(cells))
        for repeat in range(-1, repeats):  # the first, shorter one warms up
            for name in turns_of(list(cells), max(repeat, 0)):
                lane, count = cells[name]
                progress.update(task, description=f"{lane.name}, {count} at once", advance=1)
                if lane.name not in measured.gaps:
                    _one_run(measured, lane, count, workload, token_count, repeat)
    return measured


def _one_run(
    measured: Measured, lane: Lane, user_count: int, workload: Workload, token_count: int, repeat: int
) -> None:
    warms_up = repeat < 0
    prompts = workload.take(repeat, user_count)
    time.sleep(SETTLE_S)
    try:
        run = lane.system.run(prompts, WARM_UP_TOKENS if warms_up else token_count, lane.mode)
    except Gap as gap:
        measured.gaps[lane.name] = str(gap)
        return
    if not warms_up:
        measured.runs.setdefault(lane.name, {}).setdefault(user_count, []).append(run)


def best_mode(
    system: System,
    modes: Mapping[str, Mode],
    workload: Workload,
    token_count: int,
    console: Console,
    trials: int = TRIALS,
) -> tuple[str, dict[str, float]]:
    """The name of the mode that answers one user fastest, and what each of them reached. Raises Gap if none works."""
    lanes = [Lane(name, system, mode, (1,)) for name, mode in modes.items()]
    measured = measure(lanes, workload, token_count, trials, console)
    reached = {name: rate.median for name in modes if (rate := measured.rate(name, 1)) is not None}
    if not reached:
        raise Gap("; ".join(f"{name}: {why}" for name, why in measured.gaps.items()))
    return max(reached, key=lambda name: reached[name]), reached


def hold(console: Console) -> None:
    """Everything is started and idle: measures when a person, or a script that has made the machine quiet, says so."""
    console.print("all started; press Enter to measure")
    sys.stdin.readline()


def progress_on(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def lanes_as_json(measured: Measured, lanes: Sequence[Lane]) -> dict[str, Any]:
    """What every comparison reports of every lane, by lane and users."""
    all_runs = [run for by_users in measured.runs.values() for runs in by_users.values() for run in runs]

    def by_lane(value: Any) -> dict[str, dict[str, Any]]:
        return {
            lane.name: {str(count): value(lane.name, count) for count in lane.user_counts}
            for lane in lanes
            if lane.name not in measured.gaps
        }

    return {
        "tokens_per_s": by_lane(lambda name, count: rounded(measured.rate(name, count), 1)),
        "spread": by_lane(lambda name, count: as_json(measured.rate(name, count))),
        "uncut_tokens_per_s": by_lane(
            lambda name, count: rounded(measured.rate(name, count, cut_loops=False), 1)
        ),
        "wall_tokens_per_s": by_lane(
            lambda name, count: rounded(spread([wall_rate(run) for run in measured.of(name, count)]), 1)
        ),
        "accepted_length": by_lane(lambda name, count: round(tokens_a_round(measured.of(name, count)), 2)),
        "loop_share": round(share_cut(all_runs), 3),
        "gaps": dict(measured.gaps),
        "busy_share_before": measured.busy_share,
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Where this was measured."""
    return {"processor": processor_name(), "cores": core_count(), "python": platform.python_version()}


def busy_share(seconds: float = BUSY_LOOK_S, stat: Path = Path("/proc/stat")) -> float | None:
    """How much of the cores' time is used by anything, over so many seconds, 0 to 1; None where the system does not tell."""
    before = _cpu_times(stat)
    time.sleep(seconds)
    after = _cpu_times(stat)
    if before is None or after is None or after[1] <= before[1]:
        return None
    return round(1 - (after[0] - before[0]) / (after[1] - before[1]), 3)


def busy_line(result: Mapping[str, Any]) -> str:
    """For a table's caption."""
    share = result["busy_share_before"]
    return "cores in use before the first run: " + ("not known here" if share is None else f"{share:.0%}")


def _cpu_times(stat: Path) -> tuple[int, int] | None:
    """Ticks since the machine began: idle ones (waiting for a disk included), and all."""
    try:
        numbers = [int(each) for each in stat.read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    except OSError:
        return None
    return numbers[3] + numbers[4], sum(numbers)


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the system calls its processor."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(table: Table) -> None:
    """On standard output, never narrower than the figures need: it often goes to a file."""
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table)


def finish(result: Mapping[str, Any], file: str) -> None:
    """The last line of every benchmark: one JSON object, and the same in a file if one is named."""
    if file:
        Path(file).write_text(json.dumps(result, indent=1) + os.linesep, encoding="utf-8")
    print(json.dumps(result))
