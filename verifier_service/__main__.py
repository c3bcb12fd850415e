"""`python -m verifier_service`: settings, model, engine on its thread, service."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import grpc.aio
import structlog

from sparkrelay.device.kv_layout import UnsupportedModel
from sparkrelay.device.thread import DeviceThread
from sparkrelay.host.cores import explain, plan_threads, read_cores
from sparkrelay.host.memory import FreeMemory, free_memory
from sparkrelay.interpreter import spare_rounds
from sparkrelay.server import Lifecycle, run_service
from sparkrelay.settings import load
from sparkrelay.store import StoreError, resolve
from sparkrelay.telemetry import configure_logging
from sparkrelay.v1 import verifier_service_pb2, verifier_service_pb2_grpc
from verifier_service.depth_policies import parse_depth_policy
from verifier_service.engine import Engine, EngineSettings
from verifier_service.events import Command, Event
from verifier_service.grammar_compiler import STACK_BYTES
from verifier_service.memory_plan import plan_state, require_room_for_weights
from verifier_service.models import ModelInfo, TargetModel
from verifier_service.models.toy import toy_model
from verifier_service.servicer import VerifierIdentity, VerifierServicer
from verifier_service.servicer.formats import Formats
from verifier_service.servicer.trials import TriedCompiler
from verifier_service.settings import VerifierSettings

log = structlog.get_logger(__name__)

TOKENIZER_FILE = "tokenizer.json"
NO_CONTEXT = "none"
THREAD_STOP_S = 2.0


def main(argv: Sequence[str]) -> int:
    settings = load(VerifierSettings, argv, prog="python -m verifier_service")
    configure_logging(settings.log_level, settings.log_format, "verifier")
    cores = read_cores()
    threads = plan_threads(cores.compute_count)
    for name, value in threads.environment.items():
        os.environ.setdefault(name, value)  # read when torch is imported, which is later
    log.info("threads", used=settings.threads or threads.verifier, planned=explain(cores, threads))
    threading.stack_size(STACK_BYTES)
    return asyncio.run(_serve(settings.model_copy(update={"threads": settings.threads or threads.verifier})))


async def _serve(settings: VerifierSettings) -> int:
    """Loads the model on the device thread, serves until told to end, and returns the exit code."""
    lifecycle = Lifecycle()
    device = _Device(settings, lifecycle)
    try:
        engine, model = await device.started()
        compiler = await asyncio.to_thread(load_compiler, settings, model.info)
    except (StoreError, UnsupportedModel, ValueError, OSError) as error:
        log.error("cannot start", name="verifier", reason=str(error))
        return 1
    info = served_info(model.info, settings.context_limit)
    identity = VerifierIdentity(
        settings.verifier_id or f"{socket.gethostname()}-{settings.listen.rpartition(':')[2]}",
        secrets.token_hex(8),
        info,
        settings.depth_policy,
    )
    servicer = VerifierServicer(
        identity,
        post=device.thread.post_all,
        load=engine.load,
        crashed=device.crashed,
        now_s=time.monotonic,
        formats=Formats(compiler.compile if compiler is not None else None),
    )
    device.servicer = servicer
    spare_rounds()
    log.info(
        "target loaded",
        model=info.model_id,
        dtype=info.dtype,
        exact=info.exact,
        exact_reason=info.exact_reason,
        numerics=info.numerics,
        context_hash=info.context.hash if info.context is not None else "",
        depth_policy=settings.depth_policy,
        context_limit=info.context_limit,
        block_count=engine.load().block_count,
        block_tokens=info.block_tokens,
        response_format=compiler is not None,
        verifier_id=identity.verifier_id,
        epoch=identity.epoch,
    )

    def add_services(server: grpc.aio.Server) -> None:
        verifier_service_pb2_grpc.add_VerifierServiceServicer_to_server(servicer, server)
        lifecycle.set_ready()

    warming = asyncio.create_task(compiler.warm()) if compiler is not None else None
    code = await run_service(
        name="verifier",
        settings=settings,
        lifecycle=lifecycle,
        add_services=add_services,
        reflection_names=[verifier_service_pb2.DESCRIPTOR.services_by_name["VerifierService"].full_name],
        on_drain=servicer.drain,
    )
    device.thread.stop(THREAD_STOP_S)
    if compiler is not None and warming is not None:
        await warming
        await compiler.close()
    return code


class _Device:
    """The engine on its thread, from the loading of the model to a crash."""

    def __init__(self, settings: VerifierSettings, lifecycle: Lifecycle) -> None:
        self.servicer: VerifierServicer | None = None
        self._settings = settings
        self._lifecycle = lifecycle
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[tuple[Engine, TargetModel]] = self._loop.create_future()
        self.thread: DeviceThread[Command, Event] = DeviceThread(
            self._make_engine, self._deliver, self.crashed, lambda: time.monotonic_ns() // 1000, name="engine"
        )

    async def started(self) -> tuple[Engine, TargetModel]:
        """Raises what the loading raised."""
        self.thread.start()
        return await self._ready

    def crashed(self, crash: BaseException) -> None:
        """The engine is gone: before it was ready this is the reason not to start, afterwards the reason to end. Any thread."""
        self._loop.call_soon_threadsafe(self._report, crash)

    def _report(self, crash: BaseException) -> None:
        if not self._ready.done():
            self._ready.set_exception(crash)
            return
        log.error("the engine crashed", exc_info=crash)
        message = f"the engine crashed: {type(crash).__name__}: {crash}"
        if self.servicer is not None:
            self.servicer.fail(message)
        self._lifecycle.fail(message)

    def _make_engine(self) -> Engine:
        settings = self._settings
        model = load_model(settings, free_memory)
        state = plan_state(
            served_info(model.info, settings.context_limit),
            free_memory(),
            state_memory_mib=settings.state_memory_mib,
            memory_margin_mib=settings.memory_margin_mib,
        )
        log.info("state memory", **state.facts())
        engine = Engine(
            model,
            EngineSettings(
                block_count=state.block_count,
                step_token_budget=settings.step_token_budget,
                block_wait_us=settings.block_wait_ms * 1000,
                max_sessions=settings.max_sessions,
                max_queued_turns=settings.max_queued_turns,
                context_limit=settings.context_limit,
                leftover_percent=settings.leftover_percent,
            ),
            parse_depth_policy(settings.depth_policy),
            lambda: time.monotonic_ns() // 1000,
        )
        self._loop.call_soon_threadsafe(self._ready.set_result, (engine, model))
        return engine

    def _deliver(self, events: Sequence[Event]) -> None:
        assert self.servicer is not None, "no command was posted before there was a servicer"
        self.servicer.deliver(events)


def served_info(info: ModelInfo, context_limit: int) -> ModelInfo:
    """What callers are told of the model: a session's limit is the setting's where that is the smaller one."""
    return replace(info, context_limit=min(context_limit or info.context_limit, info.context_limit))


def load_model(settings: VerifierSettings, free: Callable[[], FreeMemory]) -> TargetModel:
    """The target of the settings. Raises StoreError, UnsupportedModel or ValueError, each with the next step.

    free  asks what memory is free, when it is to be known
    """
    has_context = settings.context != NO_CONTEXT
    if settings.model.partition(":")[0] == "toy":
        if has_context:
            raise ValueError(
                f"context: is {settings.context!r}; a toy makes no rows from a draft: leave it at none"
            )
        return toy_model(settings.model)
    files = resolve(settings.model)
    require_room_for_weights(files.path, settings.dtype, free())
    context = resolve(settings.context).path if has_context else None
    return _load_huggingface(settings, files.name, files.path, context)


def load_compiler(settings: VerifierSettings, info: ModelInfo) -> TriedCompiler | None:
    """What compiles response formats for the target of the settings; None where the target has no text, or none that can be
    read. Raises StoreError or OSError."""
    if not info.tokenizer_hash:
        return None
    file = resolve(settings.model).path / TOKENIZER_FILE
    try:
        return TriedCompiler.load(file, info.vocab_size, info.default_stop_ids)
    except ValueError as error:
        log.warning("no response formats", file=str(file), reason=str(error))
        return None


def _load_huggingface(settings: VerifierSettings, name: str, path: Path, context: Path | None) -> TargetModel:
    import torch

    from verifier_service.models.huggingface import HuggingFaceModel

    torch.set_num_threads(settings.threads)
    return HuggingFaceModel.load(
        path, model_id=name, dtype=settings.dtype, exact=settings.exact, context=context
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
