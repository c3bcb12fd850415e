"""Which sessions the engine remembers: as many as it may, forgetting the one that was idle longest."""

from __future__ import annotations

from collections.abc import ValuesView

from sparkrelay.outcomes import Reason
from verifier_service.events import Event
from verifier_service.members import Members
from verifier_service.sequence import Sequence
from verifier_service.state_memory import StateMemory


class Sessions:
    """session id |-> session, the longest unused first."""

    __slots__ = ("_by_id", "_limit", "_members", "_memory", "_opened_count")

    def __init__(self, limit: int, memory: StateMemory, members: Members) -> None:
        self._limit = limit
        self._memory = memory
        self._members = members
        self._by_id: dict[str, Sequence] = {}
        self._opened_count = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, session_id: str) -> Sequence | None:
        return self._by_id.get(session_id)

    def values(self) -> ValuesView[Sequence]:
        return self._by_id.values()

    def may_open(self, spared: Sequence | None = None) -> bool:
        """Whether one more can be opened: there is room, or one without a turn to forget that is not the spared one."""
        return len(self._by_id) < self._limit or self._longest_idle(spared) is not None

    def open(
        self, session_id: str, salt: bytes, events: list[Event], spared: Sequence | None = None
    ) -> Sequence:
        """A new session. It `may_open`."""
        assert session_id not in self._by_id
        if len(self._by_id) >= self._limit:
            idle = self._longest_idle(spared)
            assert idle is not None
            self.forget(idle, "the verifier has forgotten the session to make room", events)
        sequence = Sequence(session_id, self._opened_count, salt)
        self._opened_count += 1
        self._by_id[session_id] = sequence
        self._memory.open(sequence)
        return sequence

    def fork(self, source: Sequence, session_id: str, at_len: int, events: list[Event]) -> Sequence:
        """A new session with the first `at_len` tokens of another. It `may_open` with the source spared."""
        sequence = self.open(session_id, source.salt, events, source)
        sequence.token_ids = source.token_ids[:at_len]
        self._memory.fork(source, sequence)
        return sequence

    def touch(self, sequence: Sequence) -> None:
        """The session was used just now."""
        self._by_id[sequence.session_id] = self._by_id.pop(sequence.session_id)

    def forget(self, sequence: Sequence, message: str, events: list[Event]) -> None:
        """Ends a session without a turn: its membership, its tokens. Its state may serve others until it is evicted."""
        assert not sequence.busy
        self._members.remove_from(sequence, Reason.SESSION_ENDED, message, events)
        self._memory.close(sequence)
        del self._by_id[sequence.session_id]

    def check_integrity(self) -> None:
        assert len(self._by_id) <= self._limit
        assert len({sequence.sequence_id for sequence in self.values()}) == len(self._by_id)
        for session_id, sequence in self._by_id.items():
            assert sequence.session_id == session_id
            sequence.check_integrity()

    def _longest_idle(self, spared: Sequence | None = None) -> Sequence | None:
        return next((each for each in self._by_id.values() if not each.busy and each is not spared), None)
