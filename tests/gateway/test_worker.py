"""The gateway's connection to one verifier, apart from the calls that go through it."""

from __future__ import annotations

import asyncio

import pytest

from gateway.worker_pool.worker import Gone, VerifierWorker, WorkerHooks, WorkerTimes


async def test_a_cancel_that_is_lost_in_the_end_of_a_call_still_ends_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A verifier and its gateway told to end together: the cancel of the watch and the end of its call come at once."""
    connecting = asyncio.Event()

    async def connect_that_loses_a_cancel(_worker: VerifierWorker) -> None:
        connecting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise Gone("it ended its load reports") from None

    async def prepared(_description: object) -> None:
        return None

    monkeypatch.setattr(VerifierWorker, "_connect", connect_that_loses_a_cancel)
    hooks = WorkerHooks(prepare=prepared, lost=lambda _address, _epoch: None, changed=lambda: None)
    worker = VerifierWorker("127.0.0.1:1", WorkerTimes(1.0, 1.0, 0.01, 0.01), hooks)
    task = asyncio.create_task(worker.run())
    await connecting.wait()
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=10)
    task.cancel()
    await worker.close()
    assert done == {task}
