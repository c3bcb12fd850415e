"""How fast the engine is without any drafter: plain greedy decoding of many users, beside transformers.

    python benchmarks/engine.py [--quick] [--users 1 8 16 32] [--tokens 96] [--repeats 5] [--json FILE]

Three systems answer the same prompts (benchmarks/prompts, in the model's chat template), in turn within each repeat, each in a
process of its own with the same number of threads:

    stack         gateway, verifier and an idle drafter, as `sparkrelay up` starts them, asked through the SDK
    engine        the same engine called directly; what the stack adds is the difference
    transformers  `generate` for one user, at the best of its own settings here (tried first: bfloat16 or float32, sdpa or
                  eager attention, dynamic or static cache)

A figure is tokens a second of all users together from their first token on, so reading the prompts is not in it. Text that
has turned into a loop is cut (32 tokens that repeat with a period of at most 64); the share cut and the uncut figures stand
beside it. Ratios are formed within each repeat; medians, least and most of the repeats are printed. The floor is the time to
read all weights once at the speed at which this machine's threads read memory; a second table shows where the engine's steps
spend theirs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from benchmarks.figures import Spread, as_json, rounded, spread
from benchmarks.floor import floor_ms, weight_bytes
from benchmarks.measuring import Lane, Measured, best_mode, finish, lanes_as_json, measure, show
from benchmarks.systems import ChildSystem, Gap, Mode, StackSystem, stack_options_of
from benchmarks.workload import Workload, as_tokens, default_prompts, read_prompts
from sparkrelay.cli.demo import interrupted_by_sigterm
from sparkrelay.cli.up import core_count
from sparkrelay.store import resolve

PROFILE = "profile_ms"
PARTS = (
    "linear",
    "attention",
    "other",
    "choice",
    "scheduling",
)  # of a step; see sparkrelay/device/step_profile.py
STACK, ENGINE, TRANSFORMERS = "stack", "engine", "transformers"
PLAIN: Mode = {"speculation": "off"}
TRIAL_TOKENS = 32
BUDGETS = {"plain_over_transformers": 1.5, "users8_over_users1": 4.0}


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure. `model` is a name, a folder or a hub id; peers need its folder."""

    model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    user_counts: tuple[int, ...] = (1, 8, 16, 32)
    token_count: int = 96
    repeats: int = 5
    prompt_files: tuple[str, ...] = ()
    without_transformers: bool = False
    threads: int = 0

    @property
    def thread_count(self) -> int:
        """Threads that every system computes with: one a core, if nothing else is said."""
        return self.threads or core_count()


@dataclass(frozen=True, slots=True)
class Floor:
    """bytes_per_step / read_bytes_per_s, in ms; zeros for a model without weights."""

    weight_bytes: int
    read_gb_per_s: float

    @property
    def ms(self) -> float:
        return (
            floor_ms(self.weight_bytes, self.read_gb_per_s * 1e9)
            if self.weight_bytes and self.read_gb_per_s
            else 0.0
        )


def main() -> None:
    options, json_file = _arguments()
    console = Console(stderr=True, highlight=False)
    texts = read_prompts(map(Path, options.prompt_files)) if options.prompt_files else default_prompts()
    folder = resolve(options.model).path
    workload = as_tokens(texts, folder)
    with interrupted_by_sigterm(), tempfile.TemporaryDirectory(prefix="sparkrelay-bench-") as logs:
        measured, lanes, facts = run(options, workload, folder, Path(logs), console)
    floor = Floor(weight_bytes(folder, options.dtype), float(facts["engine"].get("read_gb_per_s", 0.0)))
    result = as_result(measured, lanes, floor, facts, options)
    show(table(measured, lanes, floor, result))
    show(profile_table(result))
    finish(result, json_file)


def run(
    options: Options, workload: Workload, folder: Path | None, logs: Path, console: Console
) -> tuple[Measured, list[Lane], dict[str, dict[str, Any]]]:
    """Starts the systems, measures them in turn, and ends them. folder None: a model that transformers cannot load."""
    threads = options.thread_count
    settings = {
        "model": options.model,
        "dtype": options.dtype,
        "threads": threads,
        "read_speed": bool(folder),
    }
    facts: dict[str, dict[str, Any]] = {}
    gaps: dict[str, str] = {}
    with ExitStack() as running:
        console.print("starting the stack and the bare engine ...")
        stack_options = stack_options_of(options.model, options.dtype, threads)
        stack = running.enter_context(StackSystem(stack_options, logs))
        engine = running.enter_context(ChildSystem(ENGINE, "benchmarks.own_engine", settings, logs))
        facts["engine"] = engine.about
        lanes = [
            Lane(STACK, stack, PLAIN, options.user_counts),
            Lane(ENGINE, engine, {}, options.user_counts),
        ]
        if folder is not None and not options.without_transformers:
            try:
                lanes.append(transformers_lane(options, workload, folder, logs, running, facts, console))
            except Gap as gap:
                gaps[TRANSFORMERS] = str(gap)
        measured = measure(lanes, workload, options.token_count, options.repeats, console)
        measured.gaps.update(gaps)
    return measured, lanes, facts


