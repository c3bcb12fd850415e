"""`sparkrelay demo` (`make demo`): one real answer through three processes, plain and speculative, and if both are the same."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparkrelay.cli.generate import tokens_per_s
from sparkrelay.cli.loops import loop_share
from sparkrelay.cli.options import examples, paragraphs
from sparkrelay.cli.up import core_count, say

if TYPE_CHECKING:
    from rich.table import Table

    from sparkrelay.client.blocking import Client
    from sparkrelay.client.results import Generation

HELP = """Show the whole path: start the three services, stream an answer, compare it with plain decoding.

Fetches the model first if it is not here (88 MB). Ends with exit code 1 if the two answers differ in one token.
"""

EXAMPLES = examples("sparkrelay demo", "sparkrelay demo --temperature 0.7 --max-tokens 80")
MODEL = "smollm2-135m"
DRAFTER = "ngram"
TEXT = """\
The lighthouse stands on a rock at the mouth of the bay. Every evening the keeper climbs the narrow stairs, lights the \
lamp and writes the weather into a thick blue book. When fog comes in from the sea he rings the bell until morning."""
PROMPT = f"Rewrite this text in the past tense:\n\n{TEXT}"
ABOUT_THE_DRAFTER = """\
The drafter is prompt lookup (n-gram): it has no weights and proposes what followed the same words earlier in the text.
So the demo asks for a rewrite, where that helps; on free text it helps little."""
NEXT = """\
Next:
  sparkrelay up                                            start the services and keep them
  sparkrelay generate --prompt "Why is the sky blue?"      ask them, in another terminal
  sparkrelay generate --prompt "Why is the sky blue?" --temperature 0.7 --seed 1 --json"""
TOKENS = 160
WARM_UP_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to the same request, with and without a drafter."""

    speculative: Generation
    plain: Generation

    @property
    def identical(self) -> bool:
        return self.speculative.token_ids == self.plain.token_ids

    @property
    def speedup(self) -> float:
        plain = tokens_per_s(self.plain)
        return tokens_per_s(self.speculative) / plain if plain else 0.0


def register(app: typer.Typer) -> None:
    app.command("demo", help=paragraphs(HELP), epilog=EXAMPLES, rich_help_panel="Run")(demo)


def demo(
    max_tokens: Annotated[int, typer.Option(min=2, help="The most tokens of the answer.")] = TOKENS,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy; above it the seed is fixed, so it is the same.")
    ] = 0.0,
) -> None:
    from rich.console import Console

    from sparkrelay.cli.stack import Stack, StackError
    from sparkrelay.cli.stack_plan import StackOptions, free_port, plan_stack
    from sparkrelay.client.blocking import connect
    from sparkrelay.client.errors import SparkRelayError

    fetch_model()
    plan = plan_stack(StackOptions(model=MODEL, drafter=DRAFTER), core_count(), free_port)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sparkrelay-demo-") as folder, interrupted_by_sigterm():
        say(f"Starting a verifier ({MODEL}), a drafter ({DRAFTER}) and a gateway on this machine ...")
        try:
            with Stack(plan, Path(folder)) as stack:
                stack.wait_until_ready(say)
                with connect(stack.gateway) as client:
                    comparison = compare(client, max_tokens, temperature)
        except (StackError, SparkRelayError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    Console(highlight=False).print(table(comparison))
    say(f"\n{NEXT}\n\n(The whole demo took {time.monotonic() - started:.0f} s; its processes have ended.)")
    if not comparison.identical:
        print("error: the two answers differ; this must never happen in exact mode.", file=sys.stderr)
        raise typer.Exit(1)


def fetch_model() -> None:
    """Pulls the demo model unless it is here."""
    from sparkrelay import store
    from sparkrelay.cli.models import pull

    if not store.is_complete(store.default_paths().model(MODEL), store.find(MODEL)):
        pull(MODEL)


def compare(client: Client, max_tokens: int, temperature: float) -> Comparison:
    """Streams the speculative answer, then makes the plain one quietly; both after a short warm-up."""
    say(f"\n{ABOUT_THE_DRAFTER}\n")
    for speculation in ("auto", "off"):
        ask(client, WARM_UP_TOKENS, temperature, speculation, show=False)
    say(f"> {PROMPT}\n")
    speculative = ask(client, max_tokens, temperature, "auto", show=True)
    say("\nThe same again, plain (one token a step), to compare ...\n")
    return Comparison(speculative, ask(client, max_tokens, temperature, "off", show=False))


def ask(client: Client, max_tokens: int, temperature: float, speculation: str, *, show: bool) -> Generation:
    """One turn with a fixed seed."""
    with client.generate_stream(
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=max_tokens,
        temperature=temperature,
        seed=1,
        speculation=speculation,
        include_rounds=True,
    ) as turn:
        for delta in turn:
            if show:
                print(delta.text, end="", flush=True)
        if show:
            print(flush=True)
        return turn.result


def table(comparison: Comparison) -> Table:
    """The two runs side by side, and the verdict."""
    from rich.table import Table

    speculative, plain = comparison.speculative, comparison.plain
    totals = speculative.totals
    result = Table("", "plain", "speculative", title="The same answer, twice", title_justify="left")
    result.add_row("tokens", str(plain.usage.output), str(speculative.usage.output))
    result.add_row(
        "tokens/s",
        f"{tokens_per_s(plain):.1f}",
        f"{tokens_per_s(speculative):.1f}  ({comparison.speedup:.2f} times)",
    )
    result.add_row("rounds", str(plain.totals.rounds), str(totals.rounds))
    result.add_row(
        "accepted length (tokens a round)",
        f"{plain.accepted_length:.2f}",
        f"{speculative.accepted_length:.2f}",
    )
    result.add_row("drafted tokens", str(plain.totals.drafted), str(totals.drafted))
    result.add_row("  of these verified", str(plain.totals.verified), str(totals.verified))
    result.add_row("  accepted", str(plain.totals.accepted), str(totals.accepted))
    result.add_row("  rejected", "0", str(totals.verified - totals.accepted))
    result.add_row(
        "share of looping text",
        f"{loop_share(plain.token_ids):.0%}",
        f"{loop_share(speculative.token_ids):.0%}",
    )
    result.add_section()
    result.add_row("identical: yes" if comparison.identical else "identical: NO", "", "")
    return result


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, so that no process is left."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
