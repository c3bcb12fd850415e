"""`sparkrelay turns`: the recent turns of a gateway, and what each round of one did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from sparkrelay.cli.options import AsJson, Gateway, examples, paragraphs
from sparkrelay.cli.output import count, print_json, reported, show, tell
from sparkrelay.cli.times import age, milliseconds

if TYPE_CHECKING:
    from sparkrelay.client.results import RoundReport, RoundTotals, Turn

HELP = """List and show recent turns, with their rounds.

A turn is one answer; a round drafts tokens, checks some and commits those that are right and one more. The gateway remembers the
latest turns only.
"""
HEADER = f"{'round':>5} {'at':>6} {'drafted':>7} {'checked':>7} {'right':>5}  {'verify':>8}  drafter's part"

app = typer.Typer(name="turns", no_args_is_help=True, help=paragraphs(HELP))


def register(root: typer.Typer) -> None:
    root.add_typer(app, rich_help_panel="Look")


@app.command("list", epilog=examples("sparkrelay turns list --limit 5"))
def list_turns(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The most to show.")] = 20,
    session: Annotated[str, typer.Option(help="Only turns of this session.")] = "",
    as_json: AsJson = False,
    gateway: Gateway = "",
) -> None:
    """Show recent turns, newest first."""
    import time

    from sparkrelay.client.blocking import connect

    with reported(), connect(gateway or None) as client:
        turns = client.list_turns(limit, session)
    if as_json:
        print_json([asdict(each) for each in turns])
        return
    for each in turns:
        show(row(each, time.time()))
    if not turns:
        tell('No turn is remembered. `sparkrelay generate "Hello"` runs one.')


@app.command("show", epilog=examples("sparkrelay turns show turn-0123456789abcdef01234567"))
def show_turn(
    turn_id: Annotated[str, typer.Argument(metavar="TURN", help="Id, as every answer names it.")],
    as_json: AsJson = False,
    gateway: Gateway = "",
) -> None:
    """Show one turn and its rounds."""
    from sparkrelay.client.blocking import connect

    with reported(), connect(gateway or None) as client:
        turn = client.get_turn(turn_id)
    if as_json:
        print_json(asdict(turn))
    else:
        print(turn_text(turn))


def row(turn: Turn, now: float) -> str:
    """A turn in the list. now: seconds since 1970."""
    state = turn.finish_reason or "running"
    colour = {"failed": "red", "running": "yellow", "cancelled": "yellow"}.get(state, "green")
    what = f"{count(turn.usage.output, 'token')}, {drafting(turn.totals)}, {turn.timing.total_us / 1e6:.1f} s"
    return f"[bold]{turn.turn_id}[/]  [{colour}]{state}[/]  {what}, {age(now - turn.create_time)} ago"


def turn_text(turn: Turn) -> str:
    """All of a turn, a line each, then its rounds."""
    usage, timing = turn.usage, turn.timing
    stop = f" at {turn.stop_string!r}" if turn.stop_string else ""
    lines = [
        ("turn", turn.turn_id),
        ("trace", turn.trace_id or "none"),
        ("session", turn.session_id),
        ("model", turn.model),
        ("ended", f"{turn.finish_reason or 'not yet'}{stop}"),
        ("tokens", f"{usage.prompt} read ({usage.cached} of them kept), {usage.output} written"),
        ("time", f"first token {milliseconds(timing.first_token_us)}, all {milliseconds(timing.total_us)}"),
        ("rounds", drafting(turn.totals)),
    ]
    text = "\n".join(f"{name:<9} {value}" for name, value in lines)
    return f"{text}\n\n{rounds_text(turn.rounds)}" if turn.rounds else text


def drafting(totals: RoundTotals) -> str:
    """What the rounds came to; plain decoding is named."""
    if not totals.rounds:
        return "no round"
    if not totals.drafted:
        return f"{count(totals.rounds, 'round')}, nothing drafted"
    length = (totals.accepted + totals.rounds) / totals.rounds
    return f"{count(totals.rounds, 'round')} of {length:.2f} tokens, {totals.accepted} of {totals.drafted} drafted right"


def rounds_text(rounds: Sequence[RoundReport]) -> str:
    """A table of rounds: where each began, what was drafted, checked and right, and what became of the drafter's part."""
    lines = [
        f"{each.index:>5} {each.base_len:>6} {each.drafted:>7} {each.depth:>7} {each.accepted:>5}"
        f"  {milliseconds(each.verify_us):>8}  {each.block_state}"
        for each in rounds
    ]
    return "\n".join([HEADER, *lines])
