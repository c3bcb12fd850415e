"""The one mechanism for what a machine lacks: skip with a named reason, or fail where everything is required.

    buf = requires("buf")            path of a program; skips this test without it
    unavailable("exact numerics", "the start-up probe found none", "run on another CPU")

With SPARKRELAY_REQUIRE_ALL=1 each such skip is a failure. Either way the last lines of the run name what was missing
(tests/conftest.py prints `MISSING`).
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

REQUIRE_ALL_VARIABLE = "SPARKRELAY_REQUIRE_ALL"


@dataclass(frozen=True, slots=True)
class Need:
    """Something a test needs: the name of the program to look for, and how to get it."""

    program: str
    remedy: str


NEEDS: dict[str, Need] = {
    "buf": Need("buf", "pip install buf-bin"),
    "openssl": Need("openssl", "apt-get install openssl"),
}

# name -> how to get it, for everything that was asked for in this run and not there.
MISSING: dict[str, str] = {}


def requires(name: str) -> Path:
    """The program of a need of NEEDS, from this environment or PATH. Without it the test is skipped or fails."""
    need = NEEDS[name]
    beside_python = Path(sys.executable).parent
    found = shutil.which(need.program, path=str(beside_python)) or shutil.which(need.program)
    if found is None:
        unavailable(name, "it is not installed", need.remedy)
    return Path(found)


def unavailable(name: str, reason: str, remedy: str) -> NoReturn:
    """Ends the running test because the machine lacks `name`: a skip, or a failure where all is required."""
    MISSING[name] = remedy
    message = f"{name} is missing: {reason} (to get it: {remedy})"
    if os.environ.get(REQUIRE_ALL_VARIABLE) == "1":
        pytest.fail(f"{message}; {REQUIRE_ALL_VARIABLE}=1 makes this a failure", pytrace=False)
    pytest.skip(message)


def report_lines() -> list[str]:
    """What to print at the end of a run; nothing when nothing was missing."""
    if not MISSING:
        return []
    lines = [f"  {name}: {remedy}" for name, remedy in sorted(MISSING.items())]
    return ["Missing on this machine, and how to get it:", *lines]
