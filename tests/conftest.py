"""What every test may use: the demo model, and the list of what this machine lacks at the end of the run."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings

from sparkrelay.store import ModelFiles, NotPulled, StoreError, default_paths, find, pull_model, resolve
from tests.requirements import report_lines, unavailable

DEMO_MODEL = "smollm2-135m"

# No test asserts a time: on a busy machine an example may take any.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def demo_model() -> ModelFiles:
    """The demo model's files, pulled once if this machine has never had it."""
    try:
        return resolve(DEMO_MODEL)
    except NotPulled:
        pass
    try:
        pull_model(find(DEMO_MODEL), default_paths())
    except StoreError as error:
        unavailable(DEMO_MODEL, error.message, f"sparkrelay models pull {DEMO_MODEL}")
    return resolve(DEMO_MODEL)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The bits are the same, and threads that meet at barriers crawl on a machine that is busy otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """Names what was missing after every other summary: only pytest's closing line comes later."""
    yield
    for line in report_lines():
        terminalreporter.write_line(line)
