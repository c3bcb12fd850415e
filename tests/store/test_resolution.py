"""From a name to a folder, and what is said when there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from sparkrelay.store import (
    CATALOGUE,
    DownloadFailed,
    MissingPackage,
    NotPulled,
    StorePaths,
    UnknownModel,
    cache_folder,
    find,
    resolve,
)
from sparkrelay.store.catalogue import SMOLLM2_135M
from sparkrelay.store.manifest import describe, write_manifest

HUB_ID = "some-org/Some-Model_1.5"


@pytest.fixture
def paths(tmp_path: Path) -> StorePaths:
    return StorePaths(tmp_path / "cache")


def hub_answers(monkeypatch: pytest.MonkeyPatch, answer: Exception | Path) -> list[str]:
    """Stands in for the hub; the list gets every id that is asked for."""
    asked: list[str] = []

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.append(repo_id)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_pulled_catalogue_model_is_its_folder(paths: StorePaths) -> None:
    folder = paths.model("smollm2-135m")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_manifest(folder, describe(folder, SMOLLM2_135M))
    files = resolve("smollm2-135m", paths)
    assert (files.name, files.path) == ("smollm2-135m", folder)


def test_a_catalogue_model_that_was_not_pulled_says_how_to_pull_it(paths: StorePaths) -> None:
    with pytest.raises(NotPulled) as caught:
        resolve("smollm2-135m", paths)
    assert caught.value.next_step == "Run `sparkrelay models pull smollm2-135m` first."


def test_a_folder_with_a_config_is_itself(
    tmp_path: Path, paths: StorePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "org" / "my-model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    asked = hub_answers(monkeypatch, ValueError("not to be asked"))
    files = resolve("org/my-model", paths)
    assert (files.name, files.path, asked) == ("my-model", folder, [])


def test_a_folder_without_a_config_is_refused(tmp_path: Path, paths: StorePaths) -> None:
    with pytest.raises(UnknownModel, match=r"has no config\.json"):
        resolve(str(tmp_path), paths)


@pytest.mark.parametrize(
    "name", ["smollm", "", "/no/such/folder", "a/b/c", "../x", "-x/y", "https://x.org/m"]
)
def test_an_unknown_name_says_where_to_look(
    name: str, paths: StorePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    if name == "":
        # The empty path is the current folder, which exists and holds no model.
        monkeypatch.chdir(paths.cache.parent)
    with pytest.raises(UnknownModel) as caught:
        resolve(name, paths)
    if name:
        assert "sparkrelay models list" in caught.value.next_step
        assert "sparkrelay models pull" in caught.value.next_step


def test_a_hub_id_is_what_the_hub_puts_on_disk(
    tmp_path: Path, paths: StorePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub_answers(monkeypatch, tmp_path)
    files = resolve(HUB_ID, paths)
    assert (files.name, files.path, asked) == (HUB_ID, tmp_path, [HUB_ID])


@pytest.mark.parametrize(
    ("trouble", "error", "next_step"),
    [
        (LocalEntryNotFoundError("offline"), DownloadFailed, "Go online once"),
        (ConnectionError("no route"), DownloadFailed, "Go online once"),
        (RepositoryNotFoundError("404", response=MagicMock()), UnknownModel, "Check the spelling"),
        (GatedRepoError("403", response=MagicMock()), DownloadFailed, "Open its page"),
    ],
)
def test_what_the_hub_refuses_becomes_one_error_with_a_next_step(
    trouble: Exception,
    error: type[Exception],
    next_step: str,
    paths: StorePaths,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub_answers(monkeypatch, trouble)
    with pytest.raises(error, match=next_step):
        resolve(HUB_ID, paths)


def test_without_the_hubs_package_the_extra_is_named(
    paths: StorePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackage, match=r"pip install 'sparkrelay\[verifier\]'"):
        resolve(HUB_ID, paths)


def test_the_catalogue_lists_its_names_when_one_is_unknown() -> None:
    with pytest.raises(UnknownModel, match="smollm2-135m"):
        find("smollm3")
    assert all(find(name).name == name for name in CATALOGUE)


@pytest.mark.parametrize(
    ("environ", "platform", "expected"),
    [
        ({}, "linux", "/h/ann/.cache/sparkrelay"),
        ({"XDG_CACHE_HOME": "/xdg"}, "linux", "/xdg/sparkrelay"),
        ({"XDG_CACHE_HOME": "relative"}, "linux", "/h/ann/.cache/sparkrelay"),
        ({"XDG_CACHE_HOME": "/xdg"}, "darwin", "/h/ann/Library/Caches/sparkrelay"),
        ({"SPARKRELAY_CACHE": "/big/disk", "XDG_CACHE_HOME": "/xdg"}, "linux", "/big/disk"),
        ({"SPARKRELAY_CACHE": ""}, "linux", "/h/ann/.cache/sparkrelay"),
    ],
)
def test_the_cache_folder_follows_the_variable_then_the_platform(
    environ: dict[str, str], platform: str, expected: str
) -> None:
    assert cache_folder(environ, platform, Path("/h/ann")) == Path(expected)
