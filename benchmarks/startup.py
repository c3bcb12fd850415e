"""How long `sparkrelay up` takes until a first question can be asked, with files in the page cache (warm) and without (cold).

    python benchmarks/startup.py [--quick] [--json FILE] [--model NAME]

Starts the real command in a runtime folder of its own and takes the time from the start of its process to the line that says
that it is up; then it ends it and goes on. Before a cold start the kernel is asked to drop the cached pages of the model, of
this Python's libraries and of this project; pages that another process has mapped stay, so stop other stacks first.
The last line of standard output is one JSON object: `ready_s` by "warm" and "cold", each with all starts and their median.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sparkrelay.store import resolve

BUDGET_S = {"warm": 20.0, "cold": 60.0}
UP_LINE = "SparkRelay is up"
LIMIT_S = 180.0
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    options = _arguments()
    console = Console(stderr=True, highlight=False)
    repeats = 1 if options.quick else 3
    ready: dict[str, list[float]] = {"warm": [], "cold": []}
    ready_s(options.model)  # the first start fills the cache; it counts as neither
    for number in range(repeats):
        for kind, seconds in ready.items():
            if kind == "cold":
                dropped = drop_from_cache(cached_files(options.model))
                console.print(f"asked the kernel to drop {dropped / 2**20:.0f} MiB of files")
            seconds.append(ready_s(options.model))
            console.print(f"{kind} start {number + 1} of {repeats}: {seconds[-1]:.1f} s")
    Console(highlight=False).print(table(ready))
    result = as_json(ready)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def ready_s(model: str) -> float:
    """Starts `sparkrelay up`, ends it once it is up, and returns how long that took. Raises RuntimeError with its output."""
    with tempfile.TemporaryDirectory(prefix="sparkrelay-bench-") as folder:
        environment = {**os.environ, "SPARKRELAY_RUNTIME_DIR": folder}
        command = [sys.executable, "-m", "sparkrelay", "up", "--model", model, "--log-level", "warning"]
        started = time.monotonic()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            told: list[str] = []
            try:
                for line in process.stdout:
                    told.append(line)
                    if line.startswith(UP_LINE):
                        return time.monotonic() - started
                    if time.monotonic() - started > LIMIT_S:
                        break
                raise RuntimeError(f"the stack did not come up:\n{''.join(told)}")
            finally:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=30)


def cached_files(model: str) -> Iterator[Path]:
    """What a start reads: the model, the libraries, the interpreter's own modules, this project."""
    folders = {Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib", "stdlib")}
    if model.partition(":")[0] != "toy":
        folders.add(Path(resolve(model).path))
    for folder in (*folders, ROOT / "sparkrelay", ROOT / "verifier_service", ROOT / "drafter_service"):
        yield from (file for file in folder.rglob("*") if file.is_file())


def drop_from_cache(files: Iterator[Path]) -> int:
    """Asks for each file's pages to be dropped; bytes of the files. Where the system has no such call, nothing happens."""
    if not hasattr(os, "posix_fadvise"):
        return 0
    byte_count = 0
    for file in files:
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                byte_count += os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
    return byte_count


def table(ready: dict[str, list[float]]) -> Table:
    """One row a kind of start."""
    result = Table(title="`sparkrelay up` until it is up", title_justify="left")
    for heading in ("start", "median s", "budget s", "fastest s", "slowest s", "starts"):
        result.add_column(heading, justify="right")
    for kind, seconds in ready.items():
        median = statistics.median(seconds)
        cells = (median, BUDGET_S[kind], min(seconds), max(seconds))
        result.add_row(kind, *(f"{cell:.1f}" for cell in cells), str(len(seconds)))
    return result


def as_json(ready: dict[str, list[float]]) -> dict[str, object]:
    """The result for programs."""
    return {
        "ready_s": {kind: round(statistics.median(seconds), 2) for kind, seconds in ready.items()},
        "starts_s": {kind: [round(each, 2) for each in seconds] for kind, seconds in ready.items()},
        "budget_s": BUDGET_S,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one start of each kind")
    parser.add_argument("--json", metavar="FILE", default="", help="write the last line to a file too")
    parser.add_argument("--model", default="smollm2-135m", help="as of `sparkrelay up`")
    return parser.parse_args()


if __name__ == "__main__":
    main()
