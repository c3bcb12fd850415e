"""Which tokens of a block are committed.

Two rules. Coupled acceptance (the product's): the target's own token at each position is fixed by its logits
and the noise of that position, and a draft token is accepted if it is that token; so the output is, token for
token, that of plain decoding. And the rejection rule of the speculative-sampling papers, which the DSpark
paper uses: accepted with probability min(1, target/draft), exact in distribution only. It serves comparison
and tests; nothing on the wire uses it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sparkrelay.device.filters import NothingAllowed
from sparkrelay.noise import FloatRow, NoCandidate
from sparkrelay.outcomes import Reason

Probabilities = npt.NDArray[np.float64]


class TokenChooser(Protocol):
    """The target's choice at the next position (`sparkrelay.device.choice.Chooser` is one)."""

    def choose(self, row: FloatRow, /) -> int:
        """The target's token after the sequence so far. Raises NoCandidate."""

    def append(self, token_id: int, /) -> None:
        """The sequence has grown by a committed token."""


@dataclass(frozen=True, slots=True)
class BlockVerdict:
    """What a round commits.

    accepted    draft tokens that were the target's own
    next_token  the one token the target adds: the correction of the first mismatch, or the bonus after a
                block accepted whole; None where an accepted stop id ended the turn, or `failure` says why
                there is none
    tokens      everything committed, in order: the accepted tokens, then next_token
    stopped     the last committed token is a stop id: the turn is over
    failure     why no token could be chosen after `tokens`, or None. The turn must end with it; plain
                decoding would fail there too.
    failure_reason  the same for programs
    """

    accepted: int
    next_token: int | None
    tokens: tuple[int, ...]
    stopped: bool
    failure: str | None = None
    failure_reason: Reason = Reason.INTERNAL


def verify_block(
    rows: npt.NDArray[np.float32],
    draft_ids: Sequence[int],
    chooser: TokenChooser,
    stop_ids: Collection[int],
) -> BlockVerdict:
    """Checks a block against the target's logits; without draft tokens, one step of plain decoding.

    rows       [1 + depth, vocab] float32: row 0 follows the anchor, row k follows draft token k
    draft_ids  [depth] the tokens checked
    chooser    stands at base_len; every committed token is appended to it, so afterwards it stands behind the
               last one
    stop_ids   the block is cut after the first of these; the stop id itself is committed

    A row is looked at only if all draft tokens before it were accepted.
    """
    if len(rows) != 1 + len(draft_ids):
        raise ValueError(f"rows: are {len(rows)}; {len(draft_ids)} draft tokens need {1 + len(draft_ids)}")
    tokens: list[int] = []
    for row, draft_id in zip(rows, [*draft_ids, None], strict=True):
        try:
            token_id = chooser.choose(row)
        except NoCandidate as error:
            reason = Reason.GRAMMAR_REFUSED if isinstance(error, NothingAllowed) else Reason.INTERNAL
            return BlockVerdict(len(tokens), None, tuple(tokens), False, str(error), reason)
        chooser.append(token_id)
        tokens.append(token_id)
        stopped = token_id in stop_ids
        if token_id != draft_id:
            return BlockVerdict(len(tokens) - 1, token_id, tuple(tokens), stopped)
        if stopped:
            break
    return BlockVerdict(len(tokens), None, tuple(tokens), stopped=True)


@dataclass(frozen=True, slots=True)
class RejectionVerdicts:
    """accepted: [N] int64, draft tokens kept. next_token: [N] int64, the correction or bonus after them."""

    accepted: npt.NDArray[np.int64]
    next_token: npt.NDArray[np.int64]


def rejection_verify(
    *,
    target_probs: Probabilities,
    draft_probs: Probabilities,
    draft_ids: npt.NDArray[np.int64],
    uniforms: Probabilities,
) -> RejectionVerdicts:
    """The rejection rule for N blocks of equal depth; a pure function of its arguments.

    target_probs  [N, depth + 1, vocab]  the target's distribution after the anchor and after each draft token
    draft_probs   [N, depth, vocab]      the distributions that the draft tokens were drawn from
    draft_ids     [N, depth]
    uniforms      [N, depth + 1]         in [0, 1), independent of everything else: one to accept each token,
                  the last for the draw

    Draft token x at a position is accepted with probability min(1, target(x) / draft(x)), up to the first
    that is not. The draw after it is from the residual max(target - draft, 0), normalised; after a block
    accepted whole, from the target itself. The committed tokens then follow the target's distribution, if the
    depth did not depend on the tokens drafted (the paper's Appendix A).
    """
    sample_count, depth = draft_ids.shape
    of_drafted = draft_ids[..., None]
    target_p = np.take_along_axis(target_probs[:, :depth], of_drafted, axis=-1)[..., 0]
    draft_p = np.take_along_axis(draft_probs, of_drafted, axis=-1)[..., 0]
    kept = uniforms[:, :depth] * draft_p < target_p
    accepted = np.logical_and.accumulate(kept, axis=1).sum(axis=1)
    samples = np.arange(sample_count)
    # Past the last draft token nothing was drafted: with a draft distribution of zero the residual is the
    # target's own.
    padded_draft = np.concatenate([draft_probs, np.zeros_like(target_probs[:, :1])], axis=1)
    last = target_probs[samples, accepted]
    of_next = residual(last, padded_draft[samples, accepted])
    return RejectionVerdicts(accepted, _draw(of_next, uniforms[:, depth]))


def residual(target_probs: Probabilities, draft_probs: Probabilities) -> Probabilities:
    """[N, vocab] what the target has beyond the draft, normalised; the target where rounding leaves nothing."""
    beyond = np.maximum(target_probs - draft_probs, 0.0)
    total = beyond.sum(axis=-1, keepdims=True)
    return np.where(total > 0.0, beyond / np.where(total > 0.0, total, 1.0), target_probs)


def _draw(probs: Probabilities, uniforms: Probabilities) -> npt.NDArray[np.int64]:
    """[N] one token of each distribution, by inversion: the first whose cumulated probability exceeds the goal."""
    cumulated = probs.cumsum(axis=-1)
    total = cumulated[:, -1]
    goals = np.minimum(uniforms * total, np.nextafter(total, 0.0))  # below the total, whatever the rounding
    tokens: npt.NDArray[np.int64] = (cumulated <= goals[:, None]).sum(axis=-1)
    return tokens
