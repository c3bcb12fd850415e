"""`sparkrelay train`: from a target alone to a draft for it, in three steps that may each be killed and go on."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparkrelay.cli.loops import loop_start
from sparkrelay.cli.models import megabytes
from sparkrelay.cli.options import examples, paragraphs

if TYPE_CHECKING:
    from drafter_service.training.pipeline import Workspace
    from drafter_service.training.settings import TrainSettings
    from drafter_service.training.trainer import HeldOut, StepReport, TrainData, Trainer

HELP = """Train a draft model for a target.

1. The target writes prompts of its own and answers them (and those of --prompts); where it falls into a loop, the rest is cut.

2. What it thought while it read them is computed once and kept on disk.

3. The draft learns to foretell it.

Each step goes on where it was stopped, however it was stopped: give the same command again.
"""
EXAMPLES = examples(
    "sparkrelay train work/smollm2 --target smollm2-135m --samples 5000 --set steps=20000",
    "sparkrelay train work/smollm2 --kind mtp --run mtp --samples 5000",
)

REPORT_S = 10.0
MEAN_SAMPLE_TOKENS = 300
"""A guess for the estimates, before there are samples to look at."""


def register(app: typer.Typer) -> None:
    app.command("train", help=paragraphs(HELP), epilog=EXAMPLES, rich_help_panel="Train")(train)


def train(
    folder: Annotated[
        Path, typer.Argument(help="Folder for samples, states and runs; shared by all runs of a target.")
    ],
    target: Annotated[
        str, typer.Option(help="The target: a catalogue name, a folder or a hub id.")
    ] = "smollm2-135m",
    run: Annotated[str, typer.Option(help="Name of the run in the folder.")] = "dspark",
    kind: Annotated[str, typer.Option(help="What is trained: dspark, dflash or mtp.")] = "dspark",
    samples: Annotated[
        int, typer.Option(min=0, help="Samples to have in all; 0: train on what there is.")
    ] = 2000,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help='JSON lines {"turns": ["a message", ...]}; the target writes the rest of its prompts itself.'
        ),
    ] = None,
    greedy_share: Annotated[float, typer.Option(min=0, max=1, help="Share of greedy answers.")] = 0.75,
    temperature: Annotated[float, typer.Option(min=0, max=10, help="Temperature of the others.")] = 1.0,
    sequences: Annotated[int, typer.Option(min=1, max=512, help="Sequences that are written at once.")] = 48,
    keep_states: Annotated[
        bool, typer.Option(help="Keep the target's states on disk, or compute them anew in every step.")
    ] = True,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the run, NAME=VALUE; taps=8,22,28 for several values."),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 is all cores.")] = 0,
    save_every: Annotated[float, typer.Option(min=1, help="Seconds between checkpoints.")] = 300.0,
) -> None:
    from drafter_service.models.dspark.config import UnusableCheckpoint
    from drafter_service.training.phases import DataWish, have_samples, have_states, open_target
    from drafter_service.training.pipeline import CannotTrain, Workspace, settled, with_defaults
    from drafter_service.training.prompts import UnusablePrompts
    from sparkrelay.store import resolve

    work = Workspace(folder)
    wish = DataWish(samples, prompts or [], greedy_share, temperature, sequences)
    try:
        files = resolve(target)
        settings = settled(with_defaults(parse_settings(kind, setting or []), files.path), work.run(run))
        say_estimate(files.path, settings, max(samples, 1), keep_states)
        model = open_target(files.path, threads)
        if samples:
            with progress("writing samples", samples) as show:
                have_samples(model, files.path, work, wish, loop_start, show)
        with progress("computing states", None) as show:
            data = have_states(model, work, settings, keep_states, show)
        train_run(files.name, files.path, work, run, settings, data, save_every)
    except (CannotTrain, UnusableCheckpoint, UnusablePrompts, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        raise typer.Exit(130) from None


def parse_settings(kind: str, given: list[str]) -> TrainSettings:
    """The settings of a run, from NAME=VALUE. BadParameter names what is wrong with one."""
    from drafter_service.training.settings import TrainSettings

    known = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    if kind not in ("dspark", "dflash", "mtp"):
        raise typer.BadParameter(f"--kind: is {kind!r}; choose dspark, dflash or mtp")
    values: dict[str, Any] = {"kind": kind}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in known or name == "kind":
            names = ", ".join(name for name in known if name != "kind")
            raise typer.BadParameter(f"--set {text}: write NAME=VALUE; the names are {names}")
        values[name] = _value(name, value, known[name])
    return TrainSettings(**values)


def _value(name: str, text: str, default: object) -> object:
    """A setting's value, of the type of its default."""
    try:
        if isinstance(default, tuple):
            return tuple(int(part) for part in text.split(","))
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(default)(text)  # type: ignore[call-arg]
    except (KeyError, ValueError):
        raise typer.BadParameter(
            f"--set {name}: {text!r} is no value for it; its default is {default!r}"
        ) from None


