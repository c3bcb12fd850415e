"""Real processes on loopback. Every fixture ends what it started, also when a test fails."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from sparkrelay.cli.stack import Child, Stack
from sparkrelay.cli.stack_plan import StackOptions, any_free_port, plan_drafter, plan_stack
from sparkrelay.cli.up import core_count
from sparkrelay.client.blocking import Client, connect
from sparkrelay.store import ModelFiles

ROOT = Path(__file__).parents[2]


def patient(block_wait_ms: int) -> dict[str, tuple[str, ...]]:
    """Flags with which blocks are awaited, not hoped for: what a test shows of them must not depend on the machine's load.

    Not for ever: a drafter that lies by saying nothing costs this wait each time.
    """
    return {
        "verifier": ("--block-wait-ms", str(block_wait_ms)),
        "drafter": ("--block-size", "15", "--seed", "7"),
    }


TOY = StackOptions(model="toy", drafter="none", log_level="debug", drain_ms=500, flags=patient(200))

StartStack = Callable[[StackOptions], Stack]
RunDrafter = Callable[[Stack, str], AbstractContextManager[Child]]


@pytest.fixture(scope="session", autouse=True)
def in_the_checkout() -> Iterator[None]:
    """The services are found as modules of the folder that tests run in."""
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@contextmanager
def running(options: StackOptions, folder: Path) -> Iterator[Stack]:
    """A stack that is ready, and gone afterwards."""
    with Stack(plan_stack(options, core_count(), any_free_port), folder) as stack:
        stack.wait_until_ready(timeout_s=90)
        yield stack


@pytest.fixture(scope="session")
def toy_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A verifier with the toy model and a gateway, for all tests that leave both alive."""
    with running(TOY, tmp_path_factory.mktemp("toy")) as stack:
        yield stack


@pytest.fixture(scope="session")
def demo_draft(tmp_path_factory: pytest.TempPathFactory, demo_model: ModelFiles) -> Path:
    """A DSpark draft of the demo model with random weights: what it says is worthless, but it says it of context rows."""
    import torch
    from safetensors.torch import save_file

    from drafter_service.models.dspark.checkpoint import EMBEDDING, LM_HEAD, read_config
    from drafter_service.models.dspark.config import draft_of, to_json
    from drafter_service.models.dspark.network import DSparkNetwork

    config = draft_of(
        read_config(demo_model.path),
        num_hidden_layers=1,
        target_layer_ids=(8, 22, 28),
        mask_token_id=0,
        block_size=4,
        markov_rank=4,
        enable_confidence_head=True,
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DSparkNetwork(config).state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    folder = tmp_path_factory.mktemp("draft")
    save_file(
        {
            name: (0.1 * torch.randn(shape, generator=generator)).bfloat16()
            for name, shape in shapes.items()
            if name not in (EMBEDDING, LM_HEAD)
        },
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    return folder


@pytest.fixture(scope="session")
def demo_stack(
    tmp_path_factory: pytest.TempPathFactory, demo_model: ModelFiles, demo_draft: Path
) -> Iterator[Stack]:
    """The same with the demo model, which makes context rows too."""
    flags = patient(3000)  # the target as its own drafter takes a while for 15 tokens
    # One thread: the bits are the same, and threads that meet at barriers crawl on a machine that is busy otherwise.
    # Nothing of an ended session stays: what a test shows of shared beginnings comes from sessions that it holds open.
    flags["verifier"] += ("--threads", "1", "--leftover-percent", "0", "--context", str(demo_draft))
    options = StackOptions(demo_model.name, drafter="none", log_level="debug", drain_ms=500, flags=flags)
    with running(options, tmp_path_factory.mktemp("demo")) as stack:
        yield stack


@pytest.fixture
def own_stack(tmp_path: Path) -> Iterator[StartStack]:
    """Starts stacks that a test may hurt."""
    contexts: list[AbstractContextManager[Stack]] = []

    def start(options: StackOptions) -> Stack:
        context = running(options, tmp_path / str(len(contexts)))
        stack = context.__enter__()
        contexts.append(context)
        return stack

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


@contextmanager
def drafter_beside(
    stack: Stack, kind: str, folder: Path, more_flags: tuple[str, ...] = ()
) -> Iterator[Child]:
    """One drafter of a kind beside a running stack, connected; gone, and known to be gone, afterwards."""
    flags = {"drafter": (*patient(0)["drafter"], *more_flags)}
    options = StackOptions(stack.plan.model, kind, log_level="debug", drain_ms=500, flags=flags)
    plan = plan_drafter(options, 1, stack.verifier, core_count(), any_free_port)
    child = Child(plan, folder / f"{kind}.log")
    try:
        child.start(time.monotonic())
        with connect(stack.gateway) as client:
            wait_until(lambda: drafter_state(client) == "connected" or child.exit_code is not None)
        assert child.exit_code is None, child.log_tail()
        yield child
    finally:
        child.kill()
        with connect(stack.gateway) as client:
            wait_until(lambda: drafter_state(client) != "connected")


@pytest.fixture
def run_drafter(tmp_path: Path) -> RunDrafter:
    """A context manager that runs one drafter of a kind beside a stack."""
    return lambda stack, kind: drafter_beside(stack, kind, tmp_path)


def drafter_state(client: Client, name: str = "drafter-1") -> str:
    """connected, lost, refused, or unknown: what the gateway hears of a drafter."""
    drafters = {drafter.drafter_id: drafter for worker in client.workers() for drafter in worker.drafters}
    return drafters[name].state if name in drafters else "unknown"


def worker_state(client: Client) -> str:
    """connecting, ready, draining or lost: where the gateway stands with the one verifier."""
    (worker,) = client.workers()
    return worker.state


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Asks again and again; fails after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
