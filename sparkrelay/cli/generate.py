"""`sparkrelay generate`: ask the running stack, or a remote gateway, for one answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparkrelay.cli.options import AsJson, Gateway, examples, paragraphs
from sparkrelay.cli.output import count, for_terminal, print_json, reported, tell, utf8

if TYPE_CHECKING:
    from sparkrelay.client.blocking import Client, Session
    from sparkrelay.client.results import Generation

HELP = """Generate text with a running stack (`sparkrelay up`).

The answer goes to stdout as it is made, a summary to stderr. Without a prompt it is read from stdin.

With --json, stdout is one object: turn_id, text, token_ids, finish_reason, usage, seed, timing, rounds (each with drafted,
depth, accepted).
"""
EXAMPLES = examples(
    'sparkrelay generate "Why is the sky blue?"',
    'sparkrelay generate "Once upon a time" --raw --temperature 0.7',
    "sparkrelay generate --system 'Be brief.' < question.txt",
    'sparkrelay generate "Hello" --json | jq .usage',
)
NEW_SESSION = "new"
STDIN = "-"


def register(app: typer.Typer) -> None:
    app.command("generate", help=paragraphs(HELP), epilog=EXAMPLES, rich_help_panel="Ask")(generate)


def generate(
    text: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to answer; - reads it from stdin.")
    ] = "",
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="The same as an option.")
    ] = "",
    token_ids: Annotated[
        str, typer.Option(metavar="1,2,3", help="Token ids instead of text, separated by commas.")
    ] = "",
    system: Annotated[str, typer.Option(metavar="TEXT", help="A system message before the prompt.")] = "",
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="By the model's chat template, or the text as it is. Default: if it has one."
        ),
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="The model, if more than one is served.")] = "",
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The most tokens to produce.")] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="0 is greedy; higher is more varied.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="X", help="Keep the likeliest tokens up to this probability; 1 keeps all."),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(metavar="N", help="Keep so many of the likeliest tokens; 0 keeps all.")
    ] = 0,
    min_p: Annotated[
        float, typer.Option(metavar="X", help="Keep tokens so likely relative to the likeliest; 0 keeps all.")
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="The same seed gives the same tokens; left out, one is drawn and reported."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End where this text appears; may be given often."),
    ] = None,
    json_schema: Annotated[
        str, typer.Option(metavar="FILE", help="The answer is JSON that meets the JSON schema in this file.")
    ] = "",
    regex: Annotated[
        str, typer.Option(metavar="REGEX", help="The whole answer matches this regular expression.")
    ] = "",
    speculation: Annotated[
        str, typer.Option(metavar="MODE", help="off, fixed:K with K from 0 to 15, or auto.")
    ] = "auto",
    session: Annotated[
        str,
        typer.Option(
            metavar="ID",
            help="Id of a session to run in, with the whole conversation; new opens one and names it.",
        ),
    ] = "",
    stream: Annotated[bool, typer.Option(help="Print text as it comes, or all at the end.")] = True,
    as_json: AsJson = False,
    gateway: Gateway = "",
    timeout: Annotated[
        float, typer.Option(metavar="S", min=0.001, help="Seconds until the answer must be complete.")
    ] = 600.0,
) -> None:
    # Imported here: grpc takes a while, and `--help` should not.
    from sparkrelay.client.blocking import connect

    prompt = the_prompt(text, prompt, token_ids)
    options: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or (),
        "speculation": speculation,
        "response_format": asked_format(json_schema, regex),
        "include_rounds": True,
    }
    with reported(), connect(gateway or None, timeout=timeout) as client:
        options |= turn_input(client, prompt, token_ids, system, chat, model)
        answer(client, options, session, show_text=not as_json, stream=stream)


def the_prompt(argument: str, option: str, token_ids: str) -> str:
    """The text to answer, read from stdin (less a last newline) if it is - or if nothing is given and stdin is no terminal.

    Raises typer.BadParameter unless there is exactly one of a text and token ids.
    """
    given = [each for each in (argument, option, token_ids) if each]
    if len(given) > 1:
        raise typer.BadParameter("give one of PROMPT, --prompt and --token-ids")
    if token_ids:
        return ""
    text = argument or option
    if text == STDIN or (not text and not sys.stdin.isatty()):
        text = utf8(sys.stdin.buffer.read()).removesuffix("\n")
        if not text:
            raise typer.BadParameter("stdin is empty; write a prompt to it, or give PROMPT")
    if not text:
        raise typer.BadParameter('give a prompt: sparkrelay generate "Why is the sky blue?"')
    return text


def asked_format(json_schema: str, regex: str) -> dict[str, Any] | None:
    """The response format of the flags, None without one."""
    if json_schema and regex:
        raise typer.BadParameter("give at most one of --json-schema and --regex")
    if regex:
        return {"type": "regex", "pattern": regex}
    if not json_schema:
        return None
    try:
        return {"type": "json_schema", "schema": Path(json_schema).read_text(encoding="utf-8")}
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--json-schema: cannot read {json_schema}: {error}") from None


def turn_input(
    client: Client, prompt: str, token_ids: str, system: str, chat: bool | None, model: str
) -> dict[str, Any]:
    """The one input field of the request: messages, prompt or token_ids."""
    if token_ids:
        try:
            return {"token_ids": [int(part) for part in token_ids.split(",")]}
        except ValueError:
            raise typer.BadParameter(
                f"--token-ids: {token_ids!r} is no list of numbers; write 1,2,3"
            ) from None
    if system and chat is False:
        raise typer.BadParameter("--system needs the chat template; leave out --raw")
    if chat is None:
        models = client.list_models()
        chat = bool(system) or any(each.has_chat_template for each in models if model in ("", each.name))
    if not chat:
        return {"prompt": prompt}
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": prompt}]}


def answer(client: Client, options: dict[str, Any], session: str, *, show_text: bool, stream: bool) -> None:
    """Runs the turn and prints it."""
    opener = open_session(client, session, options["model"]) if session else client
    with opener.generate_stream(**options) as turn:
        if show_text and stream:
            shown = for_terminal if sys.stdout.isatty() else str
            for delta in turn:
                print(shown(delta.text), end="", flush=True)
        generation = turn.result
    if not show_text:
        print_json(generation.to_dict())
        return
    print("" if stream else generation.text)
    tell(summary(generation))


def open_session(client: Client, session: str, model: str) -> Session:
    """The session of this id, or a new one whose id goes to stderr."""
    from sparkrelay.client.blocking import Session

    if session != NEW_SESSION:
        return Session(client, client.get_session(session))
    opened = client.create_session(model=model)
    tell(f"session {opened.session_id}")
    return opened


def tokens_per_s(generation: Generation) -> float:
    """Speed of decoding: tokens after the first one, over the time since the first one; 0 for a single token."""
    decode_us = generation.timing.total_us - generation.timing.first_token_us
    count = generation.usage.output - 1
    return 1e6 * count / decode_us if count > 0 and decode_us > 0 else 0.0


def summary(generation: Generation) -> str:
    """One line about a turn, for people who may want to find it again."""
    return f"[{how_it_went(generation)}; turn {generation.turn_id}, seed {generation.seed}]"


def how_it_went(generation: Generation) -> str:
    """How much, how fast, how well drafted; and if nothing was, why."""
    usage, totals = generation.usage, generation.totals
    speed = f"{tokens_per_s(generation):.1f} tokens/s"
    parts = [count(usage.output, "token"), generation.finish_reason, speed]
    if totals.drafted:
        parts.append(f"{generation.accepted_length:.2f} tokens a round")
        parts.append(f"{totals.accepted} of {totals.drafted} drafted accepted")
    elif generation.no_drafter_reason:
        parts.append(f"no drafter: {generation.no_drafter_reason}")
    return ", ".join(parts)