def say_estimate(target: Path, settings: TrainSettings, sample_count: int, keep_states: bool) -> None:
    """What the run will take, before it begins."""
    from drafter_service.training.pipeline import estimate

    found = estimate(target, settings, sample_count * MEAN_SAMPLE_TOKENS)
    disk = megabytes(found.state_bytes) if keep_states else "none"
    print(
        f"{settings.kind}: the draft will be {megabytes(found.draft_bytes)}; states on disk {disk} "
        f"(for {sample_count} samples of about {MEAN_SAMPLE_TOKENS} tokens); memory about {megabytes(found.memory_bytes)} "
        "beside the target. Each step shows the time that is left once it runs.",
        file=sys.stderr,
    )


def train_run(
    name: str,
    target: Path,
    work: Workspace,
    run: str,
    settings: TrainSettings,
    data: TrainData,
    save_every_s: float,
) -> None:
    """Step 3."""
    from drafter_service.training import trainer as training
    from drafter_service.training.pipeline import new_trainee, save_result, target_fingerprint

    trainee = new_trainee(target, settings, data)
    trainer = training.Trainer(trainee, settings, data, work.run(run))
    fingerprint = target_fingerprint(name, target)
    saved_at = time.monotonic()

    def keep() -> None:
        judged = trainer.judge(data.held_out_numbers)
        trainer.log({"step": trainer.step, "held_out": judged.to_json()})
        save_result(trainer, trainee, settings, fingerprint, work.run(run) / "draft")
        say_held_out(trainer, judged)

    def time_to_save() -> bool:
        nonlocal saved_at
        due = time.monotonic() - saved_at >= save_every_s
        if due:
            saved_at = time.monotonic()
            keep()
        return due

    with progress("training", settings.steps) as show:
        training.run(trainer, settings, time_to_save, lambda report: show(report.step, describe(report)))
    keep()
    print(f"The draft is in {work.run(run) / 'draft'}")


def describe(report: StepReport) -> str:
    """A step in a few words; the accepted length is that of its anchors, if rounds began at all of them alike."""
    return f"loss {report.loss:.3f}, accepted length about {1 + report.matched:.2f}"


def say_held_out(trainer: Trainer, judged: HeldOut) -> None:
    rates = " ".join(f"{rate:.2f}" for rate in judged.rates)
    print(
        f"step {trainer.step}: held out: loss {judged.loss:.3f}, accepted length {judged.rounds.accepted_length:.3f}, "
        f"by position {rates}",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """A bar in a terminal; elsewhere a line every few seconds. Yields what takes the count done and a few words."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task(what, total=total, words="")
    pace = _Pace(total, time.monotonic())

    def show(done: int, words: str) -> None:
        bar.update(task, completed=done, words=words)
        now = time.monotonic()
        if not console.is_terminal and pace.is_due(now):
            print(f"{what}: {pace.say(done, now)}; {words}", file=sys.stderr, flush=True)

    with bar:
        yield show


class _Pace:
    """How far something is, and how long it will take, from the first report on: what was done before it cost nothing now."""

    def __init__(self, total: int | None, now: float) -> None:
        self._total = total
        self._said_at = now - REPORT_S
        self._first: tuple[int, float] | None = None

    def is_due(self, now: float) -> bool:
        due = now - self._said_at >= REPORT_S
        if due:
            self._said_at = now
        return due

    def say(self, done: int, now: float) -> str:
        if self._first is None:
            self._first = done, now
        if self._total is None:
            return str(done)
        since_done, since = self._first
        rate = (done - since_done) / max(now - since, 1e-9)
        left = f", {(self._total - done) / rate / 60:.0f} min left" if rate > 0 else ""
        return f"{done} of {self._total}{left}"
