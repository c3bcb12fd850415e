"""Opening and ending turns: what is refused, what a turn starts from, what its caller and its member are told."""

from __future__ import annotations

from dataclasses import dataclass

from sparkrelay.device.choice import Chooser
from sparkrelay.device.filters import needs_counts
from sparkrelay.outcomes import FinishReason, Reason
from sparkrelay.sampling import Sampling
from verifier_service.events import (
    Event,
    MemberTurnEnded,
    MemberTurnStarted,
    StartTurn,
    TurnAccepted,
    TurnOver,
    TurnRefused,
)
from verifier_service.member_feed import feed, rewind, settle
from verifier_service.sequence import Sequence, Turn, Wait
from verifier_service.state_memory import StateMemory


@dataclass(frozen=True, slots=True)
class Limits:
    """context_limit: the most tokens of a session, by the model or by setting. capacity_tokens: what memory has room for."""

    context_limit: int
    capacity_tokens: int

    @property
    def session_tokens(self) -> int:
        return min(self.context_limit, self.capacity_tokens)


def refusal_of(command: StartTurn, sequence: Sequence | None, limits: Limits) -> TurnRefused | None:
    """Why this turn cannot be served in the session as it stands; None if it can."""

    def refused(reason: Reason, message: str, field: str) -> TurnRefused:
        return TurnRefused(command.turn_id, reason, message, field)

    if sequence is None and command.keep_len > 0:
        message = "is not known here; send the whole conversation with keep_len 0"
        return refused(Reason.SESSION_NOT_FOUND, message, "session_id")
    if sequence is not None and sequence.salt != command.tenant_salt:
        return refused(Reason.SESSION_NOT_FOUND, "is another tenant's; use another id", "session_id")
    if sequence is not None and sequence.busy:
        message = "has a turn under way; wait for its end or cancel it"
        return refused(Reason.SESSION_BUSY, message, "session_id")
    if sequence is not None and not sequence.has_prefix(command.keep_len, command.keep_hash):
        message = (
            f"the session's first {command.keep_len} tokens of {sequence.base_len} are others; "
            "send the whole conversation with keep_len 0"
        )
        return refused(Reason.PREFIX_MISMATCH, message, "keep_hash")
    return _refusal_of_lengths(command, limits)


def _refusal_of_lengths(command: StartTurn, limits: Limits) -> TurnRefused | None:
    length = command.keep_len + len(command.append_ids)
    produced = length - command.output_start
    reason, field, message = Reason.INVALID_FIELD, "", ""
    if length == 0:
        field, message = "append_token_ids", "is empty in an empty session; send at least one token"
    elif not 0 <= command.output_start <= length:
        field, message = "output_start", f"is {command.output_start}; send an index from 0 to {length}"
    elif command.max_tokens <= produced:
        field = "stop.max_token_count"
        message = f"is {command.max_tokens}; send more than the {produced} tokens that the turn has produced already"
    elif length >= limits.context_limit:
        reason, field = Reason.CONTEXT_EXCEEDED, "append_token_ids"
        message = f"gives a session of {length} tokens; send at most {limits.context_limit - 1}, which leave room for an answer"
    elif length >= limits.capacity_tokens:
        reason, field = Reason.OUT_OF_MEMORY, "append_token_ids"
        message = (
            f"the session would have {length} tokens; this verifier's memory has room for {limits.capacity_tokens}, the answer "
            "included: shorten the conversation, or give the verifier more memory (its setting state_memory_mib)"
        )
    return TurnRefused(command.turn_id, reason, message, field) if field else None


def opened_length(command: StartTurn) -> int:
    """Committed tokens of the session once this turn is open."""
    return command.keep_len + len(command.append_ids)


def open_turn(
    sequence: Sequence, memory: StateMemory, limits: Limits, age: int, now_us: int, events: list[Event]
) -> None:
    """Rewinds the session to what is kept, appends the new tokens, and says so. The sequence has room for them.

    What another sequence remembers of these tokens is taken over.
    """
    command = sequence.requested
    assert command is not None and sequence.turn is None
    sequence.rewrite(command.keep_len, command.append_ids)
    # The anchor's logits are needed, so at least the anchor is read, even if its state is there.
    memory.rewind(sequence, min(command.keep_len, sequence.base_len - 1))
    memory.reuse(sequence)
    cached_count = min(sequence.state_len, command.output_start)
    sequence.requested = None
    sequence.turn = Turn(
        command=command,
        opened_len=sequence.base_len,
        end_len=min(command.output_start + command.max_tokens, limits.session_tokens),
        cached_count=cached_count,
        age=age,
        chooser=_chooser_of(sequence, command),
        wait=Wait(join_expected=command.expect_drafter),
        rested_us=now_us,
    )
    events.append(TurnAccepted(command.turn_id, command.output_start, cached_count))
    rewind(sequence, command.keep_len, events)


def _chooser_of(sequence: Sequence, command: StartTurn) -> Chooser | None:
    if command.grammar is None and is_plain_greedy(command.sampling):
        return None
    mask = None
    if command.grammar is not None:
        mask = command.grammar.begin(sequence.token_ids[command.output_start :], command.stop_ids)
    return Chooser(command.sampling, command.stop_ids, sequence.token_ids, command.output_start, mask)


def is_plain_greedy(sampling: Sampling) -> bool:
    """Whether the token is always the best of the raw logits."""
    return (
        sampling.greedy
        and not sampling.logit_bias
        and sampling.min_tokens == 0
        and not needs_counts(sampling)
    )


def introduce_turn(sequence: Sequence, memory: StateMemory, draft_budget: int, events: list[Event]) -> None:
    """Tells the member that a turn runs, and what it lacks. No member, or no turn: nothing to tell."""
    member, turn = sequence.member, sequence.turn
    if member is None or turn is None:
        return
    command, base_len = turn.command, sequence.base_len
    events.append(
        MemberTurnStarted(
            member_id=member.member_id,
            turn_id=command.turn_id,
            base_len=base_len,
            sampling=command.sampling,
            remaining_count=turn.end_len - base_len,
            output_start=command.output_start,
            stop_ids=command.stop_ids,
            draft_budget=min(draft_budget, member.block_size),
        )
    )
    feed(sequence, memory, events)


def close_turn(sequence: Sequence, reason: FinishReason, events: list[Event]) -> None:
    """The turn is over; its tokens stay."""
    turn = sequence.turn
    assert turn is not None
    command = turn.command
    events.append(
        TurnOver(
            turn_id=command.turn_id,
            finish_reason=reason,
            prompt_token_count=command.output_start,
            cached_token_count=turn.cached_count,
            output_token_count=sequence.base_len - command.output_start,
            session_token_count=sequence.base_len,
        )
    )
    _forget_turn(sequence, turn, reason, events)


def break_turn(sequence: Sequence, reason: Reason, message: str, events: list[Event]) -> None:
    """The turn cannot go on: its caller gets a refusal after the tokens it has."""
    turn = sequence.turn
    assert turn is not None
    events.append(TurnRefused(turn.command.turn_id, reason, message))
    _forget_turn(sequence, turn, FinishReason.CANCELLED, events)


def _forget_turn(sequence: Sequence, turn: Turn, reason: FinishReason, events: list[Event]) -> None:
    if sequence.member is not None:
        settle(sequence, events)
        events.append(MemberTurnEnded(sequence.member.member_id, turn.command.turn_id, reason))
    sequence.turn = None
