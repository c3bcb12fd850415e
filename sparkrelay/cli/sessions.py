"""`sparkrelay sessions`: the conversations that a gateway keeps warm."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from sparkrelay.cli.options import AsJson, Gateway, examples, paragraphs
from sparkrelay.cli.output import count, print_json, reported, show, tell
from sparkrelay.cli.times import age

if TYPE_CHECKING:
    from sparkrelay.client.results import SessionInfo

HELP = """List, show and end the sessions of a gateway.

A session is a conversation whose state stays on one verifier, so that its next turn reads only what is new.
"""
SessionId = Annotated[
    str, typer.Argument(metavar="SESSION", help="Id, as `sparkrelay sessions list` shows it.")
]

app = typer.Typer(name="sessions", no_args_is_help=True, help=paragraphs(HELP))


def register(root: typer.Typer) -> None:
    root.add_typer(app, rich_help_panel="Look")


@app.command("list", epilog=examples("sparkrelay sessions list", "sparkrelay sessions list --json"))
def list_sessions(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The most to show.")] = 100,
    as_json: AsJson = False,
    gateway: Gateway = "",
) -> None:
    """Show the sessions, newest first."""
    import time

    from sparkrelay.client.blocking import connect

    with reported(), connect(gateway or None) as client:
        sessions = client.list_sessions(limit)
    if as_json:
        print_json([asdict(each) for each in sessions])
        return
    for each in sessions:
        show(row(each, time.time()))
    if not sessions:
        tell("No session is open. `sparkrelay chat` opens one.")
    elif len(sessions) == limit:
        tell(f"The newest {limit}; there may be more (--limit).")


@app.command("show", epilog=examples("sparkrelay sessions show session-0123456789abcdef"))
def show_session(session_id: SessionId, as_json: AsJson = False, gateway: Gateway = "") -> None:
    """Show what the gateway knows of one session."""
    from sparkrelay.client.blocking import connect

    with reported(), connect(gateway or None) as client:
        session = client.get_session(session_id)
    if as_json:
        print_json(asdict(session))
    else:
        print(session_text(session))


@app.command(
    epilog=examples("sparkrelay sessions end session-0123456789abcdef", "sparkrelay sessions end --all")
)
def end(
    session_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[SESSION]...", help="Ids of the sessions to end.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="End all sessions of this gateway.")] = False,
    as_json: AsJson = False,
    gateway: Gateway = "",
) -> None:
    """End sessions and free what they hold. Ending one that is gone is no error."""
    from sparkrelay.client.blocking import connect

    if bool(session_ids) == every:
        raise typer.BadParameter("name sessions, or give --all")
    with reported(), connect(gateway or None) as client:
        ended = session_ids or []
        while every and (found := [each.session_id for each in client.list_sessions(1000)]):
            ended = [*ended, *found]
            for session_id in found:
                client.end_session(session_id)
        for session_id in session_ids or ():
            client.end_session(session_id)
    if as_json:
        print_json({"ended": ended})
    else:
        print(f"{count(len(ended), 'session')} ended.")


def row(session: SessionInfo, now: float) -> str:
    """A session in the list. now: seconds since 1970."""
    state = "[yellow]busy[/]" if session.busy else "idle"
    size = f"{count(session.turn_count, 'turn')}, {count(session.token_count, 'token')}"
    return f"[bold]{session.session_id}[/]  {state}  {size}, {session.model}, {age(now - session.create_time)} old"


def session_text(session: SessionInfo) -> str:
    """All of a session, a line each."""
    lines = [
        ("session", session.session_id),
        ("model", session.model),
        ("state", "busy" if session.busy else "idle"),
        ("turns", str(session.turn_count)),
        ("tokens", str(session.token_count)),
        ("verifier", session.verifier_id or "none holds its state: the next turn reads all of it"),
        ("drafter", session.drafter_id or "none in its last turn"),
    ]
    return "\n".join(f"{name:<9} {value}" for name, value in lines)
