"""What goes into the engine and what comes out: commands and events, plain values without gRPC.

Values are never changed once made. Those that are made for every session in every step (`BlockArrived`, `Round`, `Committed` and
`MemberVerdict`) are named tuples: the cheapest to make, and many of them become columns with one `zip`.

A member is a drafter's membership in a session; the engine knows it by a number that the servicer chose and never uses again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from sparkrelay.frames import Verdict
from sparkrelay.outcomes import BlockState, FinishReason, Reason
from sparkrelay.sampling import Sampling

if TYPE_CHECKING:
    from verifier_service.grammar import Grammar

# ---- commands: from the servicer to the engine ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpeculationRequest:
    """Who decides the depth of a turn: the policy (`fixed_depth` None), or this number; 0 is plain decoding."""

    fixed_depth: int | None = None


@dataclass(frozen=True, slots=True)
class StartTurn:
    """Opens a turn; see VerifierServiceGenerateRequest. Shapes and ranges that need no engine state are checked before.

    stop_ids         all ids that end the turn, the model's own included
    expect_drafter   True if a drafter was invited: the engine may wait for its join and blocks
    logprob_count    None for no log-probabilities
    tenant_salt      whose request it is, set by the gateway: state is reused only between sessions of the same salt
    grammar          what shape the output must have, compiled; None for any
    """

    session_id: str
    turn_id: str
    keep_len: int
    keep_hash: bytes
    append_ids: tuple[int, ...]
    output_start: int
    sampling: Sampling
    max_tokens: int
    stop_ids: frozenset[int]
    speculation: SpeculationRequest = SpeculationRequest()
    expect_drafter: bool = False
    logprob_count: int | None = None
    received_us: int = 0
    tenant_salt: bytes = b""
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class CancelTurn:
    """Ends a turn; a turn that is unknown or over is no error."""

    turn_id: str


@dataclass(frozen=True, slots=True)
class EndSession:
    """Forgets a session; its turn, if any, ends cancelled. An unknown session is no error."""

    session_id: str


@dataclass(frozen=True, slots=True)
class ForkSession:
    """Opens a session that begins with the first `at_len` committed tokens of another, which may have a turn under way.

    at_hash  chain hash that these tokens must have; None if the caller knows that nobody has rewound them
    """

    session_id: str
    new_session_id: str
    at_len: int
    at_hash: bytes | None = None


@dataclass(frozen=True, slots=True)
class AddMember:
    """A drafter joins; an earlier member of the session is superseded.

    reads_rows  it is to be sent context rows with the tokens; what it holds, it holds with their rows
    """

    session_id: str
    member_id: int
    drafter_id: str
    tokens_held: int
    held_hash: bytes
    block_size: int
    reads_rows: bool = False


@dataclass(frozen=True, slots=True)
class RemoveMember:
    """A membership is over (leave, lost stream, violation); an unknown one is no error."""

    member_id: int


@dataclass(frozen=True, slots=True)
class DrafterUnavailable:
    """No drafter will join this turn any more (none is left to invite): do not wait for one."""

    session_id: str
    turn_id: str


class BlockArrived(NamedTuple):
    """A drafted block; ids are already known to be in the vocabulary, confidences are in 0..1.

    turn_id  the turn that ran, for the servicer, when it came. A block that was on its way while its turn was cancelled and
             another one opened is of no use to the new one. Empty: any turn
    """

    member_id: int
    base_len: int
    token_ids: tuple[int, ...]
    confidences: tuple[float, ...]
    draft_us: int
    queue_us: int
    received_us: int
    turn_id: str = ""


Command = (
    StartTurn
    | CancelTurn
    | EndSession
    | ForkSession
    | AddMember
    | RemoveMember
    | DrafterUnavailable
    | BlockArrived
)

# ---- events for the caller of a turn ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TurnAccepted:
    """cached_token_count: prompt tokens whose state is there. TurnOver says how it was when they were read:
    more if others had read them by then, less if they were evicted before.
    """

    turn_id: str
    prompt_token_count: int
    cached_token_count: int


@dataclass(frozen=True, slots=True)
class TurnRefused:
    """field: the request's field at fault, "" if none. retry_after_ms: 0 if trying again cannot help."""

    turn_id: str
    reason: Reason
    message: str
    field: str = ""
    retry_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Round(NamedTuple):
    """One round as it was; see RoundReport. confidences in 0..1, one a draft token at hand."""

    number: int
    base_len: int
    drafted_count: int
    depth: int
    accepted_count: int
    block_state: BlockState
    confidences: tuple[float, ...]
    wait_us: int
    verify_us: int
    draft_us: int
    queue_us: int
    batch_row_count: int
    batch_session_count: int
    dropped_block_count: int
    drafter_id: str


class Committed(NamedTuple):
    """Tokens start .. start + len(token_ids) - 1 of the session are final.

    round is None for the token that ends the prompt's reading.
    """

    turn_id: str
    start: int
    token_ids: tuple[int, ...]
    round: Round | None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnOver:
    turn_id: str
    finish_reason: FinishReason
    prompt_token_count: int
    cached_token_count: int
    output_token_count: int
    session_token_count: int


# ---- events for the caller of a fork ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionForked:
    """The new session is open. state_len: of its tokens, those whose state was copied; the others are read when it has a turn."""

    session_id: str
    new_session_id: str
    token_count: int
    state_len: int


@dataclass(frozen=True, slots=True)
class ForkRefused:
    """See TurnRefused. field: that of VerifierServiceForkSessionRequest."""

    session_id: str
    new_session_id: str
    reason: Reason
    message: str
    field: str = ""
    retry_after_ms: int = 0


# ---- events for a member ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemberAdded:
    """The join is accepted: keep so many of the held tokens. Comes before anything else about this member."""

    member_id: int
    session_id: str
    keep_tokens: int


@dataclass(frozen=True, slots=True)
class MemberRemoved:
    """The membership is over, or was refused (no MemberAdded before it)."""

    member_id: int
    session_id: str
    reason: Reason
    message: str = ""


@dataclass(frozen=True, slots=True)
class MemberTurnStarted:
    member_id: int
    turn_id: str
    base_len: int
    sampling: Sampling
    remaining_count: int
    output_start: int
    stop_ids: frozenset[int]
    draft_budget: int


@dataclass(frozen=True, slots=True)
class MemberRewound:
    member_id: int
    length: int


@dataclass(frozen=True, slots=True)
class MemberContext:
    """Committed ids the member lacks, from `start` on. rows: [n, width] words of their context rows, from rows_start on;
    None for a member that reads none, and for a last id whose row is still to be made."""

    member_id: int
    start: int
    token_ids: tuple[int, ...]
    rows_start: int = 0
    rows: object = field(default=None, compare=False)


MemberVerdict = Verdict
"""What a member hears of a commit is what its drafter hears: the frame's own entry. `handle` is the member's number."""


@dataclass(frozen=True, slots=True)
class MemberTurnEnded:
    member_id: int
    turn_id: str
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class BlockDropped:
    """A block was of no use: stale, for a finished turn, or from a member that is gone. Counted, harmless."""

    member_id: int
    stale: bool


TurnEvent = TurnAccepted | TurnRefused | Committed | TurnOver
ForkEvent = SessionForked | ForkRefused
MemberEvent = (
    MemberAdded
    | MemberRemoved
    | MemberTurnStarted
    | MemberRewound
    | MemberContext
    | MemberVerdict
    | MemberTurnEnded
    | BlockDropped
)
Event = TurnEvent | ForkEvent | MemberEvent
