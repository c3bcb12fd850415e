"""The snippets of README.md and docs/sdk.md, run as they stand against the demo model; and the SDK from a wheel of its own."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparkrelay.cli.stack import Stack
from tests.certificates import make_certificates
from tests.system.conftest import ROOT

pytestmark = pytest.mark.system

PAGES = ("README.md", "docs/sdk.md")
MAX_BASE_MIB = 120
USE_THE_WHEEL = """
import sys, sparkrelay
with sparkrelay.connect() as client:
    answer = client.generate(token_ids=[7, 3, 9, 7, 3], max_tokens=8, ignore_default_stop_ids=True)
assert len(answer.token_ids) == 8 and "site-packages" in sparkrelay.__file__
heavy = {"numpy", "torch", "tokenizers", "transformers", "jinja2"} & set(sys.modules)
assert not heavy, heavy
print("used", len(sys.modules))
"""


def snippets() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 2
            yield f"{page}:{line}", match.group(1)


SNIPPETS = list(snippets())


def test_there_are_snippets_of_both_clients_in_both_pages() -> None:
    assert {name.partition(":")[0] for name, _ in SNIPPETS} == set(PAGES)
    asyncio_count = sum("asyncio.run" in code for _, code in SNIPPETS)
    assert asyncio_count >= 4 and len(SNIPPETS) - asyncio_count >= 6


@pytest.mark.parametrize(("name", "code"), SNIPPETS, ids=[name for name, _ in SNIPPETS])
def test_the_snippet_runs(
    name: str, code: str, demo_stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARKRELAY_GATEWAY", demo_stack.gateway)
    monkeypatch.chdir(tmp_path)
    if "ca.pem" in code:
        make_certificates(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
    assert said.getvalue() or "print" not in code


@pytest.mark.timeout(600)  # the index may be slow
@pytest.mark.skipif(
    not {"SPARKRELAY_FULL", "SPARKRELAY_REQUIRE_ALL"} & set(os.environ),
    reason="asks the package index for the base dependencies: SPARKRELAY_FULL=1",
)
def test_a_wheel_with_the_base_extra_in_a_clean_environment_is_a_small_sdk(
    toy_stack: Stack, tmp_path: Path
) -> None:
    copy = tmp_path / "checkout"
    for name in ("sparkrelay", "gateway", "verifier_service", "drafter_service"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)]
    run([sys.executable, "-m", "pip", *build])
    (wheel,) = tmp_path.glob("sparkrelay-*.whl")
    venv.create(tmp_path / "clean", with_pip=True)
    python = str(tmp_path / "clean" / "bin" / "python")
    (packages,) = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    before = size_mib(packages)
    run([python, "-m", "pip", "install", "--no-compile", "--disable-pip-version-check", str(wheel)])
    added_mib = size_mib(packages) - before
    print(f"the base install is {added_mib:.0f} MiB")
    assert added_mib < MAX_BASE_MIB
    assert (packages / "sparkrelay" / "py.typed").is_file()
    used = run([python, "-c", USE_THE_WHEEL], SPARKRELAY_GATEWAY=toy_stack.gateway)
    assert used.startswith("used")


def run(command: list[str], **variables: str) -> str:
    """What a command says; its failure is shown whole."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": "", **variables},
        cwd="/",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def size_mib(folder: Path) -> float:
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()) / 2**20
