"""What a member lacks of its session, and when it can be told: ids at once, but to one that reads context rows with their rows.

A row exists once its position has been read, and never for the anchor: it comes with the verdict that makes the anchor history.
So a member that reads rows follows the reading of a prompt chunk by chunk, wherever the state of a chunk came from: a forward,
another session, or what was kept of an earlier turn. When it has the ids of a turn it has the rows of all but the last.
"""

from __future__ import annotations

from verifier_service.events import Event, MemberContext, MemberRewound
from verifier_service.models import ContextWords
from verifier_service.sequence import Member, Sequence
from verifier_service.state_memory import StateMemory


def feed(sequence: Sequence, memory: StateMemory, events: list[Event]) -> None:
    """Tells the session's member, if it has one, what it lacks and can have now."""
    member = sequence.member
    if member is None or member.known_len == len(sequence.token_ids):
        return  # as nearly always: this is asked once a session and step
    start, base_len = member.known_len, sequence.base_len
    if not member.reads_rows:
        events.append(MemberContext(member.member_id, start, tuple(sequence.token_ids[start:])))
        member.known_len = base_len
        return
    # The last id comes although it has no row: it is the anchor.
    end = base_len if sequence.state_len >= base_len - 1 else sequence.state_len
    if end <= start:
        return
    rows_end = min(end, base_len - 1)
    rows = memory.context_rows(sequence, start, rows_end) if rows_end > start else None
    ids = tuple(sequence.token_ids[start:end])
    events.append(MemberContext(member.member_id, start, ids, start if rows is not None else 0, rows))
    member.known_len, member.rows_len = end, max(start, rows_end)


def verdict_rows(
    sequence: Sequence, member: Member, memory: StateMemory, base_len: int, accepted: int
) -> ContextWords:
    """[accepted + 1, width] the rows that a verdict carries of the anchor and the accepted tokens; before anything is rewound."""
    member.rows_len = base_len + accepted
    return memory.context_rows(sequence, base_len - 1, base_len + accepted)


def settle(sequence: Sequence, events: list[Event]) -> None:
    """A turn ends. What it owes its member is paid without rows, which do not exist yet; they come with the next turn."""
    member = sequence.member
    if member is not None and member.known_len < sequence.base_len:
        rest = tuple(sequence.token_ids[member.known_len :])
        events.append(MemberContext(member.member_id, member.known_len, rest))
        member.known_len = sequence.base_len


def rewind(sequence: Sequence, keep_len: int, events: list[Event]) -> None:
    """A turn opens that keeps so many tokens. A member that reads rows also goes back to where its rows end: at least the last
    id of the turn before it had none."""
    member = sequence.member
    if member is None:
        return
    if member.reads_rows:
        keep_len = member.rows_len = min(keep_len, member.rows_len)
    if member.known_len > keep_len:
        member.known_len = keep_len
        events.append(MemberRewound(member.member_id, keep_len))
