"""Makes this checkout ready to run: `.venv` with everything installed, and the demo model. Standard library only.

    python tools/setup_env.py [--dev]

Says what it will download and how large before it starts, and does nothing, without network, when nothing is to do.

torch needs care: on Linux the package index gives a build with gigabytes of CUDA. Without an NVIDIA GPU this script takes the CPU
build from PyTorch's public index (TORCH_INDEX names another one); if that cannot be reached it takes the default index's build,
but only if that brings no CUDA (tools/cpu_only.txt makes pip refuse it), or if SPARKRELAY_ALLOW_CUDA=1 says that CUDA is fine.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"

PYTHON_LOWEST, PYTHON_HIGHEST = (3, 11), (3, 13)
TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
INDEX_TIMEOUT_S = 10
CPU_ONLY = Path("tools", "cpu_only.txt")
DEMO_MODEL = "smollm2-135m"

# Download sizes, about; only for the announcement.
TORCH_CPU_MB, TORCH_CUDA_MB, TORCH_MAC_MB = 200, 2800, 90
PACKAGES_MB, DEV_PACKAGES_MB, MODEL_MB = 80, 70, 93


def main() -> None:
    """Parses the one option and brings the checkout up to date."""
    parser = argparse.ArgumentParser(description="Make this checkout ready to run.")
    parser.add_argument("--dev", action="store_true", help="also install what the tests need")
    dev = parser.parse_args().dev
    check_python(sys.version_info[:2])
    stamp, wanted = stamp_file(dev), fingerprint()
    if not is_current(stamp, wanted):
        install(dev)
        stamp.write_text(wanted, encoding="utf-8")
    fetch_demo_model()


def check_python(version: tuple[int, ...]) -> None:
    """Refuses interpreters that the project is not made for."""
    if not PYTHON_LOWEST <= version <= PYTHON_HIGHEST:
        stop(
            f"SparkRelay needs Python 3.11, 3.12 or 3.13; this one is {'.'.join(map(str, version))}.",
            "Name another: make PYTHON=/path/to/python3.11 …",
        )


def stamp_file(dev: bool) -> Path:
    """Where it is noted that this set of extras is installed."""
    return VENV / ("ready-for-tests" if dev else "ready")


def fingerprint() -> str:
    """Changes whenever an installed environment would have to change."""
    digest = hashlib.sha256()
    for file in (ROOT / "pyproject.toml", Path(__file__), ROOT / CPU_ONLY):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def is_current(stamp: Path, wanted: str) -> bool:
    return VENV_PYTHON.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted


def install(dev: bool) -> None:
    """Creates `.venv` if it is absent and installs torch and this checkout into it."""
    torch_present = VENV_PYTHON.exists() and has_torch()
    cuda = cuda_is_welcome(os.environ.get("SPARKRELAY_ALLOW_CUDA") == "1")
    announce(dev, torch_present, cuda)
    if not VENV_PYTHON.exists():
        create_venv()
    if not torch_present:
        install_torch(cuda)
    extras = "all,dev" if dev else "all"
    say(f"Installing this checkout with its extras {extras} …")
    if pip("install", "--quiet", *constraints(cuda), "--editable", f".[{extras}]").returncode != 0:
        stop(
            "pip could not install the packages (its own words are above).",
            "Check the network, then run make again.",
        )


def cuda_is_welcome(allowed: bool) -> bool:
    """Whether torch's CUDA build may be installed: somebody said so, there is an NVIDIA GPU, or no such build exists (macOS)."""
    return allowed or sys.platform == "darwin" or has_nvidia_gpu()


def constraints(cuda: bool) -> tuple[str, ...]:
    return () if cuda else ("--constraint", str(CPU_ONLY))


def announce(dev: bool, torch_present: bool, cuda: bool) -> None:
    """What will be downloaded and how large, before anything is."""
    lines = ["Setting up this checkout, once. To be downloaded, at most:"]
    if not torch_present:
        size, kind = torch_size(cuda)
        lines.append(f"  {size:>5} MB  {TORCH} ({kind})")
    packages = PACKAGES_MB + (DEV_PACKAGES_MB if dev else 0)
    lines.append(f"  {packages:>5} MB  Python packages{', with the tools of the tests' if dev else ''}")
    lines.append(f"  {MODEL_MB:>5} MB  the demo model {DEMO_MODEL}, if this machine does not have it yet")
    say("\n".join([*lines, f"Everything but the model goes into {VENV.name}/ (less what pip has cached)."]))


