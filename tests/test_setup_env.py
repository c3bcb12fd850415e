"""What `make` does before anything else, as far as it can be said without installing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import setup_env

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_the_pythons_of_the_project_are_accepted(version: tuple[int, int]) -> None:
    setup_env.check_python(version)


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7)])
def test_another_python_is_refused_with_the_way_to_name_one(
    version: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        setup_env.check_python(version)
    assert "make PYTHON=" in capsys.readouterr().err


def test_an_environment_is_current_until_what_it_was_made_from_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "VENV_PYTHON", tmp_path / "python")
    (tmp_path / "tools").mkdir()
    (tmp_path / "pyproject.toml").write_text("[project]")
    (tmp_path / setup_env.CPU_ONLY).write_text("")
    (tmp_path / "python").write_text("")
    stamp = tmp_path / "ready"
    assert not setup_env.is_current(stamp, setup_env.fingerprint())
    stamp.write_text(setup_env.fingerprint())
    assert setup_env.is_current(stamp, setup_env.fingerprint())
    (tmp_path / "pyproject.toml").write_text("[project] # changed")
    assert not setup_env.is_current(stamp, setup_env.fingerprint())


def test_without_a_gpu_no_cuda_may_be_installed_unless_somebody_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup_env.sys, "platform", "linux")
    monkeypatch.setattr(setup_env, "has_nvidia_gpu", lambda: False)
    assert not setup_env.cuda_is_welcome(allowed=False)
    assert setup_env.cuda_is_welcome(allowed=True)
    assert setup_env.constraints(cuda=False) == ("--constraint", "tools/cpu_only.txt")
    assert setup_env.constraints(cuda=True) == ()


def test_the_announcement_gives_sizes_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env.sys, "platform", "linux")
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    setup_env.announce(dev=False, torch_present=False, cuda=False)
    said = capsys.readouterr().out
    assert f"{setup_env.TORCH_CPU_MB} MB  torch==" in said
    assert "CPU build" in said
    assert f"{setup_env.MODEL_MB} MB  the demo model" in said


def test_make_without_a_usable_python_says_so() -> None:
    run = subprocess.run(
        ["make", "--no-print-directory", "demo", "PYTHON="],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert run.stderr.startswith("error: SparkRelay needs Python 3.11, 3.12 or 3.13")
