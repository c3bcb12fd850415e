"""`up`, `generate` and `demo` as a user runs them: real processes, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sparkrelay.cli.stack import Stack
from sparkrelay.runtime import FILE_NAME, is_alive
from sparkrelay.store import ModelFiles
from tests.system.conftest import RunDrafter, wait_until

pytestmark = pytest.mark.system


@dataclass
class Up:
    """A running `sparkrelay up`."""

    process: subprocess.Popen[str]
    folder: Path
    output: Path

    @property
    def runtime(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / FILE_NAME).read_text())
        return content

    def says(self, words: str) -> bool:
        return words in self.output.read_text()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sparkrelay", *arguments]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "SPARKRELAY_RUNTIME_DIR": str(folder), "SPARKRELAY_GATEWAY": ""}


def run(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), input=stdin, capture_output=True, text=True, timeout=100, env=environment(folder)
    )


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Runs `sparkrelay up --model toy` until its runtime file is there; ends it."""
    started: list[Up] = []

    def start(*flags: str) -> Up:
        folder, output = tmp_path / "run", tmp_path / "output"
        with output.open("w") as file:
            process = subprocess.Popen(
                command("up", "--model", "toy", *flags),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                text=True,
                env=environment(folder),
                start_new_session=True,
            )
        running = Up(process, folder, output)
        started.append(running)
        wait_until(lambda: (folder / FILE_NAME).exists() or process.poll() is not None, timeout_s=60)
        assert process.poll() is None, output.read_text()
        return running

    yield start
    for running in started:
        running.process.terminate()
        running.process.wait(timeout=30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_process_no_port_and_no_runtime_file(up: Callable[..., Up], number: int) -> None:
    running = up()
    runtime = running.runtime
    assert all(is_alive(pid) for pid in runtime["pids"].values())
    running.process.send_signal(number)
    assert running.process.wait(timeout=30) == 0, running.output.read_text()
    assert not any(is_alive(pid) for name, pid in runtime["pids"].items() if name != "up")
    assert not (running.folder / FILE_NAME).exists()
    addresses = [runtime["gateway"], *runtime["verifiers"], *runtime["drafters"], *runtime["health"].values()]
    assert len(addresses) == 6
    for address in addresses:
        socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))).close()


def test_services_end_by_themselves_when_up_is_killed(up: Callable[..., Up]) -> None:
    running = up()
    pids = running.runtime["pids"]
    running.process.kill()
    running.process.wait()
    wait_until(lambda: not any(is_alive(pid) for name, pid in pids.items() if name != "up"))


def test_generate_prints_one_object_with_the_promised_keys(up: Callable[..., Up]) -> None:
    running = up()
    arguments = ["--token-ids", "7,3,9,7,3,9", "--max-tokens", "48", "--temperature", "0.7", "--top-p", "0.9"]
    first = run(running.folder, "generate", *arguments, "--seed", "5", "--json")
    plain = run(running.folder, "generate", *arguments, "--seed", "5", "--speculation", "off", "--json")
    assert first.returncode == plain.returncode == 0, first.stderr + plain.stderr
    answer = json.loads(first.stdout)
    promised = {"turn_id", "text", "token_ids", "finish_reason", "usage", "seed", "timing", "rounds"}
    assert promised <= set(answer)
    assert answer["seed"] == 5
    assert answer["rounds"] and all(
        {"drafted", "depth", "accepted"} <= set(report) for report in answer["rounds"]
    )
    assert answer["token_ids"] == json.loads(plain.stdout)["token_ids"]
    assert len(first.stdout.splitlines()) == 1


def test_a_dead_child_is_told_and_started_again(up: Callable[..., Up]) -> None:
    running = up()
    victim = running.runtime["pids"]["verifier"]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: running.says("verifier was killed by SIGKILL; the others go on"))
    wait_until(lambda: running.says("verifier was started again"))
    assert running.runtime["pids"]["verifier"] != victim

    def answers() -> bool:
        return run(running.folder, "generate", "--token-ids", "1,2,3", "--max-tokens", "4").returncode == 0

    wait_until(answers)


def test_a_second_up_is_refused_while_the_first_runs(up: Callable[..., Up]) -> None:
    running = up()
    second = run(running.folder, "up", "--model", "toy")
    assert second.returncode == 1
    assert running.runtime["gateway"] in second.stderr


def test_generate_without_a_stack_says_what_to_start(tmp_path: Path) -> None:
    result = run(tmp_path, "generate", "--prompt", "Hello")
    assert result.returncode == 1
    assert "sparkrelay up" in result.stderr
    result = run(tmp_path, "generate", "--prompt", "Hello", "--gateway", "127.0.0.1:9")
    assert result.returncode == 1
    assert "sparkrelay up" in result.stderr


def test_up_with_a_model_that_is_not_here_says_how_to_get_it(tmp_path: Path) -> None:
    result = run(tmp_path, "up", "--model", "no-such-model")
    assert result.returncode == 1
    assert "models" in result.stderr


def test_a_refusal_names_reason_field_and_turn(toy_stack: Stack, tmp_path: Path) -> None:
    arguments = ["--token-ids", "1,2", "--gateway", toy_stack.gateway]
    result = run(tmp_path, "generate", *arguments, "--top-p", "7")
    assert result.returncode == 1
    assert "top_p" in result.stderr and "INVALID_FIELD" in result.stderr and "turn " in result.stderr
    result = run(tmp_path, "generate", *arguments, "--speculation", "fixed:99")
    assert result.returncode == 1
    assert "fixed:K" in result.stderr


def test_generate_streams_text_of_the_demo_model(
    demo_stack: Stack, run_drafter: RunDrafter, tmp_path: Path
) -> None:
    with run_drafter(demo_stack, "ngram"):
        arguments = ["--gateway", demo_stack.gateway, "--max-tokens", "24"]
        told = run(tmp_path, "generate", "--prompt", "The capital of France is", "--raw", *arguments)
        asked = run(tmp_path, "generate", "--prompt", "-", *arguments, stdin="What is the capital of France?")
    assert told.returncode == asked.returncode == 0, told.stderr + asked.stderr
    assert "Paris" in told.stdout and "Paris" in asked.stdout
    assert "tokens/s" in told.stderr


@pytest.mark.slow
def test_the_demo_shows_an_identical_answer_in_under_half_a_minute(
    demo_model: ModelFiles, tmp_path: Path
) -> None:
    started = time.monotonic()
    result = run(tmp_path, "demo")
    took_s = time.monotonic() - started
    assert result.returncode == 0, result.stdout + result.stderr
    assert "identical: yes" in result.stdout
    for words in ("tokens/s", "accepted length", "rounds", "drafted", "rejected", "sparkrelay up"):
        assert words in result.stdout
    print(f"the demo took {took_s:.1f} s")
