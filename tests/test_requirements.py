"""The mechanism for missing things, in runs of its own: pytest starts pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CONFTEST = "from tests.conftest import pytest_terminal_summary\n"
LACKING_TEST = """
from tests.requirements import NEEDS, Need, requires

def test_lacks():
    NEEDS["wizard"] = Need("no-such-program-anywhere", "hire a wizard")
    requires("wizard")

def test_has():
    NEEDS["python"] = Need("python3", "impossible")
    assert requires("python").name == "python3"
"""


def run_pytest(folder: Path, require_all: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_lacking.py").write_text(LACKING_TEST)
    environment = {**os.environ, "SPARKRELAY_REQUIRE_ALL": require_all, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
    ]
    return subprocess.run(
        [*command, str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_is_missing_is_skipped_with_its_remedy_in_the_last_lines(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, require_all="0")
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stdout
    assert "1 passed, 1 skipped" in lines[-1]
    assert lines[-3:-1] == ["Missing on this machine, and how to get it:", "  wizard: hire a wizard"]


def test_where_all_is_required_what_is_missing_is_a_failure(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, require_all="1")
    lines = run.stdout.splitlines()
    assert run.returncode == 1, run.stdout
    assert "1 failed, 1 passed" in lines[-1]
    assert lines[-3:-1] == ["Missing on this machine, and how to get it:", "  wizard: hire a wizard"]
