"""`sparkrelay up`: the whole stack on this machine, watched until Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from sparkrelay.cli.options import examples, paragraphs

if TYPE_CHECKING:
    from sparkrelay.cli.stack import Died, Restarted, Stack
    from sparkrelay.cli.stack_plan import StackPlan

HELP = """Start the three services on this machine and watch them until Ctrl-C.

They listen on 127.0.0.1 only: gateway 7070, verifier 7071, drafters from 7072, or free ports where these are busy. Every
other command finds them by the runtime file that this one writes.
"""
EXAMPLES = examples(
    "sparkrelay up",
    "sparkrelay up --model ./my-model --drafter none",
    "sparkrelay up --drafters 2 --depth-policy fixed:4",
)
TOY = "toy"
WATCH_INTERVAL_S = 0.2


def register(app: typer.Typer) -> None:
    app.command("up", help=paragraphs(HELP), epilog=EXAMPLES, rich_help_panel="Run")(up)


def up(
    model: Annotated[
        str, typer.Option(help="The target: a name of `sparkrelay models list`, a folder, a hub id, or toy.")
    ] = "smollm2-135m",
    drafter: Annotated[
        str,
        typer.Option(
            help="Kind of draft model: ngram, causal_lm, dspark, dflash, mtp, or none for plain decoding."
        ),
    ] = "ngram",
    drafters: Annotated[int, typer.Option(min=1, max=16, help="How many drafters to start.")] = 1,
    drafter_model: Annotated[
        str,
        typer.Option(
            help="A causal_lm's model; left out: the target's. The folder of a dspark, dflash or mtp draft."
        ),
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="Type of the target's weights: bfloat16 or float32.")
    ] = "bfloat16",
    depth_policy: Annotated[
        str, typer.Option(help="How many draft tokens to check in a round: off, fixed:K, auto.")
    ] = "auto",
    state_memory_mib: Annotated[
        int,
        typer.Option(min=0, help="Memory for the sessions' state, in MiB; 0: what is free, less a margin."),
    ] = 0,
    restart: Annotated[bool, typer.Option(help="Start a service again when it ends by itself.")] = True,
    log_level: Annotated[
        str, typer.Option(help="Of the services' logs: debug, info, warning, error.")
    ] = "info",
) -> None:
    # Imported here: grpc takes a while, and `--help` should not.
    from sparkrelay.cli.stack import StackError
    from sparkrelay.cli.stack_plan import StackOptions, free_port, plan_stack

    require_model(model)
    require_draft(drafter, drafter_model)
    options = StackOptions(
        model=model,
        drafter=drafter,
        drafter_count=drafters,
        drafter_model=drafter_model,
        dtype=dtype,
        depth_policy=depth_policy,
        log_level=log_level,
        flags={"verifier": ("--state-memory-mib", str(state_memory_mib))},
    )
    refuse_a_second_stack()
    plan = plan_stack(options, core_count(), free_port)
    try:
        run(plan, restart)
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def require_model(model: str) -> None:
    """Says now what a child would only say in its log. Raises StoreError with the next step."""
    from sparkrelay import store

    if model.partition(":")[0] != TOY:
        store.resolve(model)


def require_draft(drafter: str, drafter_model: str) -> None:
    """A draft that is trained for one target must be named. Exits with the next step; raises as `require_model`."""
    from sparkrelay.cli.stack_plan import ROW_KINDS

    if drafter not in ROW_KINDS:
        return
    if not drafter_model:
        print(
            f"error: --drafter {drafter} needs --drafter-model: the folder of a draft trained for the target\n"
            "(`sparkrelay train` makes one).",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    require_model(drafter_model)


def refuse_a_second_stack() -> None:
    """Two stacks under one runtime file would hide each other."""
    from sparkrelay.runtime import read_runtime

    running = read_runtime()
    if running is not None:
        print(
            f"error: a stack of yours runs already: gateway {running['gateway']}, process {running['pids']['up']}.\n"
            "Use it, end it first, or set SPARKRELAY_RUNTIME_DIR to another folder for a second one.",
            file=sys.stderr,
        )
        raise typer.Exit(1)


def core_count() -> int:
    """Cores to compute with."""
    from sparkrelay.host.cores import read_cores

    return read_cores().compute_count


def run(plan: StackPlan, restart: bool) -> None:
    """Starts the plan, writes the runtime file, watches, and leaves nothing behind."""
    from sparkrelay.cli.stack import Stack, state_line, threads_line
    from sparkrelay.runtime import default_folder, remove_runtime, write_runtime

    folder = default_folder()
    with told_to_end() as ended:
        stack = Stack(plan, folder / "logs", restart=restart)
        say(f"Starting {len(plan.processes)} services, model {plan.model}. Logs: {folder / 'logs'}")
        say(f"  {threads_line(len(plan.drafters))}")
        try:
            with stack:
                stack.wait_until_ready(say, give_up=ended.is_set)
                if not ended.is_set():
                    write_runtime(runtime_content(stack), folder)
                    say(f"  {state_line(stack.verifier)}")
                    say(where_and_what_next(plan, folder))
                watch(stack, folder, ended)
                say("\nEnding (Ctrl-C again: at once) ...")
                ended.on_repeat = stack.hurry
                killed = stack.stop()
        finally:
            remove_runtime(os.getpid(), folder)
    say(
        f"Ended; had to be killed: {', '.join(killed)}"
        if killed
        else "Ended. No process and no port is left."
    )


class Ended(threading.Event):
    """Set by the first SIGINT, SIGTERM or SIGHUP; every later one calls `on_repeat`."""

    def __init__(self) -> None:
        super().__init__()
        self.on_repeat: Callable[[], object] = lambda: None

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.is_set():
            self.on_repeat()
        self.set()


@contextmanager
def told_to_end() -> Iterator[Ended]:
    """An event for the signals that end this process, while the context lasts."""
    ended = Ended()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, ended.handle) for number in numbers}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(stack: Stack, folder: Path, ended: Ended) -> None:
    """Until told to end: says which service ended and how, and which came back."""
    from sparkrelay.cli.stack import Restarted
    from sparkrelay.runtime import write_runtime

    while not ended.wait(WATCH_INTERVAL_S):
        for event in stack.poll():
            say(in_words(event))
            if isinstance(event, Restarted):
                write_runtime(runtime_content(stack), folder)


def in_words(event: Died | Restarted) -> str:
    from sparkrelay.cli.stack import Restarted

    if isinstance(event, Restarted):
        return f"{event.name} was started again."
    next_step = (
        "It stays down." if event.restart_in_s is None else f"It starts again in {event.restart_in_s:.0f} s."
    )
    tail = "\n".join(f"    {line}" for line in event.log_tail.splitlines())
    return f"{event.name} {event.how}; the others go on. {next_step} The end of its log:\n{tail}"


def runtime_content(stack: Stack) -> dict[str, object]:
    """What the runtime file says."""
    plan = stack.plan
    return {
        "gateway": plan.gateway.listen,
        "verifiers": [plan.verifier.listen],
        "drafters": [drafter.listen for drafter in plan.drafters],
        "health": {process.name: process.health_listen for process in plan.processes},
        "pids": {"up": os.getpid(), **stack.pids},
        "model": plan.model,
    }


def where_and_what_next(plan: StackPlan, folder: Path) -> str:
    lines = ["", f"SparkRelay is up, model {plan.model}:"]
    lines += [f"  {p.name:<10} {p.listen:<16} health {p.health_listen}" for p in plan.processes]
    lines += [
        f"  runtime    {folder / 'runtime.json'}",
        "",
        "Next, in another terminal:",
        '  sparkrelay generate --prompt "Why is the sky blue?"',
        '  sparkrelay generate --prompt "Why is the sky blue?" --speculation off --json',
        "  sparkrelay generate --help",
        "Ctrl-C ends it all.",
    ]
    return "\n".join(lines)


def say(line: str) -> None:
    print(line, flush=True)
