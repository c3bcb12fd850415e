"""Where generated text turns into a loop: any drafter is perfect on one, so figures on speculation are honest only before it."""

from __future__ import annotations

from collections.abc import Sequence

LOOP_LENGTH = 32
LONGEST_PERIOD = 64


def loop_start(
    token_ids: Sequence[int], length: int = LOOP_LENGTH, longest_period: int = LONGEST_PERIOD
) -> int:
    """Index of the first of `length` tokens in a row that each equal the one a fixed period (at most `longest_period`) before.

    Everything from there on is cut. Without a loop it is the number of tokens.
    """
    first = len(token_ids)
    for period in range(1, longest_period + 1):
        run = 0
        for index in range(period, len(token_ids)):
            run = run + 1 if token_ids[index] == token_ids[index - period] else 0
            if run == length:
                first = min(first, index - length + 1)
                break
    return first


def loop_share(token_ids: Sequence[int]) -> float:
    """The part of the tokens that the rule cuts, 0 to 1."""
    return 1 - loop_start(token_ids) / len(token_ids) if token_ids else 0.0
