"""Pages of things that have a sequence number, newest first. A page token is the last number of the page before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from sparkrelay.outcomes import FieldViolation, Reason, Refusal

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


class Numbered(Protocol):
    """Something with a number that grows with time."""

    @property
    def sequence(self) -> int: ...


Item = TypeVar("Item", bound=Numbered)


def page_of(newest_first: Iterable[Item], page_size: int, page_token: str) -> tuple[list[Item], str]:
    """The page and the token of the next one, empty if this is the last. Raises Refusal for a bad size or token."""
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        raise _invalid("page_size", f"is {page_size}; send 0 to {MAX_PAGE_SIZE}, 0 for {DEFAULT_PAGE_SIZE}")
    if page_token and not (page_token.isascii() and page_token.isdigit() and len(page_token) <= 20):
        raise _invalid(
            "page_token", "is not one of ours; send next_page_token of the previous page, or nothing"
        )
    below = int(page_token) if page_token else None
    size = page_size or DEFAULT_PAGE_SIZE
    page: list[Item] = []
    for item in newest_first:
        if below is not None and item.sequence >= below:
            continue
        if len(page) == size:
            return page, str(page[-1].sequence)
        page.append(item)
    return page, ""


def _invalid(name: str, message: str) -> Refusal:
    return Refusal(Reason.INVALID_FIELD, f"{name}: {message}.", violations=(FieldViolation(name, message),))
