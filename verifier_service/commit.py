"""From the logits of a step to committed tokens, and to what is said about them."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np

from sparkrelay.device.logprobs import logprobs_row
from sparkrelay.frames import NO_TOKEN, PREFILL_ROUND
from sparkrelay.outcomes import BlockState, FinishReason, Reason
from verifier_service.accept import verify_block
from verifier_service.batch_scheduler import Entry
from verifier_service.events import BlockDropped, Committed, Event, MemberVerdict, Round, TokenLogprob
from verifier_service.member_feed import verdict_rows
from verifier_service.models import FloatRows
from verifier_service.sequence import Block, Member, Sequence, Turn, usable_part
from verifier_service.state_memory import StateMemory


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What all rounds of a step share: when it started and ended, how long the target computed, how large it was."""

    started_us: int
    ended_us: int
    verify_us: int
    row_count: int
    session_count: int


@dataclass(slots=True)
class Verdict:
    """What a sequence commits; `accept.BlockVerdict` says what each field means."""

    accepted: int
    tokens: Ordered[int]
    stopped: bool
    failure: str | None = None
    failure_reason: Reason = Reason.INTERNAL


# ---- from logits to verdicts ------------------------------------------------------------------------------------------


def verdicts_of(entries: Ordered[Entry], logits: FloatRows, starts: Ordered[int]) -> list[Verdict | None]:
    """What each entry's sequence commits; None for a chunk of a prompt that goes on.

    logits  [K, vocab]; those of entry i are rows starts[i] .. starts[i + 1] - 1
    """
    best: list[int] | None = None
    verdicts: list[Verdict | None] = []
    for entry, first, last in zip(entries, starts, starts[1:], strict=False):
        turn = entry.sequence.turn
        assert turn is not None
        draft_ids: tuple[int, ...] = ()
        if entry.depth and turn.block is not None:
            draft_ids = turn.block.token_ids[: entry.depth]
        if first == last:
            verdicts.append(None)
        elif turn.chooser is None:
            best = best_tokens(logits) if best is None else best
            verdicts.append(judge_greedy(best[first:last], draft_ids, turn.command.stop_ids))
        else:
            by_rule = verify_block(logits[first:last], draft_ids, turn.chooser, turn.command.stop_ids)
            verdicts.append(
                Verdict(
                    by_rule.accepted,
                    by_rule.tokens,
                    by_rule.stopped,
                    by_rule.failure,
                    by_rule.failure_reason,
                )
            )
    return verdicts


def best_tokens(logits: FloatRows) -> list[int]:
    """The best token of each row, lowest id among equals; -1 for a row that has no finite best logit.

    It is `noise.greedy` for many rows at once.
    """
    ids = logits.argmax(axis=1)
    finite = np.isfinite(logits[np.arange(len(ids)), ids])
    chosen: list[int] = np.where(finite, ids, -1).tolist()
    return chosen


def judge_greedy(best: list[int], draft_ids: tuple[int, ...], stop_ids: frozenset[int]) -> Verdict:
    """`verify_block` where the target's tokens are known beforehand: best[i] is the token after draft token i."""
    accepted = 0
    for draft_id in draft_ids:
        if best[accepted] != draft_id:
            break
        accepted += 1
    tokens = best[: accepted + 1]
    if not stop_ids.isdisjoint(tokens):
        end = next(index for index, token_id in enumerate(tokens) if token_id in stop_ids) + 1
        return Verdict(min(accepted, end), tokens[:end], True)
    if tokens[-1] < 0:
        return Verdict(accepted, tokens[:-1], False, "logits: a row has no finite best logit")
    return Verdict(accepted, tokens, False)


# ---- from verdicts to events --------------------------------------------------------------------------------------------


