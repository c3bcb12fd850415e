"""Our stack beside transformers and vLLM on the same machine: plain and speculative, one user and many.

    python benchmarks/peers.py --install-vllm DIR [--quick] [--users 1 8 16] [--settings FILE] [--json FILE]
    python benchmarks/peers.py --vllm-python PATH
    python benchmarks/peers.py                                    without vLLM: it is then a named gap

Every system gets the same weights, dtype, prompts (token ids) and number of cores, and runs in processes of its own that are
started and warm before anything is measured and that wait without computing while others are. Within each repeat they take turns.

    ours plain, ours ngram           gateway, verifier and drafter through the SDK (--drafter names other kinds, too)
    transformers plain, lookup       `generate` in one process; prompt lookup serves one user; many are one padded batch
    vllm plain, ngram                vLLM's engine called directly, in one process: no server stands in its way

Peers run at the best of their own settings: some are tried first with one user (attention, cache, draft length, threads,
runtime, compiler). --settings FILE keeps what was found, for the next time; a search that was broken
off goes on where it was. --only-try ends there.

A figure is tokens a second of all users together from their first token on. Text that has turned into a loop is cut (32 tokens
that repeat with a period of at most 64); the share cut and the uncut figures are printed too. Ratios are formed within each
repeat; the median of the repeats is printed with the least and the most.
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

from benchmarks.figures import as_json, rounded
from benchmarks.measuring import Lane, Measured, busy_line, finish, hold, lanes_as_json, measure, show
from benchmarks.peer_settings import (
    PeerSettings,
    Search,
    lookup_modes,
    plain_modes,
    read_settings,
    write_settings,
)
from benchmarks.systems import ChildSystem, Gap, StackSystem, stack_options_of
from benchmarks.vllm_environment import VllmSetting, install, ngram_settings, plain_settings
from benchmarks.workload import Workload, as_tokens, default_prompts, read_prompts
from sparkrelay.cli.demo import interrupted_by_sigterm
from sparkrelay.cli.up import core_count
from sparkrelay.store import resolve

OURS = "ours plain"
HF_PLAIN, HF_LOOKUP = "transformers plain", "transformers lookup"
VLLM_PLAIN, VLLM_NGRAM = "vllm plain", "vllm ngram"
SPECULATIVE_PEERS = (HF_LOOKUP, VLLM_NGRAM)
PLAIN_PEERS = (HF_PLAIN, VLLM_PLAIN)
NO_VLLM = "not asked for: give --install-vllm DIR or --vllm-python PATH"
ROOM_FOR_USERS = 16  # of vLLM at least: with another number it compiles anew
BUDGETS = {"plain_over_vllm": 0.9, "speculative_over_best_peer": 1.2}


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure. vllm_python "": vLLM is a gap, for the reason vllm_gap."""

    model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    user_counts: tuple[int, ...] = (1, 8, 16)
    token_count: int = 64
    repeats: int = 5
    drafters: tuple[str, ...] = ("ngram",)
    threads: int = 2
    vllm_python: str = ""
    vllm_gap: str = NO_VLLM
    hold: bool = False


def main() -> None:
    given = _arguments()
    console = Console(stderr=True, highlight=False)
    options = _options(given, console)
    folder = resolve(options.model).path
    texts = read_prompts(map(Path, given.prompts)) if given.prompts else default_prompts()
    workload = as_tokens(texts, folder)
    with interrupted_by_sigterm(), tempfile.TemporaryDirectory(prefix="sparkrelay-bench-") as logs:
        settings = read_settings(given.settings)
        if not settings.complete:
            search = Search(workload, console, first_only=given.quick, file=given.settings)
            find_settings(settings, search, options, folder, Path(logs))
            write_settings(given.settings, settings)
        if given.only_try:
            finish(settings.as_dict(), given.json)
            return
        measured, lanes, facts = run(options, settings, workload, folder, Path(logs), console)
    result = as_result(measured, lanes, {**facts, "settings": settings.as_dict()}, options)
    show(table(measured, lanes, result))
    finish(result, given.json)


def run(
    options: Options,
    settings: PeerSettings,
    workload: Workload,
    folder: Path,
    logs: Path,
    console: Console,
) -> tuple[Measured, list[Lane], dict[str, Any]]:
    """Starts all systems, measures them in turn, and ends them."""
    gaps = dict(settings.gaps)
    with ExitStack() as running:
        console.print("starting our stacks and the peers ...")
        lanes = our_lanes(options, logs, running)
        facts: dict[str, Any] = {}
        for system, own_lanes in peer_systems(options, settings, folder, logs):
            try:
                facts[system.name] = running.enter_context(system).about
                lanes += own_lanes
            except Gap as gap:
                gaps |= {lane.name: str(gap) for lane in own_lanes}
        if options.hold:
            hold(console)
        measured = measure(lanes, workload, options.token_count, options.repeats, console)
    measured.gaps |= gaps
    return measured, lanes, facts


