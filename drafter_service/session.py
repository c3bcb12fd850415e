"""One session as its drafter knows it: the ids themselves, the rules of the turn, and whether a block is wanted. No I/O.

What both sides agree on (how long the session is, which ids are still on their way, which block is in flight) stands in
`sparkrelay.protocol.Membership`; this adds what only a drafter needs. Two streams tell about a session:

    Speculate    Rewound, TurnStarted, Verdict, TurnEnded, in the order in which they happened
    FeedContext  the ids that the drafter lacks, by position

A TurnStarted whose base_len is beyond the ids here opens a gap that the feed fills; what verdicts commit meanwhile waits behind
it. A block is wanted when every committed id of a running turn is here, none is in flight, and the verifier has asked for tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drafter_service.context_rows import ContextRows
from drafter_service.models import DraftedBlock, DraftRequest, TurnRules
from sparkrelay.frames import Block, Context, TurnStarted, Verdict
from sparkrelay.protocol import Membership, match_block
from sparkrelay.sampling import InvalidField

MAX_SESSION_TOKENS = 2**20
"""A session that claims to be longer is refused: an index or a cache of it would cost more than drafting can gain."""

_ANY_ID = 2**31


class SessionViolation(Exception):
    """The verifier said something about this session that cannot be used. Ends the membership, nothing else."""


@dataclass(slots=True)
class _Turn:
    """A running turn.

    end_len  the most ids that the session can have when it ends
    budget   draft tokens wanted now
    """

    rules: TurnRules
    end_len: int
    budget: int
    traceparent: bytes
    round: int = 0


class DraftSession:
    """See the module.

    key         names the session towards the draft model
    ids         committed ids that are here, without gaps; for others to read
    block_size  the most draft tokens of a block
    vocab_size  ids at or above it are refused; 0 allows any
    row_width   elements of a context row; 0 if the draft model reads none
    """

    __slots__ = (
        "_beyond",
        "_block_size",
        "_cut_count",
        "_membership",
        "_turn",
        "_vocab_size",
        "ids",
        "key",
        "rows",
    )

    def __init__(self, key: int, block_size: int, vocab_size: int = 0, row_width: int = 0) -> None:
        self.key = key
        self.ids: list[int] = []
        self.rows = ContextRows(row_width) if row_width else None
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._cut_count = 0
        self._membership: Membership | None = None
        self._turn: _Turn | None = None
        self._beyond: deque[tuple[int, Sequence[int]]] = (
            deque()
        )  # (start, ids) committed behind a gap, by position

    @property
    def held_len(self) -> int:
        """Ids that need not be brought again. Of a model that reads rows: those whose rows are here."""
        return len(self.ids) if self.rows is None else min(len(self.ids), self.rows.known_len)

    @property
    def row_bytes(self) -> int:
        """Memory of its context rows."""
        return 0 if self.rows is None else self.rows.byte_count

    # ---- events ----------------------------------------------------------------------------------------------------------

    def joined(self, membership: Membership, keep_tokens: int) -> None:
        """A membership begins: the first `keep_tokens` ids are the verifier's too, the others are forgotten."""
        if not 0 <= keep_tokens <= len(self.ids):
            raise SessionViolation(f"joined: keep_tokens is {keep_tokens}; {len(self.ids)} are held")
        self._membership = membership
        self.rewound(keep_tokens)

    def left(self) -> None:
        """The membership is over. The ids that are here stay, so that a later one need not bring them again."""
        self._membership = None
        self._turn = None
        self._beyond.clear()

    def rewound(self, length: int) -> None:
        """The session was cut. Never while ids are on their way."""
        if self.rows is not None:
            self.rows.truncate(length)
        if length < len(self.ids):
            del self.ids[length:]
            self._cut_count += 1

    def turn_started(self, frame: TurnStarted) -> None:
        """A turn runs."""
        if frame.base_len > MAX_SESSION_TOKENS:
            raise SessionViolation(
                f"turn_started: base_len is {frame.base_len}; at most {MAX_SESSION_TOKENS} are drafted for"
            )
        if not 0 <= frame.output_start <= frame.base_len:
            raise SessionViolation(
                f"turn_started: output_start is {frame.output_start}, base_len {frame.base_len}"
            )
        self._check_rules(frame)
        rules = TurnRules(
            frame.turn_id,
            frame.sampling,
            frame.output_start,
            frozenset(frame.stop_token_ids),
            frame.noise_version,
        )
        end_len = frame.base_len + frame.remaining_count
        self._turn = _Turn(rules, end_len, frame.draft_budget, frame.traceparent)

    def context(self, frame: Context) -> None:
        """Ids from the feed, in order of position; then what was committed right behind them."""
        self._check_ids("context", frame.token_ids)
        if frame.rows is not None:
            self._take_rows("context", frame.rows_start, frame.rows, frame.start + len(frame.token_ids))
        self.ids += frame.token_ids
        while self._beyond and self._beyond[0][0] == len(self.ids):
            self.ids += self._beyond.popleft()[1]

    def committed(self, verdict: Verdict, token_ids: Sequence[int]) -> None:
        """A verdict and the ids that it commits from its base_len on."""
        turn = self._turn
        assert turn is not None, "the protocol lets no verdict pass without a turn"
        id_limit = self._vocab_size or _ANY_ID
        if token_ids[-1] >= id_limit:  # the others were drafted here
            raise SessionViolation(
                f"verdict: next_token_id is {token_ids[-1]}; the vocabulary has {id_limit} ids"
            )
        if verdict.rows is not None:
            self._take_rows(
                "verdict", verdict.base_len - 1, verdict.rows, verdict.base_len + verdict.accepted_count
            )
        if verdict.base_len == len(self.ids):
            self.ids += token_ids
        elif verdict.base_len < MAX_SESSION_TOKENS:
            self._beyond.append((verdict.base_len, token_ids))
        else:
            raise SessionViolation(f"verdict: the session passes {MAX_SESSION_TOKENS} tokens")
        turn.budget = verdict.draft_budget
        turn.round = verdict.round + 1

    def turn_ended(self) -> None:
        """The turn is over."""
        self._turn = None

    # ---- question and answer -----------------------------------------------------------------------------------------------

    @property
    def wants_block(self) -> bool:
        """Whether a block for the ids that are here would be of use. The last token of a turn is the target's own."""
        turn, membership = self._turn, self._membership
        return (
            turn is not None
            and membership is not None
            and membership.block is None
            and not membership.owed
            and turn.budget > 0
            and turn.end_len - len(self.ids) > 1
        )

    def request(self) -> DraftRequest:
        """What to ask the model; only while `wants_block`."""
        turn, ids = self._turn, self.ids
        assert turn is not None, "only a running turn wants a block"
        limit = min(turn.budget, self._block_size, turn.end_len - len(ids) - 1)
        return DraftRequest(self.key, ids, self._cut_count, limit, turn.rules, self.rows)

    def block_ready(
        self, base_len: int, rules: TurnRules, drafted: DraftedBlock, draft_us: int = 0, queue_us: int = 0
    ) -> Block | None:
        """The frame entry of a block drafted for the first `base_len` ids under `rules`; None if it is of no use any more.

        The session may have gone on since: what was committed meanwhile is trimmed off the block, if it agrees with it.
        An empty block goes out too, while it is of the present: then the verifier need not wait for one.
        """
        turn, membership = self._turn, self._membership
        if (
            turn is None
            or turn.rules is not rules
            or membership is None
            or membership.block is not None
            or membership.owed
        ):
            return None
        token_ids = tuple(drafted.token_ids)
        confidences = confidence_bytes(drafted.confidences)
        assert len(confidences) == len(token_ids) <= self._block_size, (
            "a draft model keeps to its limit, a confidence a token"
        )
        if base_len != len(self.ids):
            offset = match_block(base_len, token_ids, self.ids)
            if offset is None:
                return None
            base_len += offset
            token_ids, confidences = token_ids[offset:], confidences[offset:]
        return Block(
            membership.handle,
            turn.round,
            base_len,
            token_ids,
            confidences,
            draft_us,
            queue_us,
            0,
            turn.traceparent,
        )

    # ---- inside ------------------------------------------------------------------------------------------------------------

    def _check_rules(self, frame: TurnStarted) -> None:
        """A model copies the target's choice with these values, so they must not break it."""
        self._check_ids("turn_started.stop_token_ids", frame.stop_token_ids)
        try:
            frame.sampling.check(self._vocab_size or _ANY_ID)
        except InvalidField as error:
            raise SessionViolation(f"turn_started.sampling.{error}") from None

    def _take_rows(self, field: str, start: int, rows: Any, end: int) -> None:
        """Context rows [count, width] of positions start ..., none of them at or behind `end`."""
        if self.rows is None:
            return  # this model reads none
        if rows.ndim != 2 or rows.shape[1] != self.rows.width or rows.dtype.itemsize != 2:
            raise SessionViolation(
                f"{field}.rows: is {rows.dtype}{list(rows.shape)}; [count, {self.rows.width}] bfloat16 is needed"
            )
        if not 0 <= start <= start + len(rows) <= min(end, MAX_SESSION_TOKENS):
            raise SessionViolation(
                f"{field}.rows: {len(rows)} from {start} on reach beyond position {end - 1}"
            )
        self.rows.put(start, rows)

    def _check_ids(self, field: str, token_ids: Sequence[int]) -> None:
        id_limit = self._vocab_size or _ANY_ID
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < id_limit:
            raise SessionViolation(f"{field}: has ids outside of 0 to {id_limit - 1}")


def confidence_bytes(confidences: Sequence[float]) -> bytes:
    """Confidences as the wire carries them, in 1/255; NaN counts as 0, the rest is clamped to 0..1."""
    return bytes([int(c * 255.0 + 0.5) if 0.0 < c < 1.0 else 255 * (c >= 1.0) for c in confidences])
