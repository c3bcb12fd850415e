"""`sparkrelay workers`: the verifiers of a gateway and their drafters. Decoding without a drafter is never silent."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from sparkrelay.cli.options import AsJson, Gateway, examples, paragraphs
from sparkrelay.cli.output import count, print_json, reported, show, tell
from sparkrelay.cli.times import milliseconds

if TYPE_CHECKING:
    from sparkrelay.client.results import Drafter, Worker

HELP = """List the verifiers and drafters that a gateway knows, and drain one.

Where a verifier decodes plainly, the list says why.
"""
COLOURS = {"ready": "green", "connected": "green", "lost": "red", "refused": "red"}  # all others: yellow

app = typer.Typer(name="workers", no_args_is_help=True, help=paragraphs(HELP))


def register(root: typer.Typer) -> None:
    root.add_typer(app, rich_help_panel="Look")


@app.command("list", epilog=examples("sparkrelay workers list", "sparkrelay workers list --json"))
def list_workers(as_json: AsJson = False, gateway: Gateway = "") -> None:
    """Show verifiers and drafters: state, load, round-trip times, acceptance."""
    from sparkrelay.client.blocking import connect

    with reported(), connect(gateway or None) as client:
        workers = client.workers()
    if as_json:
        print_json([asdict(each) for each in workers])
        return
    for worker in workers:
        show(worker_text(worker))


@app.command(epilog=examples("sparkrelay workers drain 127.0.0.1:7071"))
def drain(
    address: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="Of a verifier, as `sparkrelay workers list` shows it.")
    ],
    as_json: AsJson = False,
    gateway: Gateway = "",
) -> None:
    """Send no new sessions to a verifier; those it has go on. It is taken into use again when it restarts."""
    from sparkrelay.client.blocking import connect

    with reported(), connect(gateway or None) as client:
        worker = client.drain_worker(address)
    if as_json:
        print_json(asdict(worker))
        return
    show(worker_text(worker))
    tell(f"{count(worker.turn_count, 'turn')} of this gateway under way there.")


def worker_text(worker: Worker) -> str:
    """A verifier and its drafters, with rich's markup."""
    lines = [f"[bold]{worker.address}[/]  {coloured(worker.state)}"]
    if worker.message:
        lines.append(f"  {escaped(worker.message)}")
    if worker.model:
        exact = "exact" if worker.exact else "[yellow]not exact[/]"
        lines.append(f"  {escaped(worker.model)}, {exact}, depth {escaped(worker.depth_policy)}")
        lines.append(
            f"  {count(worker.session_count, 'session')}, {worker.active_turn_count} active, "
            f"{worker.queued_turn_count} queued, step {milliseconds(worker.step_us)}"
        )
    lines += [f"  {drafter_text(each)}" for each in worker.drafters]
    reason = why_plain(worker)
    if reason:
        lines.append(f"  [yellow]plain decoding:[/] {escaped(reason)}")
    return "\n".join(lines)


def drafter_text(drafter: Drafter) -> str:
    """One drafter, with rich's markup."""
    parts = [f"[bold]{escaped(drafter.drafter_id)}[/]  {coloured(drafter.state)}"]
    if drafter.proposal_kind:
        parts.append(escaped(drafter.proposal_kind))
    if drafter.state == "connected":
        parts.append(
            f"RTT {milliseconds(drafter.round_trip_us)}, verdict to block {milliseconds(drafter.turnaround_us)}, "
            f"{count(drafter.session_count, 'session')}"
        )
    if drafter.verified:
        share = drafter.accepted / drafter.verified
        parts.append(f"{drafter.accepted} of {drafter.verified} checked were right ({share:.0%})")
    if drafter.message:
        parts.append(escaped(drafter.message))
    return "  ".join(parts)


def why_plain(worker: Worker) -> str:
    """Why nothing is drafted for this verifier, with what to do; empty if a drafter is connected, or nothing decodes there."""
    if worker.state not in ("ready", "draining") or any(
        each.state == "connected" for each in worker.drafters
    ):
        return ""
    if worker.depth_policy == "off":
        return "its depth policy is off; start it with --depth-policy auto"
    if not worker.drafters:
        return f"no drafter has dialled it; start one with --verifiers {worker.address}"
    found = (
        f"{each.drafter_id} is {each.state}{f' ({each.message})' if each.message else ''}"
        for each in worker.drafters
    )
    return f"no drafter is connected: {'; '.join(found)}"


def coloured(state: str) -> str:
    return f"[{COLOURS.get(state, 'yellow')}]{state}[/]"


def escaped(text: str) -> str:
    """Foreign text, so that brackets in it are no markup."""
    from rich.markup import escape

    return escape(text)
