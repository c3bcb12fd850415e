"""From what a user wrote (a catalogue name, a folder, a hub id) to the folder that holds the model."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from sparkrelay.store.catalogue import CATALOGUE
from sparkrelay.store.errors import DownloadFailed, MissingPackage, NotPulled, UnknownModel
from sparkrelay.store.manifest import is_complete
from sparkrelay.store.paths import StorePaths, cache_folder

# What serving reads: no second copy of the weights in another framework's format.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine.

    name  the catalogue name, the hub id, or the folder's own name
    path  folder with config.json, the weights and the tokenizer's files
    """

    name: str
    path: Path


def default_paths() -> StorePaths:
    """The store of the process's own environment and platform."""
    return StorePaths(cache_folder(os.environ, sys.platform, Path.home()))


def resolve(model: str, paths: StorePaths | None = None) -> ModelFiles:
    """The files of a model named as a catalogue name, a local folder or a hub id (`org/name`), in this order.

    A hub id is downloaded if the hub's own cache lacks it; nothing else is downloaded here. Raises StoreError with the
    next step when the model is not to be had.
    """
    store = paths if paths is not None else default_paths()
    if model in CATALOGUE:
        return _pulled(model, store)
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return ModelFiles(folder.absolute().name, folder.absolute())
    if folder.exists():
        raise UnknownModel(
            f"{folder} has no config.json.",
            "Name the folder that holds config.json, the weights and the tokenizer.",
        )
    if _HUB_ID.fullmatch(model):
        return ModelFiles(model, _from_hub(model))
    raise UnknownModel(
        f"{model!r} is no model of the catalogue, no folder and no hub id (org/name).",
        "See `sparkrelay models list`, or pull the demo model: `sparkrelay models pull smollm2-135m`.",
    )


def _pulled(name: str, store: StorePaths) -> ModelFiles:
    folder = store.model(name)
    if not is_complete(folder, CATALOGUE[name]):
        raise NotPulled(
            f"{name} is not on this machine (looked in {folder}).",
            f"Run `sparkrelay models pull {name}` first.",
        )
    return ModelFiles(name, folder)


def _from_hub(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError as missing:
        raise MissingPackage(
            f"Loading the hub id {hub_id!r} needs the package huggingface_hub.",
            "Install it: pip install 'sparkrelay[verifier]'",
        ) from missing
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_PATTERNS)))
    except GatedRepoError as error:
        raise DownloadFailed(
            f"The hub wants you to accept the terms of {hub_id} first.",
            "Open its page on the hub, then run `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise UnknownModel(
            f"The hub has no model {hub_id!r} that you may read.",
            "Check the spelling, or run `hf auth login`.",
        ) from error
    # Whatever else goes wrong down there (offline, proxy, disk, server) is one thing to the user: the hub did not deliver.
    except Exception as error:
        raise DownloadFailed(
            f"The hub did not deliver {hub_id}: {error}",
            "Go online once so that it is cached, or give the path of a folder that holds the model.",
        ) from error
