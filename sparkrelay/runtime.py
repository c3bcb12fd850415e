"""The runtime file: where the stack that runs on this machine is. `sparkrelay up` writes it, every command and client reads it.

{"gateway": "127.0.0.1:7070", "verifiers": [...], "drafters": [...], "pids": {"up": 1, "gateway": 2, ...}, "model": "..."}
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparkrelay.store.paths import cache_folder

FOLDER_VARIABLE = "SPARKRELAY_RUNTIME_DIR"
FILE_NAME = "runtime.json"


def runtime_folder(environ: Mapping[str, str], platform: str, home: Path) -> Path:
    """Where a stack leaves its file and logs: SPARKRELAY_RUNTIME_DIR, else XDG_RUNTIME_DIR, else the cache folder."""
    if chosen := environ.get(FOLDER_VARIABLE, ""):
        return Path(chosen).expanduser().absolute()
    if (xdg := environ.get("XDG_RUNTIME_DIR", "")).startswith("/"):
        return Path(xdg) / "sparkrelay"
    return cache_folder(environ, platform, home) / "run"


def default_folder() -> Path:
    """The runtime folder of this process's environment."""
    return runtime_folder(os.environ, sys.platform, Path.home())


def read_runtime(folder: Path | None = None) -> dict[str, Any] | None:
    """What runs here; None if nothing does. A file left behind by a process that is gone counts as nothing."""
    path = (folder or default_folder()) / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("gateway"), str):
        return None
    owner = content.get("pids", {}).get("up")
    return content if owner is None or is_alive(owner) else None


def write_runtime(content: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Writes the file whole or not at all, readable by this user only."""
    path = (folder or default_folder()) / FILE_NAME
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(path, content)
    return path


def remove_runtime(owner_pid: int, folder: Path | None = None) -> None:
    """Removes the file if it is still the one that this `up` wrote: a later one may have taken its place."""
    path = (folder or default_folder()) / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if content.get("pids", {}).get("up") == owner_pid:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically: readers see the old one, or the new one, never a part."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.chmod(0o600)
    unfinished.replace(path)


def is_alive(pid: int) -> bool:
    """True if a process of this id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
