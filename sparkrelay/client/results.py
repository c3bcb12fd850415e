"""What calls return: frozen plain values, the same for the blocking and the asyncio client."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Usage:
    """What a turn cost, in tokens.

    prompt     tokens before the turn's output
    cached     of these, tokens whose state was still there
    output     tokens the turn produced, a stop id included
    discarded  of these, tokens committed beyond a stop string, never shown
    """

    prompt: int = 0
    cached: int = 0
    output: int = 0
    discarded: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of a turn by the gateway's monotonic clock, from the request's arrival; queue_us is the verifier's acceptance."""

    first_token_us: int = 0
    total_us: int = 0
    queue_us: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """log-softmax of the target's raw logits for one token; `top` are the most likely ones at its position, best first."""

    token_id: int
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    @property
    def probability(self) -> float:
        return math.exp(self.logprob)


@dataclass(frozen=True, slots=True)
class RoundReport:
    """One round: draft, schedule, verify, commit.

    index        number of the round in its turn, from 0
    base_len     committed tokens before it
    drafted      draft tokens at hand; `depth` of them were checked, `accepted` of these accepted
    block_state  fresh, rebased, late, no_drafter or not_asked: what became of the drafter's part
    confidences  calibrated confidence of each draft token at hand, 0 to 1
    """

    index: int
    base_len: int
    drafted: int
    depth: int
    accepted: int
    block_state: str
    confidences: tuple[float, ...] = ()
    wait_us: int = 0
    verify_us: int = 0
    draft_us: int = 0
    queue_us: int = 0
    batch_rows: int = 0
    batch_sessions: int = 0
    dropped_blocks: int = 0
    drafter_id: str = ""


@dataclass(frozen=True, slots=True)
class RoundTotals:
    """Sums over the rounds of a turn; also there when the rounds themselves were not asked for."""

    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The turn was accepted. `no_drafter_reason` is for people, empty if a drafter was asked."""

    turn_id: str
    trace_id: str
    session_id: str
    model: str
    seed: int
    prompt_token_count: int
    cached_token_count: int
    verifier_id: str
    drafter_id: str
    no_drafter_reason: str


@dataclass(frozen=True, slots=True)
class Delta:
    """What came since the last one. `index` is that of its first token in the turn's output; text may lag behind tokens."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    rounds: tuple[RoundReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole turn.

    finish_reason  stop, length, context or cancelled
    stop_string    the one that ended it, empty if none did
    rounds         empty unless asked for
    """

    turn_id: str
    trace_id: str
    session_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_string: str
    usage: Usage
    seed: int
    timing: Timing
    totals: RoundTotals
    rounds: tuple[RoundReport, ...]
    logprobs: tuple[TokenLogprob, ...]
    verifier_id: str
    drafter_id: str
    no_drafter_reason: str

    @property
    def accepted_length(self) -> float:
        """Tokens committed per round, the target's own token included; 0 without a round."""
        if self.totals.rounds == 0:
            return 0.0
        return (self.totals.accepted + self.totals.rounds) / self.totals.rounds

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked for."""

    name: str
    context_limit: int
    vocab_size: int
    has_chat_template: bool
    verifier_count: int
    drafter_count: int
    exact: bool
    has_response_format: bool = False


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A conversation as the gateway knows it; `create_time` is seconds since 1970 by the gateway's clock."""

    session_id: str
    model: str
    token_count: int
    turn_count: int
    busy: bool
    verifier_id: str
    drafter_id: str
    create_time: float


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn in the gateway's store of recent turns.

    finish_reason  empty while it runs, "failed" if it ended in an error
    """

    turn_id: str
    trace_id: str
    session_id: str
    model: str
    finish_reason: str
    stop_string: str
    usage: Usage
    timing: Timing
    totals: RoundTotals
    rounds: tuple[RoundReport, ...]
    create_time: float


@dataclass(frozen=True, slots=True)
class Drafter:
    """A drafter as a verifier sees it; state is connected, lost or refused, `message` says why."""

    drafter_id: str
    state: str
    message: str
    proposal_kind: str
    session_count: int
    round_trip_us: int
    turnaround_us: int
    drafted: int
    verified: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Worker:
    """A verifier as the gateway sees it; state is connecting, ready, draining or lost, `message` says what went wrong last.

    exact_reason    why it is not exact, empty if it is
    tokenizer_hash  sha256 of its tokenizer.json, hex; empty for a model without text
    """

    address: str
    state: str
    message: str
    turn_count: int
    verifier_id: str = ""
    model: str = ""
    exact: bool = False
    numerics: str = ""
    depth_policy: str = ""
    session_count: int = 0
    active_turn_count: int = 0
    queued_turn_count: int = 0
    step_us: int = 0
    drafters: tuple[Drafter, ...] = ()
    exact_reason: str = ""
    tokenizer_hash: str = ""


@dataclass(frozen=True, slots=True)
class WatchedRound:
    """A round of any turn, as it happened; `skipped` counts rounds that were dropped because this watcher was too slow."""

    turn_id: str
    session_id: str
    round: RoundReport
    skipped: int
