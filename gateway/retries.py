"""What to do when a verifier refuses a turn before it began: nothing was shown yet, so trying again is safe. Pure and bounded."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparkrelay.outcomes import Reason, Refusal

# A turn that was cancelled a moment ago may still hold its session at the verifier: wait for it, about a second in all.
_BUSY_PAUSES_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)


@dataclass(slots=True)
class Retries:
    """The attempts of one turn. excluded: addresses that failed it."""

    excluded: frozenset[str] = frozenset()
    _busy_count: int = 0
    _resent: bool = field(default=False)

    def pause_s(self, refusal: Refusal, address: str, *, keep_len: int) -> float | None:
        """Seconds to wait before the next attempt, None to give up. A turn is tried on two verifiers at most.

        After PREFIX_MISMATCH and SESSION_NOT_FOUND the caller must send everything (keep_len 0).
        """
        match refusal.reason:
            case Reason.PREFIX_MISMATCH | Reason.SESSION_NOT_FOUND if keep_len > 0 and not self._resent:
                self._resent = True
                return 0.0
            case Reason.SESSION_BUSY if self._busy_count < len(_BUSY_PAUSES_S):
                self._busy_count += 1
                return _BUSY_PAUSES_S[self._busy_count - 1]
            case Reason.VERIFIER_LOST | Reason.DRAINING | Reason.OVERLOADED if not self.excluded:
                self.excluded = frozenset({address})
                return 0.0
        return None
