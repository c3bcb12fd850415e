"""The walls of the house: who may import whom, what the base install needs, and how large a room may be."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sparkrelay", "drafter_service", "verifier_service", "gateway")
PYTHON_FOLDERS = (*PACKAGES, "tests", "tools", "benchmarks", "examples")
GENERATED = ROOT / "sparkrelay" / "v1"
LARGEST_FILE_LINES = 400
LARGEST_TEST_FILE_LINES = 500
TEXT_SUFFIXES = {
    ".cfg",
    ".html",
    ".ini",
    ".json",
    ".md",
    ".proto",
    ".py",
    ".pyi",
    ".sh",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
}

# Homes of a real machine, as they slip into a file; the people of examples may have one. Assembled, so that it is not in here.
MACHINE_PATH = re.compile(
    r"(?<![\w.~}/-])(?:"
    + "|".join(rf"/{top}/(?!ann\b|someone\b|you\b)[\w.-]+" for top in ("home", "root", "Users", "work"))
    + ")"
)


def python_files() -> Iterator[Path]:
    """Every hand-written Python file of the project."""
    for folder in PYTHON_FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if GENERATED not in file.parents:
                yield file


def project_files() -> list[Path]:
    """What git tracks or would track; without git or a repository, every file outside hidden and cache folders."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    if shutil.which("git") is not None:
        run = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode == 0:
            return [ROOT / name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]
    found = (file for file in ROOT.rglob("*") if file.is_file())
    return [f for f in found if not any(p.startswith((".", "__")) for p in f.relative_to(ROOT).parts[:-1])]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    command = [str(program), "--no-cache", "--config", str(folder / "pyproject.toml")]
    return subprocess.run(
        command,
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_directions_of_imports_hold() -> None:
    run = lint_imports(ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("room", "planted", "contract"),
    [
        ("gateway", "import drafter_service", "Services meet only on the wire"),
        ("sparkrelay", "import gateway", "sparkrelay imports no service"),
        ("sparkrelay/store", "import sparkrelay.cli", "Nothing imports the commands"),
        ("verifier_service", "import grpc", "grpc and the stubs appear only"),
        ("verifier_service", "from sparkrelay.v1 import tensor_pb2", "grpc and the stubs appear only"),
        ("gateway", "import torch", "free of torch"),
        ("gateway", "import sparkrelay.device", "Only the two GPU services"),
    ],
)
def test_a_forbidden_import_is_caught(tmp_path: Path, room: str, planted: str, contract: str) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / room / "planted.py").write_text(f'"""Planted."""\n\n{planted}\n')
    run = lint_imports(tmp_path)
    assert run.returncode != 0
    broken = [line for line in run.stdout.splitlines() if " BROKEN" in line]
    assert any(contract in line for line in broken), run.stdout


def test_the_base_install_needs_no_torch_numpy_or_transformers() -> None:
    heavy = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "gguf", "jinja2")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy!r}))\n"  # None there makes an import of it fail
        "import sparkrelay, sparkrelay.client, sparkrelay.store\n"
        "from sparkrelay.cli import build_app\n"
        "build_app()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr


def test_every_folder_of_modules_is_a_package() -> None:
    # Without __init__.py the import rules do not see a folder and the wheel does not get it.
    folders = {file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_no_file_is_larger_than_a_room() -> None:
    sizes = {file: len(file.read_text().splitlines()) for file in python_files()}
    assert len(sizes) > 20
    assert not {str(file): size for file, size in sizes.items() if size > largest_size(file)}


def largest_size(file: Path) -> int:
    return LARGEST_TEST_FILE_LINES if ROOT / "tests" in file.parents else LARGEST_FILE_LINES


def test_the_tree_in_the_readme_is_that_of_the_files() -> None:
    command = [sys.executable, str(ROOT / "tools" / "readme_tree.py"), "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr


def test_every_module_says_what_it_is() -> None:
    silent = [str(file) for file in python_files() if not ast.get_docstring(ast.parse(file.read_text()))]
    assert not [name for name in silent if not (name.endswith("__init__.py") and "/tests/" in name)]


def test_nothing_waits_with_wait_for() -> None:
    # Python 3.11's wait_for returns as if nothing had been if it is cancelled just as its awaitable ends: asyncio.timeout.
    waiting = re.compile(r"\bwait_for\(")
    served = (file for file in python_files() if ROOT / "tests" not in file.parents)
    assert not [str(file) for file in served if waiting.search(file.read_text())]


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    texts = [file for file in project_files() if file.suffix in TEXT_SUFFIXES or file.name == "Makefile"]
    assert len(texts) > 20
    hits = {
        f"{file.relative_to(ROOT)}: {hit.group()}"
        for file in texts
        for hit in MACHINE_PATH.finditer(file.read_text(encoding="utf-8"))
    }
    assert not hits


def test_a_path_of_somebodys_machine_would_be_seen() -> None:
    assert MACHINE_PATH.search('open("' + "/ho" + 'me/smith7/notes")')
    assert not MACHINE_PATH.search("see docs/home/start.md or https://example.org/home/x")
