"""Memberships: which drafter drafts for which session, and what becomes of the blocks it sends."""

from __future__ import annotations

from collections.abc import Iterable

from sparkrelay.outcomes import Reason
from verifier_service.commit import drop_block
from verifier_service.events import AddMember, BlockArrived, BlockDropped, Event, MemberAdded, MemberRemoved
from verifier_service.sequence import Member, Sequence, is_spent, usable_part


class Members:
    """Every membership there is. A session has one at most."""

    __slots__ = ("_sessions",)

    def __init__(self) -> None:
        self._sessions: dict[int, Sequence] = {}  # member id |-> the session it drafts for

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, command: AddMember, sequence: Sequence, events: list[Event]) -> None:
        """Joins a drafter; an earlier one is superseded. It keeps the tokens it holds if they are the session's."""
        assert command.member_id not in self._sessions, "a member's number was used again"
        self.remove_from(sequence, Reason.SUPERSEDED, "another drafter joined this session", events)
        held = command.tokens_held if sequence.has_prefix(command.tokens_held, command.held_hash) else 0
        sequence.member = Member(
            command.member_id, command.drafter_id, command.block_size, held, command.reads_rows, held
        )
        self._sessions[command.member_id] = sequence
        if sequence.turn is not None:
            sequence.turn.wait.renew()
        events.append(MemberAdded(command.member_id, sequence.session_id, held))

    def remove_from(self, sequence: Sequence, reason: Reason, message: str, events: list[Event]) -> None:
        """Ends the session's membership, if it has one, by the engine's decision: the drafter is told."""
        if sequence.member is not None:
            member_id = sequence.member.member_id
            self.remove(member_id)
            events.append(MemberRemoved(member_id, sequence.session_id, reason, message))

    def remove(self, member_id: int) -> None:
        """Forgets a membership that is over. Nobody is waited for any more. An unknown one is no error."""
        sequence = self._sessions.pop(member_id, None)
        if sequence is None:
            return
        sequence.member = None
        if sequence.turn is not None:
            sequence.turn.block = None
            sequence.turn.wait.give_up()

    def take_block(self, command: BlockArrived, events: list[Event]) -> None:
        """Keeps a block for the next step if it fits the committed tokens, from where they have got to.

        An empty one says that there is nothing to wait for in this round.
        """
        sequence = self._sessions.get(command.member_id)
        turn = sequence.turn if sequence is not None else None
        if sequence is None or turn is None or command.turn_id not in ("", turn.command.turn_id):
            events.append(BlockDropped(command.member_id, stale=False))
            return
        assert len(command.token_ids) == len(command.confidences), "the servicer checks a block's columns"
        if not command.token_ids:
            if command.base_len == len(sequence.token_ids):
                turn.wait.renew()
                turn.wait.passed = True
            return
        block = usable_part(command, turn.command.stop_ids, sequence.token_ids)
        if block is not None or is_spent(command, sequence.token_ids):
            turn.wait.renew()
        if block is None or turn.block is not None:
            drop_block(turn, command.member_id, events)  # this one, or the one it replaces
        if block is not None:
            turn.block = block

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        with_member = {s.member.member_id: s for s in sequences if s.member is not None}
        assert with_member == self._sessions, "a membership and its session disagree"
