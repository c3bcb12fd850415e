"""Regenerates sparkrelay/v1 (stubs and their .pyi) from protos/. Run by `make protos`; the tests compare with its result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"


def generate(output: Path) -> None:
    """Writes the stubs of every .proto below `output`, at sparkrelay/v1/. Raises CalledProcessError when protoc refuses."""
    sources = sorted(str(file.relative_to(PROTOS)) for file in PROTOS.rglob("*.proto"))
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    outputs = [f"--{kind}_out={output}" for kind in kinds]
    # protoc finds its mypy plugins on PATH; they are installed beside this Python.
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}", *outputs, *sources]
    subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    generate(ROOT)
