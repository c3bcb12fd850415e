"""The services and children of a benchmark are found as modules of the checkout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def in_the_checkout() -> Iterator[None]:
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def nobody_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause between runs is for figures, and nothing here is one."""
    monkeypatch.setattr("benchmarks.measuring.SETTLE_S", 0.0)
