"""All verifiers of a gateway, and the models they host."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gateway.placement import WorkerState, WorkerView
from gateway.validation import invalid
from gateway.worker_pool.call import Event, TurnCommand, VerifierCall
from gateway.worker_pool.worker import Description, Load, VerifierWorker, WorkerHooks, WorkerTimes
from sparkrelay.outcomes import Refusal
from sparkrelay.security import PLAINTEXT, Dialling

__all__ = [
    "Description",
    "Event",
    "Load",
    "TurnCommand",
    "VerifierCall",
    "VerifierWorker",
    "WorkerHooks",
    "WorkerPool",
    "WorkerTimes",
]


class WorkerPool:
    """One worker for each address. `start` needs a running event loop; `close` ends everything that was started."""

    def __init__(
        self,
        addresses: Sequence[str],
        times: WorkerTimes,
        hooks: WorkerHooks,
        dialling: Dialling = PLAINTEXT,
    ) -> None:
        self._workers = {
            address: VerifierWorker(address, times, hooks, dialling) for address in sorted(addresses)
        }
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def workers(self) -> tuple[VerifierWorker, ...]:
        """In order of address."""
        return tuple(self._workers.values())

    @property
    def views(self) -> tuple[WorkerView, ...]:
        """What placement looks at, in order of address."""
        return tuple(worker.view for worker in self._workers.values())

    @property
    def ready(self) -> bool:
        """True if any verifier takes turns."""
        return any(worker.state is WorkerState.READY for worker in self.workers)

    def worker(self, address: str) -> VerifierWorker:
        """Raises Refusal if there is none of this address."""
        if address not in self._workers:
            known = ", ".join(self._workers)
            raise invalid("address", f"is {address!r}; send one of ListWorkers: the workers are {known}")
        return self._workers[address]

    def descriptions(self) -> dict[str, list[Description]]:
        """What the verifiers that are there said they are, by model; models in order of name."""
        by_model: dict[str, list[Description]] = {}
        for worker in self.workers:
            if worker.description is not None and worker.state in (WorkerState.READY, WorkerState.DRAINING):
                by_model.setdefault(worker.description.model_id, []).append(worker.description)
        return dict(sorted(by_model.items()))

    def end_calls(self, refusal: Refusal) -> None:
        """Ends all turns under way for one reason."""
        for worker in self.workers:
            worker.end_calls(refusal)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(worker.run(), name=worker.address) for worker in self.workers]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers:
            await worker.close()