def transformers_lane(
    options: Options,
    workload: Workload,
    folder: Path,
    logs: Path,
    running: ExitStack,
    facts: dict[str, dict[str, Any]],
    console: Console,
) -> Lane:
    """transformers at the best of its settings, which are noted in `facts`. Raises Gap if none works."""
    child = {"model": str(folder), "threads": options.thread_count}
    peer = running.enter_context(ChildSystem(TRANSFORMERS, "benchmarks.peer_transformers", child, logs))
    console.print("transformers: which of its settings is fastest here ...")
    name, reached = best_mode(peer, transformers_modes(), workload, TRIAL_TOKENS, console)
    facts[TRANSFORMERS] = {**peer.about, "settings": name, "tried": reached}
    return Lane(TRANSFORMERS, peer, transformers_modes()[name], (1,))


def transformers_modes(dtypes: Sequence[str] = ("bfloat16", "float32")) -> dict[str, Mode]:
    """Plain settings of transformers worth trying, by name."""
    return {
        f"{dtype}, {attention}, {cache} cache": {
            "dtype": dtype,
            "attention": attention,
            "cache": cache,
            "lookup": None,
        }
        for dtype in dtypes
        for attention in ("sdpa", "eager")
        for cache in ("dynamic", "static")
    }


def as_result(
    measured: Measured,
    lanes: Sequence[Lane],
    floor: Floor,
    facts: Mapping[str, Mapping[str, Any]],
    options: Options,
) -> dict[str, Any]:
    """The JSON object."""
    common = lanes_as_json(measured, lanes)
    over_transformers = measured.ratio(STACK, TRANSFORMERS, 1)
    eight_over_one = across_users(measured, 8, 1)
    return {
        "plain_over_transformers": rounded(over_transformers),
        "users8_over_users1": rounded(eight_over_one),
        "tokens_per_s": common.pop("tokens_per_s").get(STACK, {}),
        "by_system": common.pop("spread"),
        "ratios": {
            "plain_over_transformers": as_json(over_transformers),
            "users8_over_users1": as_json(eight_over_one),
            "stack_over_engine": {
                str(count): as_json(measured.ratio(STACK, ENGINE, count)) for count in options.user_counts
            },
        },
        "floor": {
            "weight_bytes": floor.weight_bytes,
            "read_gb_per_s": floor.read_gb_per_s,
            "ms": round(floor.ms, 2),
            "step_ms": {
                str(count): rounded(step_ms(measured, ENGINE, count), 2) for count in options.user_counts
            },
        },
        "step_profile_ms": {
            str(count): parts for count in options.user_counts if (parts := mean_profile(measured, count))
        },
        **common,
        "budgets": BUDGETS,
        "facts": {name: dict(each) for name, each in facts.items()},
        "token_count": options.token_count,
        "repeats": options.repeats,
    }


def across_users(measured: Measured, many: int, few: int) -> Spread | None:
    """What `many` users get together over what `few` get, by the stack, repeat by repeat."""
    above, below = measured.rates(STACK, many), measured.rates(STACK, few)
    return spread([a / b for a, b in zip(above, below, strict=False) if b > 0])


def step_ms(measured: Measured, lane: str, user_count: int) -> Spread | None:
    """What a step of all users takes: each of them gets one token in it."""
    return spread([1000 * user_count / rate for rate in measured.rates(lane, user_count) if rate > 0])


def mean_profile(measured: Measured, user_count: int) -> dict[str, float]:
    """Milliseconds of a step by part, mean over the repeats; empty if it was not measured."""
    notes = [run.notes.get(PROFILE) for run in measured.of(ENGINE, user_count)]
    profiles = [each for each in notes if each]
    if not profiles:
        return {}
    return {part: round(sum(each[part] for each in profiles) / len(profiles), 2) for part in PARTS}


