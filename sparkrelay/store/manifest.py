"""The list of what a pulled model consists of: sizes and sha256 of its files, and where they came from.

The manifest is written last into a folder that is renamed into place, so a folder with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from sparkrelay.store.catalogue import CatalogueEntry
from sparkrelay.store.errors import WrongChecksum

MANIFEST_FILE = "manifest.json"

# Raised when the converter writes different files from the same source: older folders are then converted again.
LAYOUT_VERSION = 1

_READ_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of the model: name inside the folder, size, hex sha256."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a model's folder holds. `source` is the wheel as pip spells it."""

    name: str
    source: str
    source_sha256: str
    license: str
    layout_version: int
    files: tuple[FileRecord, ...]

    def is_of(self, entry: CatalogueEntry) -> bool:
        """Whether this folder is what pulling the entry today would give."""
        return self.source_sha256 == entry.wheel_sha256 and self.layout_version == LAYOUT_VERSION

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def sha256_of(file: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def describe(folder: Path, entry: CatalogueEntry) -> Manifest:
    """The manifest of the files that lie in the folder now."""
    names = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST_FILE)
    files = tuple(
        FileRecord(name, (folder / name).stat().st_size, sha256_of(folder / name)) for name in names
    )
    return Manifest(entry.name, entry.source, entry.wheel_sha256, entry.license, LAYOUT_VERSION, files)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = {
        "name": manifest.name,
        "source": manifest.source,
        "source_sha256": manifest.source_sha256,
        "license": manifest.license,
        "layout_version": manifest.layout_version,
        "files": {
            file.name: {"size_bytes": file.size_bytes, "sha256": file.sha256} for file in manifest.files
        },
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None when there is none or it cannot be understood (then the model counts as absent)."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = tuple(
            FileRecord(name, int(file["size_bytes"]), str(file["sha256"]))
            for name, file in content["files"].items()
        )
        return Manifest(
            name=str(content["name"]),
            source=str(content["source"]),
            source_sha256=str(content["source_sha256"]),
            license=str(content["license"]),
            layout_version=int(content["layout_version"]),
            files=files,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_complete(folder: Path, entry: CatalogueEntry) -> bool:
    """Whether the folder holds the entry's model with every file at its full size. Cheap: hashes nothing."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest.is_of(entry):
        return False
    return all(_size_of(folder / file.name) == file.size_bytes for file in manifest.files)


def verify(folder: Path) -> Manifest:
    """Hashes every file of a pulled model. Raises WrongChecksum naming the first that is not as it was written."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise WrongChecksum(
            f"{folder} has no readable {MANIFEST_FILE}.", "Remove the folder and pull the model again."
        )
    for file in manifest.files:
        path = folder / file.name
        if _size_of(path) != file.size_bytes or sha256_of(path) != file.sha256:
            raise WrongChecksum(
                f"{path} is not the file that was pulled.",
                f"Run `sparkrelay models pull {manifest.name} --force`.",
            )
    return manifest


def _size_of(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
