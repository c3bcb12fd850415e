"""Writes the README's tree: every file of the product with the first sentence of its docstring, so that the two cannot part.

Run without arguments to rewrite README.md between its two `tree` marks; with --check to only say whether it is up to date.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- tree: make format writes it -->", "<!-- tree ends -->"
NOTES = {
    "protos/": "the contract's source; `verifier_service.proto` tells the conversation step by step",
    "sparkrelay/": "what users import, and what two processes must have in common",
    "sparkrelay/v1/": "generated from protos/, never edited",
    "drafter_service/": "guesses blocks",
    "verifier_service/": "hosts the big model and decides what is committed",
    "gateway/": "text in, text out",
    "benchmarks/": "what prints the figures; each prints one JSON object as its last line",
    "tests/": "mirror the rooms; `system/` runs real processes on real sockets",
    "tools/": "what make runs",
    "docs/": "how it works, what was measured",
}
ROOMS = ("protos", "sparkrelay", "drafter_service", "verifier_service", "gateway", "benchmarks", "tools")
WIDTH = 34


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if README.md is out of date"
    )
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    fresh = with_tree(text)
    if fresh == text:
        return 0
    if check:
        sys.stderr.write("README.md: its tree is out of date; run `make format`\n")
        return 1
    readme.write_text(fresh, encoding="utf-8")
    return 0


def with_tree(text: str) -> str:
    """The README with today's tree between the marks."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n```\n{tree()}\n```\n{END}{after}"


def tree() -> str:
    lines = [line for room in ROOMS for line in _folder(ROOT / room, 0)]
    lines += [_line(name, NOTES[name], 0) for name in ("tests/", "docs/")]
    return "\n".join(lines)


def _folder(folder: Path, depth: int) -> list[str]:
    name = f"{folder.relative_to(ROOT).as_posix()}/"
    lines = [_line(f"{folder.name}/", NOTES.get(name) or _first_sentence(folder / "__init__.py"), depth)]
    if name == "sparkrelay/v1/":
        return lines
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        if path.is_dir() and path.name != "__pycache__" and any(path.rglob("*.py")):
            lines += _folder(path, depth + 1)
        elif path.suffix == ".py" and path.name != "__init__.py":
            lines.append(_line(path.name, _first_sentence(path), depth + 1))
    return lines


def _line(name: str, note: str, depth: int) -> str:
    return f"{'  ' * depth + name:<{WIDTH}}{note}".rstrip()


def _first_sentence(path: Path) -> str:
    """Of a module's docstring, or "" where there is none."""
    if not path.exists():
        return ""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=[.?])\s", paragraph)[0].rstrip(".:")


if __name__ == "__main__":
    sys.exit(main())