def torch_size(cuda: bool) -> tuple[int, str]:
    if sys.platform == "darwin":
        return TORCH_MAC_MB, "for macOS"
    if "TORCH_INDEX" in os.environ:
        return (TORCH_CUDA_MB if cuda else TORCH_CPU_MB), "from TORCH_INDEX"
    if cuda:
        return TORCH_CUDA_MB, "with CUDA; TORCH_INDEX=URL names an index with other builds"
    return TORCH_CPU_MB, "CPU build: there is no NVIDIA GPU"


def create_venv() -> None:
    say(f"Creating {VENV.name} with Python {platform.python_version()} …")
    if subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False).returncode != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        stop(
            "This Python cannot create virtual environments.",
            "On Debian and Ubuntu install the package python3-venv; or name another Python: make PYTHON=…",
        )


def has_torch() -> bool:
    """Whether the environment has the wanted torch, of any build."""
    question = "from importlib.metadata import version; print(version('torch').partition('+')[0])"
    answer = subprocess.run([str(VENV_PYTHON), "-c", question], capture_output=True, text=True, check=False)
    return f"torch=={answer.stdout.strip()}" == TORCH


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver is here and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def install_torch(cuda: bool) -> None:
    """Installs the build of torch that suits this machine."""
    index = os.environ.get("TORCH_INDEX", "" if cuda else CPU_INDEX)
    if index and torch_from_index(index, cuda):
        return
    say(f"Installing {TORCH} from the default index …")
    # fast-deps reads a wheel's metadata without downloading it, so that a refusal costs megabytes, not gigabytes.
    run = pip("install", "--quiet", "--use-feature=fast-deps", *constraints(cuda), TORCH, capture_errors=True)
    if run.returncode == 0:
        return
    if "conflicting dependencies" in run.stderr:
        stop(
            f"The default index has only a torch with CUDA for this machine: about {TORCH_CUDA_MB} MB, and no use here.",
            "Name an index with CPU builds: make TORCH_INDEX=URL …; or take it: make SPARKRELAY_ALLOW_CUDA=1 …",
        )
    stop(f"pip could not install {TORCH}: {last_line(run.stderr)}", "Check the network, then run make again.")


def torch_from_index(index: str, cuda: bool) -> bool:
    """Tries one index, quickly. What torch depends on comes later with the project's other packages."""
    wanted = TORCH if cuda else f"{TORCH}+cpu"
    say(f"Installing {wanted} from {index} …")
    options = ("--index-url", index, "--retries", "0", "--timeout", str(INDEX_TIMEOUT_S))
    run = pip("install", "--quiet", "--no-deps", *options, wanted, capture_errors=True)
    if run.returncode != 0:
        say(f"That index did not deliver it ({last_line(run.stderr)}).")
    return run.returncode == 0


def fetch_demo_model() -> None:
    """Pulls the demo model into the cache folder; quick and offline when it is there."""
    if subprocess.run(
        [str(VENV_PYTHON), "-m", "sparkrelay", "models", "pull", DEMO_MODEL], check=False
    ).returncode:
        stop("The demo model could not be fetched (see above).", "Check the network, then run make again.")


def pip(*arguments: str, capture_errors: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs the environment's pip in the checkout's root."""
    command = [str(VENV_PYTHON), "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"]
    errors = subprocess.PIPE if capture_errors else None
    return subprocess.run(command, cwd=ROOT, stderr=errors, text=True, check=False)


def last_line(text: str) -> str:
    """The last error that pip printed, which is the one that says why."""
    lines = [line for line in text.splitlines() if line.startswith("ERROR")] or text.splitlines()
    return lines[-1] if lines else "pip said nothing"


def say(text: str) -> None:
    print(text, flush=True)


def stop(message: str, next_step: str) -> NoReturn:
    print(f"error: {message}\n{next_step}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
