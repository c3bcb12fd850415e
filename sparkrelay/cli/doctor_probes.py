"""What `sparkrelay doctor` looks at: thin questions to the machine, each answered by facts for `doctor_checks`."""

from __future__ import annotations

import json
import platform
import socket
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from sparkrelay.cli.doctor_checks import Clock, ModelOnDisk, Port, Runtime, Served
from sparkrelay.cli.requirements import Package, Requirement, parse
from sparkrelay.cli.stack_plan import DRAFTER_PORT, GATEWAY_PORT, HEALTH_OFFSET, LOOPBACK, VERIFIER_PORT

TOY = "toy"
CHECKOUT = Path(__file__).parents[2]
QUESTION_TIMEOUT_S = 5.0
NOT_FOR_USERS = ("dev",)
USUAL_PORTS = tuple(
    (service, port + offset)
    for service, port in (("gateway", GATEWAY_PORT), ("verifier", VERIFIER_PORT), ("drafter", DRAFTER_PORT))
    for offset in (0, HEALTH_OFFSET)
)


def python_version() -> tuple[int, int, int]:
    return sys.version_info.major, sys.version_info.minor, sys.version_info.micro


def platform_name() -> str:
    return f"{platform.system()} {platform.machine()}"


def packages() -> list[Package]:
    """Everything that this distribution wants; of a checkout that was never installed, what its pyproject.toml says."""
    try:
        wanted = parse(metadata.requires("sparkrelay") or [])
    except metadata.PackageNotFoundError:
        wanted = of_project(CHECKOUT / "pyproject.toml")
    return [
        Package(each, _version_of(each))
        for each in wanted
        if each.extra not in NOT_FOR_USERS and each.name != "sparkrelay"
    ]


def of_project(file: Path) -> list[Requirement]:
    """The requirements of a pyproject.toml; none if there is no such file."""
    try:
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return []
    base = parse(project.get("dependencies", ()))
    extras = project.get("optional-dependencies", {})
    return base + [replace(each, extra=extra) for extra, lines in extras.items() for each in parse(lines)]


def _version_of(requirement: Requirement) -> str | None:
    try:
        return metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return None


def ports(runtime: dict[str, Any] | None) -> list[Port]:
    """The usual ports and who holds them."""
    addresses = {} if runtime is None else runtime.get("health", {})
    ours = {address.rpartition(":")[2] for address in addresses.values()}
    if runtime is not None:
        listed = [runtime["gateway"], *runtime.get("verifiers", ()), *runtime.get("drafters", ())]
        ours |= {address.rpartition(":")[2] for address in listed}
    return [
        Port(service, number, "" if is_free(number) else holder_of(number), str(number) in ours)
        for service, number in USUAL_PORTS
    ]


def is_free(number: int) -> bool:
    """Whether a service could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, number))
        except OSError:
            return False
    return True


def holder_of(number: int, proc: Path = Path("/proc")) -> str:
    """Which process listens there: "python (process 12)". Others' processes and other systems do not tell."""
    sockets = {f"socket:[{inode}]" for inode in _listening(number, proc)}
    for folder in proc.glob("[0-9]*/fd"):
        try:
            if any(str(link.readlink()) in sockets for link in folder.iterdir()):
                name = (folder.parent / "comm").read_text().strip()
                return f"{name} (process {folder.parent.name})"
        except OSError:  # ended meanwhile, or not ours to look at
            continue
    return "another process"


def _listening(number: int, proc: Path) -> Iterator[str]:
    """Inodes of the sockets that listen on a port: state 0A in the kernel's table."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if len(fields) > 9 and fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == number:
                yield fields[9]


def runtime_file(path: Path) -> tuple[Runtime, dict[str, Any] | None]:
    """The runtime file's state, and its content if its stack runs."""
    from sparkrelay.cli.stack import health_of
    from sparkrelay.runtime import read_runtime

    content = read_runtime(path.parent)
    if content is not None:
        ready = tuple(
            (name, health_of(at, "readiness") is True) for name, at in content.get("health", {}).items()
        )
        owner, model = content.get("pids", {}).get("up", 0), str(content.get("model", ""))
        return Runtime(str(path), "running", owner, model, ready), content
    if not path.exists():
        return Runtime(str(path), "absent"), None
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))["pids"]["up"]
    except (OSError, ValueError, KeyError, TypeError):
        return Runtime(str(path), "unreadable"), None
    return Runtime(str(path), "stale", owner), None


def model_on_disk(name: str) -> ModelOnDisk:
    """A model by its catalogue name or folder, every file of a pulled one hashed.

    A hub id is not looked up: that could download it.
    """
    from sparkrelay import store
    from sparkrelay.store.manifest import MANIFEST_FILE

    if name.partition(":")[0] == TOY:
        return ModelOnDisk(name, checked="built in, token ids only")
    if name not in store.CATALOGUE and not Path(name).expanduser().exists():
        return ModelOnDisk(name, checked="neither pulled nor a folder: a hub id is not looked at here")
    try:
        folder = store.resolve(name).path
        manifest = store.verify(folder) if (folder / MANIFEST_FILE).is_file() else None
    except store.StoreError as error:
        return ModelOnDisk(name, problem=error.message, next_step=error.next_step)
    checked = (
        f"{len(manifest.files)} files, sha256 as pulled" if manifest else f"in {folder}, no list of hashes"
    )
    digest, problem = _tokenizer(folder)
    return ModelOnDisk(
        name,
        checked=checked,
        tokenizer=digest,
        tokenizer_problem=problem,
        has_chat_template=has_chat_template(folder),
        weight_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        bytes_per_token=state_bytes_per_token(_json(folder / "config.json")),
    )


def _tokenizer(folder: Path) -> tuple[str, str]:
    """sha256 of tokenizer.json, and why it cannot be used; one of them is empty."""
    from sparkrelay.store.manifest import sha256_of

    file = folder / "tokenizer.json"
    if not file.is_file():
        return "", f"{folder} has no tokenizer.json"
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return sha256_of(file), ""
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  the library raises bare Exception for any damage
        return "", f"{file} cannot be loaded: {error}"
    return sha256_of(file), ""


def has_chat_template(folder: Path) -> bool:
    """Whether the model can be asked by messages."""
    return (
        bool(_json(folder / "tokenizer_config.json").get("chat_template"))
        or (folder / "chat_template.jinja").is_file()
    )


def state_bytes_per_token(config: dict[str, Any]) -> int:
    """Keys and values of one token, of the common kind of model, in bfloat16; 0 if the configuration does not tell."""
    config = config.get("text_config", config)
    heads = config.get("num_attention_heads", 0)
    key_heads = config.get("num_key_value_heads") or heads
    width = config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else 0)
    return int(2 * 2 * config.get("num_hidden_layers", 0) * key_heads * width)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def served(address: str) -> Served:
    """What the gateway says of itself. address: empty for the one that is known here, if any is."""
    from sparkrelay.cli.output import explain
    from sparkrelay.client.blocking import connect
    from sparkrelay.client.errors import SparkRelayError

    try:
        client = connect(address or None, timeout=QUESTION_TIMEOUT_S)
    except SparkRelayError:
        return Served()  # none is known; the stack's finding says so
    with client:
        try:
            return Served(client.address, models=tuple(client.list_models()), workers=tuple(client.workers()))
        except SparkRelayError as error:
            return Served(client.address, error=explain(error).removeprefix("error: "))


def clock() -> Clock:
    written = Path(__file__).stat().st_mtime
    return Clock(time.time(), time.get_clock_info("monotonic").resolution, written)
