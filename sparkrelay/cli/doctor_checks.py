"""What `sparkrelay doctor` makes of what it saw: facts in, findings out. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparkrelay.cli.requirements import Package

if TYPE_CHECKING:
    from sparkrelay.client.results import Model, Worker

OLDEST_PYTHON, FIRST_PYTHON_TOO_NEW = (3, 11), (3, 14)
COARSE_CLOCK_S = 0.001
MB = 1e6

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `next_step` is what to do, empty if there is nothing to do."""

    level: Level
    subject: str
    what: str
    next_step: str = ""


@dataclass(frozen=True, slots=True)
class Port:
    """A usual port of a service. holder: "" if it is free, else who has it; `ours`: a service of the running stack."""

    service: str
    number: int
    holder: str = ""
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Runtime:
    """The runtime file. state: absent, running, stale (its process is gone) or unreadable; ready: by service."""

    path: str
    state: Literal["absent", "running", "stale", "unreadable"]
    owner: int = 0
    model: str = ""
    ready: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelOnDisk:
    """The model that would be served, or is.

    problem      why it cannot be, with next_step; empty if it can
    checked      how its files were checked, in words
    tokenizer    sha256 of tokenizer.json, empty if it has none; tokenizer_problem: why it cannot be used
    weight_bytes, bytes_per_token  what it takes in memory: its weights, and the state of one token
    """

    name: str
    problem: str = ""
    next_step: str = ""
    checked: str = ""
    tokenizer: str = ""
    tokenizer_problem: str = ""
    has_chat_template: bool = False
    weight_bytes: int = 0
    bytes_per_token: int = 0


