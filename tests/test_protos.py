"""The contract on the wire: stubs as fresh as the protos, lint, and nothing broken that was released."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.requirements import requires
from tools.make_stubs import generate

ROOT = Path(__file__).resolve().parent.parent
STUBS = ROOT / "sparkrelay" / "v1"
BASELINE = ROOT / "protos" / "baseline.binpb"


def buf(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    program = str(requires("buf"))
    return subprocess.run(
        [program, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def stub_texts(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if "_pb2" in file.name}


def test_the_committed_stubs_are_what_the_protos_generate(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh, committed = stub_texts(tmp_path / "sparkrelay" / "v1"), stub_texts(STUBS)
    assert len(fresh) == 4 * len(list((ROOT / "protos").rglob("*.proto")))
    assert sorted(committed) == sorted(fresh), "run `make protos`"
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert not stale, "run `make protos`"


def test_the_protos_keep_the_style_rules() -> None:
    run = buf("lint")
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_protos_are_formatted() -> None:
    run = buf("format", "--diff", "--exit-code")
    assert run.returncode == 0, f"run `buf format --write`:\n{run.stdout}{run.stderr}"


def test_nothing_released_is_broken() -> None:
    if not BASELINE.exists():
        pytest.skip("nothing is released yet: protos/baseline.binpb does not exist (`make baseline`)")
    run = buf("breaking", "--against", str(BASELINE))
    assert run.returncode == 0, run.stdout + run.stderr


def test_removing_a_released_field_would_be_noticed(tmp_path: Path) -> None:
    proto = tmp_path / "protos" / "sparkrelay" / "v1" / "tensor.proto"
    proto.parent.mkdir(parents=True)
    (tmp_path / "buf.yaml").write_text((ROOT / "buf.yaml").read_text())
    released = (
        '// Two.\nsyntax = "proto3";\npackage sparkrelay.v1;\nmessage Two { int32 one = 1; int32 two = 2; }\n'
    )
    proto.write_text(released)
    assert buf("build", "--output", "released.binpb", folder=tmp_path).returncode == 0
    assert buf("breaking", "--against", "released.binpb", folder=tmp_path).returncode == 0
    proto.write_text(released.replace(" int32 two = 2;", ""))
    run = buf("breaking", "--against", "released.binpb", folder=tmp_path)
    assert run.returncode != 0
    assert "two" in run.stdout