def find_settings(found: PeerSettings, search: Search, options: Options, folder: Path, logs: Path) -> None:
    """Fills in at which of their settings the peers of these options run best, as far as it is not known yet."""
    search.of_transformers(lambda: transformers_child(options, folder, logs), options.dtype, found)
    if options.vllm_python:
        search.of_vllm(
            lambda name, setting: vllm_child(name, setting, options, folder, logs),
            plain_settings(options.threads, Path(options.vllm_python)),
            found,
        )
    else:
        found.gaps |= dict.fromkeys((VLLM_PLAIN, VLLM_NGRAM), options.vllm_gap)
    found.complete = True


def our_lanes(options: Options, logs: Path, running: ExitStack) -> list[Lane]:
    """One stack a drafter; plain turns run on the first one, whose drafter is then idle."""
    lanes = []
    for number, drafter in enumerate(options.drafters):
        stack_options = stack_options_of(options.model, options.dtype, options.threads, drafter)
        stack = running.enter_context(StackSystem(stack_options, logs / drafter))
        if number == 0:
            lanes.append(Lane(OURS, stack, {"speculation": "off"}, options.user_counts))
        lanes.append(Lane(our_name(drafter), stack, {"speculation": "auto"}, options.user_counts))
    return lanes


def our_name(drafter: str) -> str:
    return f"ours {drafter}"


def peer_systems(
    options: Options, settings: PeerSettings, folder: Path, logs: Path
) -> list[tuple[ChildSystem, list[Lane]]]:
    """The peers that have a setting that works, not started yet, with their lanes."""
    result = []
    if settings.transformers_plain:
        child = transformers_child(options, folder, logs)
        plain = plain_modes(options.dtype)[settings.transformers_plain]
        lanes = [Lane(HF_PLAIN, child, plain, options.user_counts)]
        if settings.transformers_lookup and 1 in options.user_counts:
            lookup = lookup_modes(plain)[settings.transformers_lookup]
            lanes.append(Lane(HF_LOOKUP, child, lookup, (1,)))
        result.append((child, lanes))
    if settings.vllm_plain:
        plain_setting = plain_settings(options.threads, Path(options.vllm_python))[settings.vllm_plain]
        chosen = {VLLM_PLAIN: plain_setting}
        if settings.vllm_ngram:
            chosen[VLLM_NGRAM] = ngram_settings(plain_setting)[settings.vllm_ngram]
        for name, setting in chosen.items():
            child = vllm_child(name, setting, options, folder, logs)
            result.append((child, [Lane(name, child, {}, options.user_counts)]))
    return result


def transformers_child(options: Options, folder: Path, logs: Path) -> ChildSystem:
    child = {"model": str(folder), "threads": options.threads}
    return ChildSystem("transformers", "benchmarks.peer_transformers", child, logs)


def vllm_child(name: str, setting: VllmSetting, options: Options, folder: Path, logs: Path) -> ChildSystem:
    child = {
        "model": str(folder),
        "dtype": options.dtype,
        "max_users": max(*options.user_counts, ROOM_FOR_USERS),
        "engine": dict(setting.engine),
    }
    return ChildSystem(
        name,
        "benchmarks.peer_vllm",
        child,
        logs,
        python=options.vllm_python,
        environment=setting.environment,
    )


def as_result(
    measured: Measured, lanes: Sequence[Lane], facts: Mapping[str, Any], options: Options
) -> dict[str, Any]:
    """The JSON object."""
    over_vllm = {str(count): measured.ratio(OURS, VLLM_PLAIN, count) for count in options.user_counts}
    over_transformers = {str(count): measured.ratio(OURS, HF_PLAIN, count) for count in options.user_counts}
    ours = fastest(measured, [our_name(drafter) for drafter in options.drafters])
    peer = fastest(measured, SPECULATIVE_PEERS)
    any_peer = fastest(measured, (*SPECULATIVE_PEERS, *PLAIN_PEERS))
    speculative = measured.ratio(ours, peer, 1)
    common = lanes_as_json(measured, lanes)
    return {
        "tokens_per_s": common.pop("tokens_per_s"),
        "plain_over_vllm": {count: rounded(ratio) for count, ratio in over_vllm.items()},
        "plain_over_transformers": {count: rounded(ratio) for count, ratio in over_transformers.items()},
        "speculative_over_best_peer": rounded(speculative),
        "best_speculative_peer": peer,
        "speculative_over_any_peer": rounded(measured.ratio(ours, any_peer, 1)),
        "best_peer": any_peer,
        "ratios": {
            "plain_over_vllm": {count: as_json(ratio) for count, ratio in over_vllm.items()},
            "plain_over_transformers": {count: as_json(ratio) for count, ratio in over_transformers.items()},
            "speculative_over_best_peer": as_json(speculative),
        },
        "agreement_with_ours": {
            lane.name: measured.agreement(lane.name, OURS) for lane in lanes if lane.name not in measured.gaps
        },
        **common,
        "budgets": BUDGETS,
        "facts": dict(facts),
        "token_count": options.token_count,
        "repeats": options.repeats,
    }


