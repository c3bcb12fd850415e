"""AdminService: what operators ask."""

from __future__ import annotations

from typing import Any

from gateway.servicer.answers import answering
from gateway.servicer.desk import FrontDesk
from gateway.worker_pool import VerifierWorker
from sparkrelay.v1 import admin_service_pb2 as admin_pb
from sparkrelay.v1 import admin_service_pb2_grpc as admin_grpc


class AdminServicer(admin_grpc.AdminServiceServicer):
    """Workers, and taking one out of use."""

    def __init__(self, desk: FrontDesk) -> None:
        self._desk = desk

    @answering
    async def ListWorkers(
        self, request: admin_pb.ListWorkersRequest, context: Any
    ) -> admin_pb.ListWorkersResponse:
        return admin_pb.ListWorkersResponse(workers=[worker_pb(worker) for worker in self._desk.pool.workers])

    @answering
    async def DrainWorker(
        self, request: admin_pb.DrainWorkerRequest, context: Any
    ) -> admin_pb.DrainWorkerResponse:
        worker = self._desk.pool.worker(request.address)
        worker.drain()
        return admin_pb.DrainWorkerResponse(worker=worker_pb(worker))


def worker_pb(worker: VerifierWorker) -> admin_pb.Worker:
    return admin_pb.Worker(
        address=worker.address,
        state=admin_pb.Worker.State.ValueType(worker.state),
        message=worker.message,
        description=worker.description,
        load=worker.load,
        turn_count=worker.turn_count,
    )