def profile_table(result: Mapping[str, Any]) -> Table:
    """Where a plain step of all users spends its time, by users."""
    heading = "Where a step's time goes (engine), ms"
    drawn = Table(title=heading, title_justify="left")
    for name in ("users", *PARTS, "all"):
        drawn.add_column(name, justify="right")
    for count, parts in result["step_profile_ms"].items():
        cells = [f"{parts[part]:.2f}" for part in PARTS]
        drawn.add_row(count, *cells, f"{sum(parts.values()):.2f}")
    return drawn


def table(measured: Measured, lanes: Sequence[Lane], floor: Floor, result: Mapping[str, Any]) -> Table:
    """One row a system and number of users, then what the budgets are about."""
    heading = "Plain decoding, tokens a second of all users together"
    drawn = Table(title=heading, title_justify="left", caption_justify="left")
    drawn.add_column("system")
    for name in ("users", "tokens/s", "low to high", "uncut", "with prompts", "step ms", "floor ms"):
        drawn.add_column(name, justify="right")
    for lane in lanes:
        for count in lane.user_counts:
            rate = measured.rate(lane.name, count)
            if rate is None:
                drawn.add_row(lane.name, str(count), measured.gaps.get(lane.name, "not measured"))
                continue
            step = step_ms(measured, lane.name, count)
            drawn.add_row(
                lane.name,
                str(count),
                f"{rate.median:.1f}",
                f"{rate.low:.1f} to {rate.high:.1f}",
                f"{result['uncut_tokens_per_s'][lane.name][str(count)]:.1f}",
                f"{result['wall_tokens_per_s'][lane.name][str(count)]:.1f}",
                f"{step.median:.1f}" if step else "",
                f"{floor.ms:.1f}" if floor.ms else "",
            )
        drawn.add_section()
    drawn.caption = "\n".join(captions(measured, floor, result))
    return drawn


def captions(measured: Measured, floor: Floor, result: Mapping[str, Any]) -> list[str]:
    """The ratios with their budgets, the share of loops, the gaps."""
    lines = []
    for name, budget in BUDGETS.items():
        seen = result["ratios"][name]
        figure = (
            "not measured"
            if seen is None
            else f"{seen['median']:.2f} ({seen['low']:.2f} to {seen['high']:.2f})"
        )
        lines.append(f"{name}: {figure}, budget {budget}")
    if floor.ms:
        lines.append(
            f"floor: {floor.weight_bytes / 1e6:.0f} MB of weights at {floor.read_gb_per_s} GB/s = {floor.ms:.1f} ms a step"
        )
    if TRANSFORMERS in result["facts"]:
        lines.append(f"transformers at its best: {result['facts'][TRANSFORMERS]['settings']}")
    lines.append(
        f"cut as loops: {result['loop_share']:.0%} of the tokens; cores in use before: {result['busy_share_before'] or 0:.0%}"
    )
    lines += [f"gap: {name}: {why}" for name, why in measured.gaps.items()]
    return lines


def _arguments() -> tuple[Options, str]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Options()
    parser.add_argument("--quick", action="store_true", help="2 repeats of 32 tokens with 1 and 8 users")
    parser.add_argument("--json", metavar="FILE", default="", help="write the JSON object to a file too")
    parser.add_argument("--model", default=usual.model, help="catalogue name, folder or hub id")
    parser.add_argument(
        "--dtype", default=usual.dtype, choices=["bfloat16", "float32"], help="what ours computes in"
    )
    parser.add_argument(
        "--users", type=int, nargs="+", default=None, help="how many users at once (1 8 16 32)"
    )
    parser.add_argument("--tokens", type=int, default=None, help="tokens of an answer (96)")
    parser.add_argument("--repeats", type=int, default=None, help="how often all is measured (5)")
    parser.add_argument(
        "--prompts", nargs="*", default=[], metavar="FILE", help="JSON lines instead of benchmarks/prompts"
    )
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--threads", type=int, default=0, help="threads of every system (one a core)")
    given = parser.parse_args()
    users, tokens, repeats = ([1, 8], 32, 2) if given.quick else (usual.user_counts, usual.token_count, 5)
    return (
        Options(
            given.model,
            given.dtype,
            tuple(given.users or users),
            given.tokens or tokens,
            given.repeats or repeats,
            tuple(given.prompts),
            given.no_transformers,
            given.threads,
        ),
        given.json,
    )


if __name__ == "__main__":
    main()
