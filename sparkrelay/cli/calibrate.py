"""`sparkrelay calibrate`: makes a draft's confidences mean what they say, and shows how far they did before."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparkrelay.cli.options import examples, paragraphs
from sparkrelay.cli.train import progress

if TYPE_CHECKING:
    from rich.table import Table

    from drafter_service.training.calibrate import Quality

HELP = """Calibrate the confidences of a trained draft.

Drafts at every position of answers that the draft was not trained on, compares what its confidence head said with what matched,
and writes calibration.json beside the draft: one temperature a position, for greedy and for sampled turns.
"""
EXAMPLES = examples("sparkrelay calibrate work/smollm2", "sparkrelay calibrate work/smollm2 --run other")


def register(app: typer.Typer) -> None:
    app.command("calibrate", help=paragraphs(HELP), epilog=EXAMPLES, rich_help_panel="Train")(calibrate)


def calibrate(
    folder: Annotated[Path, typer.Argument(help="Folder that was given to `sparkrelay train`.")],
    run: Annotated[str, typer.Option(help="Name of the run in the folder.")] = "dspark",
    target: Annotated[
        str, typer.Option(help="The target: a catalogue name, a folder or a hub id.")
    ] = "smollm2-135m",
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 is all cores.")] = 0,
) -> None:
    from drafter_service.models.dspark.config import UnusableCheckpoint
    from drafter_service.training.calibration_run import calibrate_run
    from drafter_service.training.pipeline import CannotTrain, Workspace
    from sparkrelay.store import resolve

    work = Workspace(folder)
    try:
        with progress("drafting at every position", None) as show:
            found = calibrate_run(work, run, resolve(target).path, threads, show)
    except (CannotTrain, UnusableCheckpoint, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    from rich.console import Console

    for name, fitted in found.items():
        Console().print(quality_table(name, fitted.temperatures, fitted.before, fitted.after))
    print(f"Written to {work.run(run) / 'draft'}")


def quality_table(name: str, temperatures: tuple[float, ...], before: Quality, after: Quality) -> Table:
    """What calibration changed, by position."""
    from rich.table import Table

    table = Table(
        "POSITION", "TEMPERATURE", "ECE BEFORE", "ECE AFTER", "AUC", title=f"{name} turns", box=None
    )
    for k, temperature in enumerate(temperatures):
        table.add_row(
            str(k + 1),
            f"{temperature:.2f}",
            f"{100 * before.ece[k]:.1f} %",
            f"{100 * after.ece[k]:.1f} %",
            f"{after.auc[k]:.3f}",
        )
    return table
