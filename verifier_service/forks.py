"""Opening a session with another one's tokens."""

from __future__ import annotations

from sparkrelay.outcomes import Reason
from verifier_service.events import Event, ForkRefused, ForkSession, SessionForked
from verifier_service.sequence import Sequence
from verifier_service.sessions import Sessions


def fork_session(command: ForkSession, sessions: Sessions, retry_after_ms: int, events: list[Event]) -> None:
    """Obeys the command, or says why not. The source goes on as if nothing had happened, a turn under way included.

    The new session has the source's tokens, and its state as far as there is free room; what was not copied then may still
    be taken over when its first turn opens. It has no turn and no member.
    """
    source = sessions.get(command.session_id)
    names = command.session_id, command.new_session_id
    if source is None:
        message = "is not known here; open a new session and send the whole conversation"
        events.append(ForkRefused(*names, Reason.SESSION_NOT_FOUND, message, "session_id"))
    elif (fault := _fault_of(command, source, sessions)) is not None:
        reason, field, message = fault
        events.append(ForkRefused(*names, reason, message, field))
    elif not sessions.may_open(spared=source):
        message = "all other sessions have a turn under way, and no more can be opened; try again later"
        events.append(ForkRefused(*names, Reason.OVERLOADED, message, retry_after_ms=retry_after_ms))
    else:
        fork = sessions.fork(source, command.new_session_id, command.at_len, events)
        events.append(SessionForked(*names, fork.base_len, fork.state_len))


def _fault_of(command: ForkSession, source: Sequence, sessions: Sessions) -> tuple[Reason, str, str] | None:
    """Why these tokens cannot become a session of this id: the reason, the field at fault and what is wrong with it."""
    if sessions.get(command.new_session_id) is not None:
        return Reason.SESSION_EXISTS, "fork_session_id", "is the id of a session already; choose another"
    if not 0 < command.at_len <= source.base_len:
        message = (
            f"is {command.at_len}; the session has {source.base_len} tokens: send 1 to {source.base_len}"
        )
        return Reason.INVALID_FIELD, "token_count", message
    if command.at_hash is not None and not source.has_prefix(command.at_len, command.at_hash):
        message = (
            f"the session's first {command.at_len} tokens of {source.base_len} are others; "
            "open a new session and send the whole conversation"
        )
        return Reason.PREFIX_MISMATCH, "token_hash", message
    return None
