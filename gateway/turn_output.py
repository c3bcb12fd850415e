"""One turn's output: from the verifier's commits to what the client is shown, and the sums over it. Pure.

Tokens are shown as soon as their text is sure not to belong to a stop string; text may lag behind them by half a character.
Ids that end the turn are never shown. After a stop string the rest of what was committed is discarded, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.detokenizer import Detokenizer
from gateway.stop_strings import StopMatch, StopStrings
from sparkrelay.outcomes import FinishReason


class RoundCounts(Protocol):
    """What is read here of a round report; the reports themselves are handed through as they came."""

    @property
    def drafted_count(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def accepted_count(self) -> int: ...


@dataclass(slots=True)
class RoundTotals:
    """Sums over the rounds of a turn; draft tokens at hand, of these checked, of these accepted."""

    round_count: int = 0
    drafted_count: int = 0
    verified_count: int = 0
    accepted_count: int = 0

    def add(self, report: RoundCounts) -> None:
        self.round_count += 1
        self.drafted_count += report.drafted_count
        self.verified_count += report.depth
        self.accepted_count += report.accepted_count


@dataclass(frozen=True, slots=True)
class Usage:
    """What a turn cost, in tokens; see generation.proto."""

    prompt_token_count: int = 0
    cached_token_count: int = 0
    output_token_count: int = 0
    discarded_token_count: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """From the request's arrival to the first token and to the end; queue_us from handing over to acceptance."""

    first_token_us: int = 0
    total_us: int = 0
    queue_us: int = 0


@dataclass(frozen=True, slots=True)
class TurnSummary:
    """How a turn ended. finish_reason UNSPECIFIED: it failed."""

    finish_reason: FinishReason
    stop_string: str
    usage: Usage
    timing: Timing
    totals: RoundTotals


@dataclass(frozen=True, slots=True)
class Delta:
    """What may be shown since the last one. `logprobs` has an entry a token, or none at all.

    index       of its first token in the turn's output
    text_index  of its first character in the turn's text
    text_ends   for each token, how many characters of the turn's text there are once its own are known: a character
                belongs to the token that completes it
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[Any, ...]
    rounds: tuple[RoundCounts, ...]
    text_index: int
    text_ends: tuple[int, ...]


class TurnOutput:
    """Takes commits in order, gives deltas.

    hidden_ids    ids that end the turn
    detokenizer   None for a model without text: then there are no stop strings either
    include_rounds  False: deltas carry none, the totals still count them
    """

    def __init__(
        self,
        *,
        hidden_ids: frozenset[int],
        detokenizer: Detokenizer | None,
        stop_strings: Sequence[str],
        include_rounds: bool,
    ) -> None:
        assert detokenizer is not None or not stop_strings, "stop strings need text"
        self.totals = RoundTotals()
        self.committed_count = 0
        self.shown_count = 0
        self._hidden_ids = hidden_ids
        self._hidden_count = 0
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop_strings) if stop_strings else None
        self._include_rounds = include_rounds
        self._text_len = 0  # characters that the detokeniser has given
        self._shown_text_len = 0
        self._text: list[str] = []  # may be shown
        self._rounds: list[RoundCounts] = []
        self._waiting: list[tuple[int, Any, int]] = []  # (id, logprob, length of the text that it is part of)
        self._unplaced: list[tuple[int, Any]] = []  # the same, while that length is not known

    @property
    def match(self) -> StopMatch | None:
        """The stop string that ended the turn."""
        return self._stops.match if self._stops else None

    @property
    def discarded_count(self) -> int:
        """Tokens that were committed and will never be shown, a stop id not included. Final after the last delta."""
        return self.committed_count - self.shown_count - self._hidden_count

    def add(self, token_ids: Sequence[int], logprobs: Sequence[Any], report: RoundCounts | None) -> None:
        """Takes in one commit. `logprobs` is empty or has an entry a token."""
        assert not logprobs or len(logprobs) == len(token_ids), "one log-probability a token"
        self.committed_count += len(token_ids)
        if report is not None:
            self.totals.add(report)
            if self._include_rounds:
                self._rounds.append(report)
        for index, token_id in enumerate(token_ids):
            if token_id in self._hidden_ids:
                self._hidden_count += 1
            elif self.match is None:
                self._add_token(token_id, logprobs[index] if logprobs else None)

    def take(self, *, final: bool = False) -> Delta | None:
        """What may be shown since the last call, None if nothing; `final` also gives what was held back."""
        if final and self.match is None:
            self._add_text(self._detokenizer.finish() if self._detokenizer else "")
            self._place_tokens()
            if self._stops and self.match is None:
                self._text.append(self._stops.finish())
        tokens = self._sure_tokens()
        delta = Delta(
            index=self.shown_count,
            token_ids=tuple(token_id for token_id, _, _ in tokens),
            text="".join(self._text),
            logprobs=tuple(logprob for _, logprob, _ in tokens if logprob is not None),
            rounds=tuple(self._rounds),
            text_index=self._shown_text_len,
            text_ends=tuple(text_end for _, _, text_end in tokens),
        )
        self.shown_count += len(tokens)
        self._shown_text_len += len(delta.text)
        self._text.clear()
        self._rounds.clear()
        return delta if delta.token_ids or delta.text or delta.rounds else None

    def _add_token(self, token_id: int, logprob: Any) -> None:
        self._unplaced.append((token_id, logprob))
        if self._detokenizer is None:
            self._place_tokens()
            return
        self._add_text(self._detokenizer.add(token_id))
        if not self._detokenizer.pending or self._stops is None:
            self._place_tokens()

    def _add_text(self, text: str) -> None:
        self._text_len += len(text)
        self._text.append(self._stops.feed(text) if self._stops else text)

    def _place_tokens(self) -> None:
        """All text of the unplaced tokens is known: a token counts as shown when all of this text is."""
        self._waiting += [(token_id, logprob, self._text_len) for token_id, logprob in self._unplaced]
        self._unplaced.clear()

    def _sure_tokens(self) -> list[tuple[int, Any, int]]:
        if self._stops is None:
            sure, self._waiting = self._waiting, []
            return sure
        count = 0
        while count < len(self._waiting) and self._waiting[count][2] <= self._stops.safe_len:
            count += 1
        sure = self._waiting[:count]
        del self._waiting[:count]
        return sure
