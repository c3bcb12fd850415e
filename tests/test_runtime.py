"""The runtime file: written whole, read by others, ignored once its owner is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sparkrelay.runtime import FILE_NAME, read_runtime, remove_runtime, runtime_folder, write_runtime

STACK = {
    "gateway": "127.0.0.1:7070",
    "verifiers": [],
    "drafters": [],
    "pids": {"up": os.getpid()},
    "model": "toy",
}


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    write_runtime(STACK, tmp_path / "run")
    assert read_runtime(tmp_path / "run") == STACK
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE_NAME]


def test_the_file_of_a_dead_owner_counts_as_nothing(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write_runtime({**STACK, "pids": {"up": child.pid}}, tmp_path)
    assert read_runtime(tmp_path) is None


def test_no_file_and_a_broken_file_count_as_nothing(tmp_path: Path) -> None:
    assert read_runtime(tmp_path) is None
    for broken in ("", "[1]", '{"gateway": 7}', "{"):
        (tmp_path / FILE_NAME).write_text(broken)
        assert read_runtime(tmp_path) is None


def test_only_the_owner_removes_the_file(tmp_path: Path) -> None:
    path = write_runtime(STACK, tmp_path)
    remove_runtime(os.getpid() + 1, tmp_path)
    assert path.exists()
    remove_runtime(os.getpid(), tmp_path)
    assert not path.exists()


def test_the_folder_follows_the_environment() -> None:
    home = Path("/home/someone")
    assert runtime_folder({"SPARKRELAY_RUNTIME_DIR": "/here"}, "linux", home) == Path("/here")
    assert runtime_folder({"XDG_RUNTIME_DIR": "/run/user/7"}, "linux", home) == Path("/run/user/7/sparkrelay")
    assert runtime_folder({}, "linux", home) == home / ".cache" / "sparkrelay" / "run"