def commit(
    entry: Entry,
    verdict: Verdict,
    rows: FloatRows,
    facts: StepFacts,
    memory: StateMemory,
    draft_budget: int,
    events: list[Event],
) -> None:
    """Appends a verdict's tokens to the sequence and tells its caller and its member. There is at least one token.

    rows          [1 + depth, vocab] the logits the verdict is of
    draft_budget  wanted of the next block, 0 if the turn ends here
    """
    sequence, depth = entry.sequence, entry.depth
    turn, member = sequence.turn, sequence.member
    assert turn is not None
    command, block = turn.command, turn.block
    tokens = tuple(verdict.tokens)
    base_len = len(sequence.token_ids)
    sequence.token_ids += tokens
    report, index = None, PREFILL_ROUND
    if base_len > turn.opened_len:
        index = turn.round_count
        report = _report(entry, turn, member, verdict.accepted, base_len, facts)
        turn.round_count = index + 1
        turn.dropped_count = 0
    logprobs = () if command.logprob_count is None else _logprobs(rows, tokens, command.logprob_count)
    events.append(Committed(command.turn_id, base_len, tokens, report, logprobs))
    turn.reading = False
    turn.rested_us = facts.ended_us
    turn.wait.skipped = turn.wait.passed = False
    if member is None:
        return
    accepted = verdict.accepted
    next_id = tokens[accepted] if len(tokens) > accepted else NO_TOKEN
    used = block.sent.base_len if depth and block is not None else 0
    if draft_budget > member.block_size:
        draft_budget = member.block_size
    context = verdict_rows(sequence, member, memory, base_len, accepted) if member.reads_rows else None
    events.append(
        MemberVerdict(
            member.member_id, index, base_len, used, depth, accepted, next_id, draft_budget, context
        )
    )
    member.known_len = len(sequence.token_ids)
    if block is not None:
        # One that was checked is used up; one that was not may still fit behind what was committed.
        turn.block = None if depth else usable_part(block.sent, command.stop_ids, sequence.token_ids)
        if not depth and turn.block is None:
            drop_block(turn, member.member_id, events)


def finish_reason_of(sequence: Sequence, turn: Turn, verdict: Verdict) -> FinishReason | None:
    """Why the turn ends with this verdict; None if it goes on, or cannot."""
    if verdict.stopped:
        return FinishReason.STOP
    if sequence.base_len < turn.end_len:
        return None
    asked_for = turn.command.output_start + turn.command.max_tokens
    return FinishReason.LENGTH if turn.end_len == asked_for else FinishReason.CONTEXT


def drop_block(turn: Turn, member_id: int, events: list[Event]) -> None:
    """Counts a stale block of the turn and says so."""
    turn.dropped_count += 1
    events.append(BlockDropped(member_id, stale=True))


def _report(
    entry: Entry, turn: Turn, member: Member | None, accepted: int, base_len: int, facts: StepFacts
) -> Round:
    block = turn.block
    drafted, draft_us, queue_us = 0, 0, 0
    confidences: tuple[float, ...] = ()
    if block is None:
        state = _plain_state(turn, member, base_len)
    else:
        state = _block_state(block, entry.depth)
        drafted, confidences = len(block.token_ids), block.confidences
        draft_us, queue_us = block.sent.draft_us, block.sent.queue_us
    return Round(  # by position: names would cost a third more, once a session and step
        turn.round_count,
        base_len,
        drafted,
        entry.depth,
        accepted,
        state,
        confidences,
        facts.started_us - turn.rested_us,
        facts.verify_us,
        draft_us,
        queue_us,
        facts.row_count,
        facts.session_count,
        turn.dropped_count,
        member.drafter_id if member is not None else "",
    )


def _block_state(block: Block, depth: int) -> BlockState:
    if depth == 0:
        return BlockState.NOT_ASKED
    return BlockState.REBASED if block.offset else BlockState.FRESH


def _plain_state(turn: Turn, member: Member | None, base_len: int) -> BlockState:
    """Why there is no block."""
    if member is None:
        return BlockState.NO_DRAFTER
    if turn.wait.passed:
        return BlockState.FRESH  # it came, and there was nothing in it
    given_up = (not turn.wait.patient or turn.wait.skipped) and turn.end_len - base_len > 1
    return BlockState.LATE if given_up else BlockState.NOT_ASKED


def _logprobs(rows: FloatRows, tokens: Ordered[int], count: int) -> tuple[TokenLogprob, ...]:
    """One a token: token i was chosen from row i."""
    reported = []
    for row, token_id in zip(rows, tokens, strict=False):
        logprobs = logprobs_row(row, token_id, count)
        reported.append(TokenLogprob(token_id, logprobs.chosen, logprobs.top))
    return tuple(reported)
