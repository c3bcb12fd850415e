"""Options that several commands have, spelled once."""

from __future__ import annotations

from typing import Annotated

import typer

Gateway = Annotated[
    str,
    typer.Option(
        "--gateway",
        metavar="HOST:PORT",
        help="The gateway to ask; else SPARKRELAY_GATEWAY, else what `sparkrelay up` started here.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout instead of text.")]


def examples(*lines: str) -> str:
    """The end of a command's help: what to type, a line each."""
    return "\n".join(("[bold]Examples[/]", *(f"  {line}" for line in lines)))


def paragraphs(text: str) -> str:
    """A help text whose paragraphs fill the terminal's width, however they are broken in the source."""
    return "\n\n".join(" ".join(each.split()) for each in text.strip().split("\n\n"))
