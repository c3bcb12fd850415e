"""Which packages this installation wants, and whether the installed versions fit. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest

# `jinja2<4,>=3.1.6; extra == "gateway"`, as the metadata of an installed distribution spells it.
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(?P<limits>[^;]*)(?:;(?P<marker>.*))?")
_EXTRA = re.compile(r"extra\s*==\s*[\"']([^\"']+)[\"']")
_LIMIT = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*([^,\s]+)\s*")
_LEADING_NUMBERS = re.compile(r"\d+(?:\.\d+)*")

_HOLDS: dict[str, Callable[[int], bool]] = {
    ">=": lambda order: order >= 0,
    "<=": lambda order: order <= 0,
    "==": lambda order: order == 0,
    "!=": lambda order: order != 0,
    ">": lambda order: order > 0,
    "<": lambda order: order < 0,
}


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package that is wanted: `limits` as written (">=3.1,<4"), `extra` empty for the base."""

    name: str
    limits: str
    extra: str


@dataclass(frozen=True, slots=True)
class Package:
    """A wanted package and its installed version, None if it is not there."""

    wanted: Requirement
    version: str | None

    @property
    def fits(self) -> bool:
        return self.version is not None and meets(self.version, self.wanted.limits)


def parse(lines: Iterable[str]) -> list[Requirement]:
    """The requirements of a distribution's metadata; what cannot be understood is left out."""
    found = []
    for line in lines:
        match = _REQUIREMENT.fullmatch(line.strip())
        if match is not None:
            extra = _EXTRA.search(match["marker"] or "")
            found.append(Requirement(match["name"], match["limits"].strip(), extra[1] if extra else ""))
    return found


def meets(version: str, limits: str) -> bool:
    """Whether a version keeps to all limits. Suffixes (rc1, +cpu) are not looked at, limits of other forms neither."""
    for limit in limits.strip("() ").split(","):
        match = _LIMIT.fullmatch(limit)
        if match is not None and not _HOLDS[match[1]](compare(version, match[2])):
            return False
    return True


def compare(left: str, right: str) -> int:
    """Negative, 0 or positive as `left` is older than, as old as, or newer than `right`; 1.0 is 1.0.0."""
    for mine, other in zip_longest(_numbers(left), _numbers(right), fillvalue=0):
        if mine != other:
            return mine - other
    return 0


def _numbers(version: str) -> list[int]:
    match = _LEADING_NUMBERS.match(version)
    return [int(part) for part in match[0].split(".")] if match else []
