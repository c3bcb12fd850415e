"""Which verifier runs a turn, and which drafter it should ask. One pure function over what is known; the caller does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from gateway.sessions import Binding
from sparkrelay.outcomes import Reason, Refusal

MAX_ALTERNATES = 2

# A session goes back to its last drafter, whose cache is warm, unless that one has so many more sessions than the least loaded.
WARM_DRAFTER_EXTRA_SESSIONS = 4


class WorkerState(IntEnum):
    """Where the gateway stands with a verifier; the numbers are those of admin_service.proto."""

    UNSPECIFIED = 0
    CONNECTING = 1
    READY = 2
    DRAINING = 3
    LOST = 4


@dataclass(frozen=True, slots=True)
class DrafterView:
    """A drafter of one verifier. session_count includes turns that this gateway has just placed."""

    drafter_id: str
    connected: bool
    session_count: int = 0
    turnaround_us: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A verifier.

    leaving     it said itself that it takes no more turns; DRAINING without it is an operator's wish and spares its sessions
    turn_count  turns under way there, those just placed included
    """

    address: str
    state: WorkerState
    model: str = ""
    verifier_id: str = ""
    epoch: str = ""
    leaving: bool = False
    turn_count: int = 0
    drafters: tuple[DrafterView, ...] = ()
    message: str = ""

    @property
    def binding(self) -> Binding:
        return Binding(self.address, self.verifier_id, self.epoch)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a turn goes. drafter_ids: the one to ask, then alternates; if empty, no_drafter_reason says why, for people."""

    binding: Binding
    drafter_ids: tuple[str, ...]
    no_drafter_reason: str


def place(
    workers: Sequence[WorkerView],
    model: str,
    *,
    pinned: Binding | None = None,
    warm_drafter_id: str = "",
    wants_drafter: bool = True,
    excluded: frozenset[str] = frozenset(),
) -> Placement:
    """Places one turn. Raises Refusal if no verifier can take it.

    pinned    the incarnation that holds the session's state: it is used as long as it lives
    excluded  addresses that have just failed this turn
    """
    hosts = [worker for worker in workers if worker.model == model and worker.address not in excluded]
    worker = _pinned(hosts, pinned) or _least_loaded(hosts)
    if worker is None:
        raise Refusal(Reason.NO_VERIFIER, _why_none(workers, model))
    if not wants_drafter:
        return Placement(worker.binding, (), "the turn asked for plain decoding")
    drafter_ids = choose_drafters(worker.drafters, warm_drafter_id)
    return Placement(worker.binding, drafter_ids, "" if drafter_ids else _why_no_drafter(worker))


def choose_drafters(drafters: Sequence[DrafterView], warm_drafter_id: str = "") -> tuple[str, ...]:
    """The drafter to ask and up to two alternates: the least loaded first, but a warm one before it if it is not overloaded."""
    by_load = sorted(
        (drafter for drafter in drafters if drafter.connected),
        key=lambda drafter: (drafter.session_count, drafter.turnaround_us, drafter.drafter_id),
    )
    for drafter in by_load:
        extra = drafter.session_count - by_load[0].session_count
        if drafter.drafter_id == warm_drafter_id and extra <= WARM_DRAFTER_EXTRA_SESSIONS:
            by_load.remove(drafter)
            by_load.insert(0, drafter)
            break
    return tuple(drafter.drafter_id for drafter in by_load[: 1 + MAX_ALTERNATES])


def _pinned(hosts: Sequence[WorkerView], pinned: Binding | None) -> WorkerView | None:
    for worker in hosts:
        if (
            worker.binding == pinned
            and not worker.leaving
            and worker.state in (WorkerState.READY, WorkerState.DRAINING)
        ):
            return worker
    return None


def _least_loaded(hosts: Sequence[WorkerView]) -> WorkerView | None:
    ready = [worker for worker in hosts if worker.state is WorkerState.READY and not worker.leaving]
    return min(ready, key=lambda worker: (worker.turn_count, worker.address), default=None)


def _why_none(workers: Sequence[WorkerView], model: str) -> str:
    states = ", ".join(
        f"{worker.address} {worker.state.name.lower()}" + (f" ({worker.message})" if worker.message else "")
        for worker in workers
    )
    return f"No verifier can take a turn of {model!r} now: {states or 'none is known'}. Try again, or see ListWorkers."


def _why_no_drafter(worker: WorkerView) -> str:
    if not worker.drafters:
        return f"no drafter is connected to {worker.verifier_id or worker.address}"
    return "; ".join(
        f"drafter {drafter.drafter_id} is away" + (f": {drafter.message}" if drafter.message else "")
        for drafter in worker.drafters
    )
