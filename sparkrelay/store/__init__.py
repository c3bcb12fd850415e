"""The model store: models that need no hub, pulled once into a cache folder, and one way to find any model.

Free of torch; numpy and gguf are imported only while a model is converted.
"""

from sparkrelay.store.catalogue import CATALOGUE, CatalogueEntry, find
from sparkrelay.store.errors import (
    DownloadFailed,
    MissingPackage,
    NotPulled,
    StoreError,
    UnknownModel,
    UnsupportedFile,
    WrongChecksum,
)
from sparkrelay.store.manifest import Manifest, is_complete, read_manifest, verify
from sparkrelay.store.paths import StorePaths, cache_folder
from sparkrelay.store.pull import Progress, pull_model, remove_model
from sparkrelay.store.resolution import ModelFiles, default_paths, resolve

__all__ = [
    "CATALOGUE",
    "CatalogueEntry",
    "DownloadFailed",
    "Manifest",
    "MissingPackage",
    "ModelFiles",
    "NotPulled",
    "Progress",
    "StoreError",
    "StorePaths",
    "UnknownModel",
    "UnsupportedFile",
    "WrongChecksum",
    "cache_folder",
    "default_paths",
    "find",
    "is_complete",
    "pull_model",
    "read_manifest",
    "remove_model",
    "resolve",
    "verify",
]
