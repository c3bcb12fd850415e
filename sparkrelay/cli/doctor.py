"""`sparkrelay doctor`: looks at this machine, the model and the stack, and says what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from sparkrelay.cli.options import AsJson, Gateway, examples, paragraphs
from sparkrelay.cli.output import REFUSED, console, count, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from sparkrelay.cli.doctor_checks import Finding

HELP = """Check this machine, the model and the stack, and say what to do.

Looks at Python and packages, ports, the runtime file, the model's files and hashes, the tokenizer, memory, cores, the clock, and,
where a gateway is known, at its models, verifiers and drafters. Starts nothing, changes nothing.

Exit code 1 if something fails; warnings are no failure.
"""
EXAMPLES = examples(
    "sparkrelay doctor", "sparkrelay doctor --model ./my-model", "sparkrelay doctor --json | jq .ok"
)
DEFAULT_MODEL = "smollm2-135m"
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
# Resident memory of the services beside the weights, measured with the demo model: verifier, drafter, gateway.
PROCESS_BYTES = 900_000_000


def register(app: typer.Typer) -> None:
    app.command("doctor", help=paragraphs(HELP), epilog=EXAMPLES, rich_help_panel="Run")(doctor)


def doctor(
    model: Annotated[
        str, typer.Option(help="The model to check: a name of `sparkrelay models list`, or a folder.")
    ] = "",
    as_json: AsJson = False,
    gateway: Gateway = "",
) -> None:
    findings = examine(model, gateway)
    failed = any(each.level == "fail" for each in findings)
    if as_json:
        print_json({"ok": not failed, "findings": [asdict(each) for each in findings]})
    else:
        console().print(table(findings))
        print(verdict(findings))
    if failed:
        raise typer.Exit(REFUSED)


def examine(model: str, gateway: str) -> list[Finding]:
    """All findings, in the order of what depends on what."""
    from sparkrelay.cli import doctor_checks as checks
    from sparkrelay.cli import doctor_probes as probes
    from sparkrelay.host.cores import explain, plan_threads, read_cores
    from sparkrelay.host.memory import free_memory
    from sparkrelay.runtime import FILE_NAME, default_folder

    runtime, content = probes.runtime_file(default_folder() / FILE_NAME)
    files = probes.model_on_disk(model or runtime.model or DEFAULT_MODEL)
    served = probes.served(gateway)
    cores = read_cores()
    threads = explain(cores, plan_threads(cores.compute_count))
    return [
        checks.check_python(probes.python_version(), probes.platform_name()),
        *checks.check_packages(probes.packages()),
        checks.check_clock(probes.clock()),
        checks.check_cores(cores.compute_count, threads),
        checks.check_memory(
            free_memory().byte_count, files, PROCESS_BYTES, is_served=runtime.state == "running"
        ),
        *checks.check_model(files, wanted=bool(model or runtime.model)),
        *checks.check_tokenizers_agree(files, served.workers),
        checks.check_ports(probes.ports(content)),
        *checks.check_runtime(runtime),
        *checks.check_served(served),
    ]


def table(findings: Sequence[Finding]) -> Table:
    """One row a finding, what to do below it."""
    from rich.markup import escape
    from rich.table import Table

    result = Table.grid(padding=(0, 2))
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold", max_width=24)
    result.add_column(overflow="fold")
    for each in findings:
        text = escape(each.what)
        if each.next_step:
            text += f"\n[bold]->[/] {escape(each.next_step)}"
        result.add_row(f"[{COLOURS[each.level]}]{each.level}[/]", escape(each.subject), text)
    return result


def verdict(findings: Sequence[Finding]) -> str:
    """The last line."""
    failures = sum(each.level == "fail" for each in findings)
    warnings = sum(each.level == "warn" for each in findings)
    if not failures:
        return f"\nNothing is broken; {count(warnings, 'warning')}." if warnings else "\nAll is well."
    return f"\n{count(failures, 'failure')}, {count(warnings, 'warning')}: see the lines with ->."
