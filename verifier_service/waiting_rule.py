"""Whether a step starts now or waits for blocks that are on their way, and who enters it.

At a step boundary every decoding session is

  ready    its block is here
  bare     nothing is to be waited for: no drafter, no drafts wanted, the drafter passed (an empty block), or the one
           wait was used up
  pending  a block (or the drafter's join) is on its way, and may be waited for until a deadline

Ready and bare sessions enter. A step that fewer than half of the sessions could enter waits, until the earliest deadline at
most; a step that reads a prompt never waits. A pending session that a step has skipped enters the next one without its
block: nobody misses two steps in a round, and nobody else waits longer than one deadline for a drafter that is silent.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from verifier_service.sequence import Sequence, Turn


@dataclass(frozen=True, slots=True)
class Boundary:
    """What a step boundary decides.

    entering  the sessions that enter a step now; empty: none starts, unless prompts are to be read
    due_us    if none starts: when to look again
    """

    entering: list[Sequence]
    due_us: int | None = None


def is_pending(sequence: Sequence, turn: Turn, now_us: int, wait_limit_us: int) -> bool:
    """Whether a decoding session that wants drafts and has no block is pending, else bare.

    Starts its wait when it is found pending, ends it when its deadline has passed.
    """
    wait = turn.wait
    if not wait.patient or wait.passed or (sequence.member is None and not wait.join_expected):
        return False
    if wait.deadline_us is None:
        wait.deadline_us = now_us + wait_limit_us
    if now_us < wait.deadline_us:
        return True
    wait.give_up()
    return False


def at_boundary(
    able: list[Sequence], pending: Ordered[Sequence], *, overdue: bool, prompts_to_read: bool
) -> Boundary:
    """Decides.

    able             the ready and bare sessions, in the order they should enter
    pending          the others
    overdue          a wait ended at this very boundary: the step that waited starts
    prompts_to_read  there is other work for a step
    """
    if not pending:
        return Boundary(able)
    if prompts_to_read or overdue or len(able) >= len(pending):
        turns = [(sequence, _turn(sequence)) for sequence in pending]
        late = [sequence for sequence, turn in turns if turn.wait.skipped]
        for _, turn in turns:
            # Once skipped it enters; its wait runs on behind it, and ends when its deadline passes or a block comes.
            turn.wait.skipped = True
        return Boundary(able + late)
    deadlines = [_turn(sequence).wait.deadline_us for sequence in pending]
    return Boundary([], min(deadline for deadline in deadlines if deadline is not None))


def _turn(sequence: Sequence) -> Turn:
    assert sequence.turn is not None
    return sequence.turn