def fastest(measured: Measured, names: Sequence[str]) -> str:
    """The lane with the highest median for one user; "" if none of them was measured."""
    reached = {name: rate.median for name in names if (rate := measured.rate(name, 1)) is not None}
    return max(reached, key=lambda name: reached[name]) if reached else ""


def table(measured: Measured, lanes: Sequence[Lane], result: Mapping[str, Any]) -> Table:
    """One row a system, one column a number of users; gaps say why."""
    counts = sorted({count for lane in lanes for count in lane.user_counts})
    heading = "Tokens a second of all users together, median (low to high); below: uncut"
    drawn = Table(title=heading, title_justify="left", caption_justify="left")
    drawn.add_column("system")
    for count in counts:
        drawn.add_column(f"{count} user{'s' if count > 1 else ''}", justify="right")
    drawn.add_column("accepted length, 1 user", justify="right")
    for lane in lanes:
        if lane.name in measured.gaps:
            continue
        accepted = result["accepted_length"][lane.name].get("1", 0.0)
        cells = [_cell(measured, result, lane.name, count) for count in counts]
        drawn.add_row(lane.name, *cells, f"{accepted:.2f}")
    drawn.caption = "\n".join(captions(result))
    return drawn


def captions(result: Mapping[str, Any]) -> list[str]:
    """The ratios with their budgets, what the peers ran with, the share of loops, the gaps."""
    over_vllm = ", ".join(f"{count}: {ratio}" for count, ratio in result["plain_over_vllm"].items())
    chosen = result["facts"].get("settings", {}).get("chosen", {})
    spoken = result["speculative_over_best_peer"], result["best_speculative_peer"] or "nobody"
    return [
        f"plain_over_vllm by users: {over_vllm}; budget {BUDGETS['plain_over_vllm']}",
        f"speculative_over_best_peer: {spoken[0]} (over {spoken[1]}), budget {BUDGETS['speculative_over_best_peer']}",
        f"speculative over the fastest peer of all ({result['best_peer'] or 'nobody'}): {result['speculative_over_any_peer']}",
        *[f"{name}: {setting}" for name, setting in chosen.items() if setting],
        f"cut as loops: {result['loop_share']:.0%} of the tokens",
        busy_line(result),
        *[f"gap: {name}: {why}" for name, why in result["gaps"].items()],
    ]


def _cell(measured: Measured, result: Mapping[str, Any], lane: str, count: int) -> str:
    rate = measured.rate(lane, count)
    if rate is None:
        return "-"
    uncut = result["uncut_tokens_per_s"][lane][str(count)]
    return f"{rate.median:.1f} ({rate.low:.1f} to {rate.high:.1f})\n{uncut:.1f}"


def _options(given: argparse.Namespace, console: Console) -> Options:
    usual = Options()
    users, tokens, repeats = (
        ((1, 8), 32, 2) if given.quick else (usual.user_counts, usual.token_count, usual.repeats)
    )
    python, why = given.vllm_python, NO_VLLM
    if given.install_vllm:
        console.print("vLLM's environment ...")
        try:
            python = str(install(Path(given.install_vllm).absolute()))
        except Gap as gap:
            why = str(gap)
    return Options(
        given.model,
        given.dtype,
        tuple(given.users or users),
        given.tokens or tokens,
        given.repeats or repeats,
        tuple(given.drafter or usual.drafters),
        given.threads or core_count(),
        python,
        why,
        given.hold,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="2 repeats of 32 tokens with 1 and 8 users; first settings only")
    add("--json", metavar="FILE", default="", help="write the JSON object to a file too")
    add(
        "--install-vllm",
        metavar="DIR",
        default="",
        help="make an environment with vLLM for CPUs there, or use it",
    )
    add(
        "--vllm-python",
        metavar="PATH",
        default="",
        help="the Python of an environment that has vLLM for CPUs",
    )
    add(
        "--settings",
        metavar="FILE",
        default="",
        help="the peers' best settings, written as they are found and read the next time",
    )
    add("--only-try", action="store_true", help="find the peers' best settings and end")
    add(
        "--hold",
        action="store_true",
        help="start everything, then wait for Enter before anything is measured",
    )
    add("--model", default="smollm2-135m", help="catalogue name, folder or hub id")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of all systems")
    add("--users", type=int, nargs="+", default=None, help="how many users at once (1 8 16)")
    add("--tokens", type=int, default=None, help="tokens of an answer (64)")
    add("--repeats", type=int, default=None, help="how often all is measured (5)")
    add(
        "--drafter",
        action="append",
        default=None,
        help="kind of our drafter (ngram); may be given several times",
    )
    add("--threads", type=int, default=0, help="threads of every system (one a core)")
    add("--prompts", nargs="*", default=[], metavar="FILE", help="JSON lines instead of benchmarks/prompts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
