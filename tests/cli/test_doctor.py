"""The doctor's questions to a real machine, and the command as a user runs it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparkrelay import cli
from sparkrelay.cli import doctor_probes as probes
from sparkrelay.runtime import FILE_NAME, write_runtime

LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who holds a port")


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No stack, no pulled model, no gateway."""
    monkeypatch.setenv("SPARKRELAY_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("SPARKRELAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPARKRELAY_GATEWAY", "")
    return tmp_path / "run"


def gone_pid() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def doctor(*words: str) -> tuple[int, list[dict[str, str]]]:
    result = CliRunner().invoke(cli.build_app(), ["doctor", "--json", *words])
    report = json.loads(result.stdout)
    assert report["ok"] == (result.exit_code == 0)
    return result.exit_code, report["findings"]


def of(findings: list[dict[str, str]], subject: str) -> dict[str, str]:
    return next(each for each in findings if each["subject"] == subject)


def test_a_machine_without_a_stack_is_told_what_to_start_and_is_no_failure() -> None:
    code, findings = doctor()
    assert code == 0, findings
    assert of(findings, "stack")["next_step"] == "Start one: sparkrelay up"
    assert "models pull smollm2-135m" in of(findings, "model")["next_step"]
    assert of(findings, "python")["level"] == of(findings, "base")["level"] == "ok"


def test_a_model_that_was_asked_for_and_is_not_there_fails() -> None:
    code, findings = doctor("--model", "smollm2-135m")
    assert code == 1 and of(findings, "model")["level"] == "fail"


def test_a_gateway_that_does_not_answer_fails() -> None:
    code, findings = doctor("--gateway", "127.0.0.1:9")
    assert code == 1 and "127.0.0.1:9" in of(findings, "gateway")["what"]


def test_a_runtime_file_of_a_process_that_is_gone_is_stale(nothing_runs: Path) -> None:
    write_runtime({"gateway": "127.0.0.1:1", "pids": {"up": gone_pid()}}, nothing_runs)
    code, findings = doctor()
    assert code == 0 and "which is gone" in of(findings, "stack")["what"]


def test_a_runtime_file_that_is_no_json_is_unreadable(nothing_runs: Path) -> None:
    nothing_runs.mkdir()
    (nothing_runs / FILE_NAME).write_text("{")
    code, findings = doctor()
    assert code == 1 and "rm " in of(findings, "stack")["next_step"]


def test_a_stack_whose_services_do_not_answer_is_not_ready(nothing_runs: Path) -> None:
    content = {"gateway": "127.0.0.1:9", "pids": {"up": os.getpid()}, "health": {"gateway": "127.0.0.1:9"}}
    write_runtime({**content, "model": "toy"}, nothing_runs)
    code, findings = doctor()
    assert code == 1 and "not ready: gateway" in of(findings, "stack")["what"]


@LINUX_ONLY
def test_who_holds_a_port_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not probes.is_free(port)
        assert probes.holder_of(port).endswith(f"(process {os.getpid()})")
    assert probes.is_free(port)
    assert probes.holder_of(port) == "another process"


def test_a_folder_that_holds_a_model_is_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    (folder / "tokenizer.json").write_text("{broken")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    seen = probes.model_on_disk(str(folder))
    assert (seen.problem, seen.weight_bytes, seen.bytes_per_token) == ("", 1000, 2 * 2 * 2 * 2 * 16)
    assert seen.has_chat_template and "cannot be loaded" in seen.tokenizer_problem
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in probes.model_on_disk(str(folder)).tokenizer_problem
    assert probes.model_on_disk(str(tmp_path)).problem


def test_the_report_is_readable_at_sixty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    result = CliRunner().invoke(cli.build_app(), ["doctor"])
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 60
    assert "\x1b" not in result.stdout
    assert "sparkrelay models pull" in " ".join(result.stdout.split())
