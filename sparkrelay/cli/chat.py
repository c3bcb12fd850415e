"""`sparkrelay chat`: a conversation with a running stack, in one session whose state stays warm."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sparkrelay.cli.conversation import AnswerOptions, Conversation
from sparkrelay.cli.options import AsJson, Gateway, examples, paragraphs
from sparkrelay.cli.output import REFUSED, has_colours, print_json, reported, tell

if TYPE_CHECKING:
    from sparkrelay.cli.chat_loop import Chat
    from sparkrelay.client.blocking import Client
    from sparkrelay.client.results import Model, Worker

HELP = """Talk with a model in a running stack (`sparkrelay up`).

On a terminal: history and editing of what you type, and while an answer comes its speed and what each round accepted (a bar a
round: full, all that was checked; a dot, nothing was drafted).
Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists commands.

In a pipe every line is a question, answers go to stdout, all else to stderr.
"""
EXAMPLES = examples(
    "sparkrelay chat",
    'sparkrelay chat --system "Answer in one sentence." --temperature 0.7',
    'echo "What is a lighthouse?" | sparkrelay chat',
)


def register(app: typer.Typer) -> None:
    app.command("chat", help=paragraphs(HELP), epilog=EXAMPLES, rich_help_panel="Ask")(chat)


def chat(
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="Instructions that come before the conversation.")
    ] = "",
    model: Annotated[str, typer.Option(metavar="NAME", help="The model, if more than one is served.")] = "",
    temperature: Annotated[
        float, typer.Option(metavar="X", min=0, max=100, help="0 is greedy; higher is more varied.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="X", help="Keep the likeliest tokens up to this probability; 1 keeps all."),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="The same seed gives the same answers; left out: a new one each."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=0, help="The most tokens of an answer; 0: the gateway's default.")
    ] = 0,
    speculation: Annotated[
        str, typer.Option(metavar="MODE", help="off, fixed:K with K from 0 to 15, or auto.")
    ] = "auto",
    gateway: Gateway = "",
    as_json: AsJson = False,
    timeout: Annotated[
        float, typer.Option(metavar="S", min=0.001, help="Seconds until an answer must be complete.")
    ] = 600.0,
) -> None:
    from sparkrelay.client.blocking import connect

    options = AnswerOptions(system, temperature, top_p, seed, max_tokens, speculation)
    with reported(), connect(gateway or None, timeout=timeout) as client:
        talk = open_chat(client, model, options, as_json=as_json)
        try:
            code = talk.run()
        finally:
            talk.end()
        if as_json:
            print_json(talk.to_dict())
    raise typer.Exit(code)


def open_chat(client: Client, model: str, options: AnswerOptions, *, as_json: bool) -> Chat:
    """The chat for this process's stdin and stdout, introduced if a person reads it."""
    from sparkrelay.cli.chat_lines import enable_editing, piped_lines, typed_line
    from sparkrelay.cli.chat_loop import Chat
    from sparkrelay.cli.chat_view import view_for

    is_terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    by_hand = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    view = view_for(
        as_json=as_json,
        colours=has_colours(os.environ, is_terminal=is_terminal),
        is_live=is_terminal,
    )
    chosen = choose_model(client.list_models(), model)
    lines = piped_lines(sys.stdin.buffer)
    if by_hand:
        enable_editing()
        view.say(introduction(chosen, client.workers(), client.address))
    read_line = typed_line if by_hand else lambda: next(lines, None)
    return Chat(client, chosen.name, Conversation(options), view, read_line, by_hand=by_hand)


def choose_model(models: list[Model], wanted: str) -> Model:
    """The model to talk with. Ends the command, with what to do, if there is none that can chat."""
    fitting = [each for each in models if wanted in ("", each.name)]
    names = ", ".join(each.name for each in models)
    if not models:
        problem = "No model is served here yet. `sparkrelay workers list` says what the verifiers do."
    elif not fitting:
        problem = f"--model: {wanted!r} is not served here; there is {names}."
    elif len(fitting) > 1:
        problem = f"Several models are served; name one with --model: {names}."
    elif not fitting[0].has_chat_template:
        problem = f"{fitting[0].name} has no chat template. Use `sparkrelay generate --raw` with it."
    else:
        return fitting[0]
    tell(f"error: {problem}")
    raise typer.Exit(REFUSED)


def introduction(model: Model, workers: list[Worker], address: str) -> str:
    """Who answers, and whether anybody drafts."""
    from sparkrelay.cli.workers import why_plain

    drafters = [each for worker in workers for each in worker.drafters if each.state == "connected"]
    kinds = ", ".join(f"{each.drafter_id} ({each.proposal_kind})" for each in drafters)
    reasons = "; ".join(why_plain(worker) for worker in workers if worker.model == model.name)
    who = f"drafted by {kinds}" if drafters else f"plain decoding: {reasons}"
    exact = "exact" if model.exact else "not exact"
    return f"{model.name} at {address}, {exact}, {who}.\n/help lists commands, Ctrl-D ends."