@dataclass(frozen=True, slots=True)
class Served:
    """What the gateway says. address empty: none is known; error: why it could not be asked."""

    address: str = ""
    error: str = ""
    models: tuple[Model, ...] = ()
    workers: tuple[Worker, ...] = ()


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds since 1970, the resolution of the monotonic clock in seconds, and when these files were written."""

    wall_s: float
    resolution_s: float
    written_s: float


def check_python(version: tuple[int, int, int], platform: str) -> Finding:
    text = f"{'.'.join(map(str, version))} on {platform}"
    if OLDEST_PYTHON <= version[:2] < FIRST_PYTHON_TOO_NEW:
        return Finding("ok", "python", text)
    return Finding("fail", "python", f"{text} is not supported", "Use Python 3.11, 3.12 or 3.13.")


def check_packages(packages: Sequence[Package]) -> list[Finding]:
    """One finding for the base and each extra. A missing extra is no failure: client commands need none."""
    if not packages:
        return [Finding("warn", "packages", "sparkrelay is not installed", "Run pip install -e . here.")]
    extras = dict.fromkeys(package.wanted.extra for package in packages)
    return [
        _check_extra(extra, [each for each in packages if each.wanted.extra == extra]) for extra in extras
    ]


def _check_extra(extra: str, packages: Sequence[Package]) -> Finding:
    subject = f"extra {extra}" if extra else "base"
    install = f"pip install --upgrade 'sparkrelay[{extra}]'" if extra else "pip install --upgrade sparkrelay"
    wrong = [
        f"{each.wanted.name} {each.version} ({each.wanted.limits})"
        for each in packages
        if each.version and not each.fits
    ]
    if wrong:
        return Finding("fail", subject, f"wrong version: {', '.join(wrong)}", f"Run {install}")
    missing = [each.wanted.name for each in packages if each.version is None]
    if missing:
        level: Level = "warn" if extra else "fail"
        return Finding(level, subject, f"not installed: {', '.join(missing)}", f"If you need it: {install}")
    return Finding("ok", subject, ", ".join(f"{each.wanted.name} {each.version}" for each in packages))


def check_ports(ports: Sequence[Port]) -> Finding:
    """Busy ports are no failure: `up` takes others."""
    taken = [
        f"{each.number} ({each.service}) by {each.holder}" for each in ports if each.holder and not each.ours
    ]
    if taken:
        return Finding(
            "warn",
            "ports",
            f"taken: {', '.join(taken)}",
            "Nothing to do: `sparkrelay up` takes free ones instead.",
        )
    ours = [str(each.number) for each in ports if each.holder and each.ours]
    free = [str(each.number) for each in ports if not each.holder]
    parts = [f"free: {', '.join(free)}"] if free else []
    parts += [f"held by the running stack: {', '.join(ours)}"] if ours else []
    return Finding("ok", "ports", "; ".join(parts))


def check_runtime(runtime: Runtime) -> list[Finding]:
    """The runtime file, and the health of each service it names."""
    match runtime.state:
        case "absent":
            return [Finding("warn", "stack", "none runs on this machine", "Start one: sparkrelay up")]
        case "unreadable":
            return [
                Finding("fail", "stack", f"{runtime.path} cannot be read", f"Remove it: rm {runtime.path}")
            ]
        case "stale":
            what = f"none runs; {runtime.path} was left by process {runtime.owner}, which is gone"
            return [Finding("warn", "stack", what, "Nothing to do: the next `sparkrelay up` replaces it.")]
    late = [name for name, ready in runtime.ready if not ready]
    if late:
        what = f"process {runtime.owner} runs, but not ready: {', '.join(late)}"
        return [
            Finding("fail", "stack", what, "Look at the logs beside the runtime file, or start it again.")
        ]
    names = ", ".join(name for name, _ in runtime.ready)
    return [Finding("ok", "stack", f"model {runtime.model}, process {runtime.owner}; ready: {names}")]


def check_model(model: ModelOnDisk, *, wanted: bool) -> list[Finding]:
    """wanted: it was asked for by name, or is being served; the default model may be missing."""
    if model.problem:
        return [Finding("fail" if wanted else "warn", "model", model.problem, model.next_step)]
    findings = [Finding("ok", "model", f"{model.name}: {model.checked}")]
    if model.tokenizer_problem:
        step = "Text needs a tokenizer.json in the model's folder; without one only --token-ids works."
        findings.append(Finding("warn", "tokenizer", model.tokenizer_problem, step))
    elif model.tokenizer:
        template = "with" if model.has_chat_template else "without"
        findings.append(
            Finding("ok", "tokenizer", f"sha256 {model.tokenizer[:12]}..., {template} a chat template")
        )
    return findings


def check_memory(free: int, model: ModelOnDisk, process_bytes: int, *, is_served: bool) -> Finding:
    """free: bytes that can be taken; process_bytes: what the services take beside the weights."""
    text = f"{free / MB:.0f} MB free"
    if not model.weight_bytes or is_served:
        return Finding("ok", "memory", text + (", with the model loaded" if is_served else ""))
    need = model.weight_bytes + process_bytes
    text += f"; {model.name} takes about {need / MB:.0f} MB ({model.weight_bytes / MB:.0f} MB of weights)"
    if need > free:
        return Finding("fail", "memory", text, "Free some memory, or take a smaller model.")
    if model.bytes_per_token:
        text += f", the rest holds {(free - need) // model.bytes_per_token} tokens of sessions"
    return Finding("ok", "memory", text)


def check_served(served: Served) -> list[Finding]:
    """The gateway, its models and its workers."""
    if not served.address:
        return []
    if served.error:
        return [Finding("fail", "gateway", served.error)]
    names = ", ".join(each.name for each in served.models)
    findings = [Finding("ok", "gateway", f"{served.address} answers; models: {names}")]
    if not served.models:
        findings = [
            Finding("fail", "gateway", f"{served.address} serves no model", "See `sparkrelay workers list`.")
        ]
    for worker in served.workers:
        findings += check_worker(worker)
    return findings


def check_worker(worker: Worker) -> Iterable[Finding]:
    """One verifier: its state, whether it is exact, and its drafters."""
    from sparkrelay.cli.workers import why_plain

    at = worker.address
    if worker.state == "draining":
        yield Finding(
            "warn", "verifier", f"{at} is draining: takes no new sessions", "Restart it to use it again."
        )
    elif worker.state != "ready":
        what = f"{at} is {worker.state}: {worker.message or 'no word of it yet'}"
        yield Finding("fail", "verifier", what, "Start it, or look at its log.")
        return
    if worker.exact:
        yield Finding("ok", "verifier", f"{at} is exact: the output is bit for bit the plain one")
    else:
        what = f"{at} is not exact: {worker.exact_reason or 'it does not say why'}"
        yield Finding("warn", "verifier", what, "Near ties may come out otherwise than in plain decoding.")
    for drafter in worker.drafters:
        if drafter.state == "connected":
            yield Finding("ok", drafter.drafter_id, f"{drafter.proposal_kind}, fits {at}")
        elif drafter.state == "refused":
            what = f"refused by {at}: {drafter.message}"
            yield Finding("fail", drafter.drafter_id, what, "Start it with what the verifier asks for.")
    reason = why_plain(worker)
    if reason:
        yield Finding(
            "warn", "verifier", f"{at} decodes plainly: {reason}", "Answers stay right, only slower."
        )


def check_tokenizers_agree(model: ModelOnDisk, workers: Sequence[Worker]) -> list[Finding]:
    """Whether the verifiers of this model read the tokenizer that lies on this disk."""
    others = [
        worker.address
        for worker in workers
        if worker.model == model.name and worker.tokenizer_hash and worker.tokenizer_hash != model.tokenizer
    ]
    if not others or not model.tokenizer:
        return []
    what = f"another one than this machine's is served by {', '.join(others)}"
    return [Finding("warn", "tokenizer", what, "Pull the model again where it is older.")]


def check_clock(clock: Clock) -> Finding:
    """A clock before the day these files were written breaks certificates and ages; a coarse one breaks timings."""
    if clock.wall_s < clock.written_s - 86_400:
        return Finding(
            "fail", "clock", "stands before the day this program was installed", "Set it, or start NTP."
        )
    if clock.resolution_s > COARSE_CLOCK_S:
        return Finding(
            "warn",
            "clock",
            f"the monotonic clock ticks every {clock.resolution_s * 1000:.0f} ms",
            "Timings are coarse.",
        )
    return Finding("ok", "clock", f"set; monotonic ticks of {clock.resolution_s * 1e9:.0f} ns")


def check_cores(cores: int, threads: str) -> Finding:
    """cores: to compute with; threads: how the services would share them, in words."""
    if cores >= 2:
        return Finding("ok", "cores", f"threads: {threads}")
    step = (
        "Verifier and drafter share one core: plain decoding (`sparkrelay up --drafter none`) may be faster."
    )
    return Finding("warn", "cores", f"threads: {threads}", step)
