"""What `sparkrelay up` starts: a pure plan of processes from options, free ports and the number of cores."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sparkrelay.host.cores import plan_threads

GATEWAY_PORT = 7070
VERIFIER_PORT = 7071
DRAFTER_PORT = 7072
HEALTH_OFFSET = 100
LOOPBACK = "127.0.0.1"
ROW_KINDS = frozenset(
    {"dspark", "dflash", "mtp"}
)  # what they read is made by the verifier, with the draft's projector
QUICK_REDIAL = (
    "--backoff-max-ms",
    "300",
)  # all start together, and nobody should wait long for the verifier's model

# Which port a process gets: called with the usual one, returns it or another.
PickPort = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What kind of stack is wanted.

    drafter        kind of draft model, or "none" for plain decoding
    drafter_model  for the kind causal_lm, "" is the target itself; for the kinds that read context rows, the draft's folder
    drain_ms       how long running turns may go on when the stack is told to end
    flags          further flags of one service, by its name without number: {"verifier": ("--exact",)}
    """

    model: str = "smollm2-135m"
    drafter: str = "ngram"
    drafter_count: int = 1
    drafter_model: str = ""
    dtype: str = "bfloat16"
    depth_policy: str = "auto"
    log_level: str = "info"
    drain_ms: int = 2000
    flags: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One service to start: `python -m <module> <arguments>`, and where it will be."""

    name: str
    module: str
    arguments: tuple[str, ...]
    listen: str
    health_listen: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StackPlan:
    """One verifier, its drafters, one gateway. The order is the order of starting."""

    verifier: ProcessPlan
    drafters: tuple[ProcessPlan, ...]
    gateway: ProcessPlan
    model: str

    @property
    def processes(self) -> tuple[ProcessPlan, ...]:
        return (self.verifier, *self.drafters, self.gateway)


def plan_stack(
    options: StackOptions, cores: int, pick_port: PickPort, *, drafters_dial: str = ""
) -> StackPlan:
    """Every address is fixed here, so that a process that is started again is found where it was.

    cores          to compute with: `sparkrelay.host.cores.Cores.compute_count`
    drafters_dial  where drafters find the verifier, if not at its own address (a proxy that counts or delays)
    """
    pick_port = _each_once(pick_port)
    target = ("--model", options.model, "--dtype", options.dtype, "--depth-policy", options.depth_policy)
    threads = plan_threads(cores, options.drafter_count)
    context = ("--context", options.drafter_model) if options.drafter in ROW_KINDS else ()
    flags = (*target, *context, "--threads", str(threads.verifier))
    verifier = _process(
        options, "verifier", VERIFIER_PORT, pick_port, flags, "verifier_service", threads.environment
    )
    count = 0 if options.drafter == "none" else options.drafter_count
    dialled = drafters_dial or verifier.listen
    drafters = tuple(
        plan_drafter(options, number, dialled, cores, pick_port) for number in range(1, count + 1)
    )
    dialling = ["--verifiers", verifier.listen, *QUICK_REDIAL]
    if options.model.partition(":")[0] != "toy":
        dialling += ["--tokenizer", options.model]  # of a folder, a verifier tells only the name
    gateway = _process(options, "gateway", GATEWAY_PORT, pick_port, dialling, "gateway")
    return StackPlan(verifier, drafters, gateway, options.model)


def free_port(usual: int) -> int:
    """The usual port if nobody has it, else any free one."""
    for port in (usual, 0):
        with socket.socket() as probe:
            # As the services themselves bind: a port in its closing phase counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")


def any_free_port(_usual: int) -> int:
    """A free port, never the usual one: for tests and benchmarks beside a running stack."""
    return free_port(0)


def _each_once(pick_port: PickPort) -> PickPort:
    """Nobody listens on a picked port yet, so the same one could be picked again."""
    picked: set[int] = set()

    def pick(usual: int) -> int:
        port = pick_port(usual)
        while port in picked:
            port = free_port(0)
        picked.add(port)
        return port

    return pick


def plan_drafter(
    options: StackOptions, number: int, verifier: str, cores: int, pick_port: PickPort
) -> ProcessPlan:
    name = f"drafter-{number}"
    arguments = ["--kind", options.drafter, "--drafter-id", name, "--verifiers", verifier, *QUICK_REDIAL]
    threads = plan_threads(cores, options.drafter_count)
    arguments += ["--threads", str(threads.drafter)]
    if options.drafter == "causal_lm":
        arguments += ["--model", options.drafter_model or options.model]
    if options.drafter in ROW_KINDS:
        arguments += ["--model", options.drafter_model, "--target", options.model]
    port = DRAFTER_PORT + number - 1
    return _process(options, name, port, pick_port, arguments, "drafter_service", threads.environment)


def _process(
    options: StackOptions,
    name: str,
    usual_port: int,
    pick_port: PickPort,
    arguments: Sequence[str],
    module: str,
    environment: dict[str, str] | None = None,
) -> ProcessPlan:
    listen = f"{LOOPBACK}:{pick_port(usual_port)}"
    health_listen = f"{LOOPBACK}:{pick_port(usual_port + HEALTH_OFFSET)}"
    common = ["--listen", listen, "--health-listen", health_listen, "--exit-with-stdin"]
    common += ["--drain-ms", str(options.drain_ms)]
    common += ["--log-level", options.log_level, "--log-format", "console"]
    further = options.flags.get(name.partition("-")[0], ())
    return ProcessPlan(
        name, module, (*common, *arguments, *further), listen, health_listen, environment or {}
    )
