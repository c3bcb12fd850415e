"""One verifier as the gateway knows it: dialled, described, watched, lost, dialled again."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog

from gateway.placement import DrafterView, WorkerState, WorkerView
from gateway.worker_pool.call import TurnCommand, VerifierCall, failure_of, lost
from sparkrelay.outcomes import Refusal
from sparkrelay.protocol import chain_hash
from sparkrelay.security import PLAINTEXT, Dialling, explain_handshake
from sparkrelay.server import CHANNEL_OPTIONS
from sparkrelay.v1 import verifier_service_pb2 as verifier_pb
from sparkrelay.v1 import verifier_service_pb2_grpc as verifier_grpc

log = structlog.get_logger(__name__)

Description = verifier_pb.VerifierServiceDescribeResponse
Load = verifier_pb.VerifierServiceWatchLoadResponse

END_SESSION_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class WorkerTimes:
    """Seconds: for the first answer, without a load report, and between attempts to come back (doubled each time)."""

    connect_s: float
    silence_s: float
    backoff_min_s: float
    backoff_max_s: float


@dataclass(frozen=True, slots=True)
class WorkerHooks:
    """What others do when a worker changes.

    prepare  awaited with a new description before the worker takes turns
    lost     an incarnation (address, epoch) is gone, with all that it held
    changed  its state is another one
    """

    prepare: Callable[[Description], Awaitable[None]]
    lost: Callable[[str, str], None]
    changed: Callable[[], None]


class Gone(Exception):
    """The connection to the verifier is of no use any more; silent: nobody told us, its calls hang."""

    def __init__(self, message: str, *, silent: bool = False) -> None:
        super().__init__(message)
        self.silent = silent


class VerifierWorker:
    """A verifier at one address. `run` keeps the connection for as long as it is not cancelled."""

    def __init__(
        self, address: str, times: WorkerTimes, hooks: WorkerHooks, dialling: Dialling = PLAINTEXT
    ) -> None:
        self.address = address
        self.state = WorkerState.CONNECTING
        self.message = ""
        self.description: Description | None = None
        self.load: Load | None = None
        self.turn_count = 0
        self._asked_drafters: Counter[str] = Counter()
        self._drained = False
        self._times = times
        self._hooks = hooks
        self._calls: set[VerifierCall] = set()
        backoff = (
            ("grpc.initial_reconnect_backoff_ms", round(times.backoff_min_s * 1000)),
            ("grpc.min_reconnect_backoff_ms", round(times.connect_s * 1000)),
            ("grpc.max_reconnect_backoff_ms", round(times.backoff_max_s * 1000)),
        )
        self._dialling = dialling
        self._channel = dialling.channel(address, CHANNEL_OPTIONS + backoff)
        self._stub = verifier_grpc.VerifierServiceStub(self._channel)

    @property
    def view(self) -> WorkerView:
        """What placement looks at."""
        description, load = self.description, self.load
        reported = load.active_turn_count + load.queued_turn_count if load else 0
        return WorkerView(
            address=self.address,
            state=self.state,
            model=description.model_id if description else "",
            verifier_id=description.verifier_id if description else "",
            epoch=description.epoch if description else "",
            leaving=load.draining if load else False,
            turn_count=max(self.turn_count, reported),
            drafters=tuple(self._drafter_view(drafter) for drafter in load.drafters) if load else (),
            message=self.message,
        )

    async def run(self) -> None:
        """Connects, watches, and connects again, until it is cancelled."""
        pause_s = self._times.backoff_min_s
        task = asyncio.current_task()
        # Asked, not only caught: a cancel that comes together with the end of a call is lost in it.
        while task is None or not task.cancelling():
            try:
                await self._connect()
                pause_s = self._times.backoff_min_s
                await self._watch_load()
            except Gone as gone:
                self._take_loss(gone)
            except Exception as error:  # a bug must not end the only task that can bring the worker back
                log.exception("watching a verifier failed", address=self.address)
                self._take_loss(Gone(f"a bug of the gateway: {error}"))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._times.backoff_max_s)

    def drain(self) -> None:
        """No new sessions; those it has go on."""
        self._drained = True
        if self.state is WorkerState.READY:
            self._set_state(WorkerState.DRAINING, "an operator drains it")

    @contextlib.contextmanager
    def occupied(self, drafter_ids: tuple[str, ...]) -> Iterator[None]:
        """Counts a turn as placed here until the load reports know of it, and as long as it runs."""
        self.turn_count += 1
        self._asked_drafters.update(drafter_ids[:1])
        try:
            yield
        finally:
            self.turn_count -= 1
            self._asked_drafters.subtract(drafter_ids[:1])
            self._asked_drafters += Counter()  # drops the zeros

    @contextlib.asynccontextmanager
    async def generate(
        self, command: TurnCommand, metadata: tuple[tuple[str, str], ...], timeout_s: float | None
    ) -> AsyncIterator[VerifierCall]:
        """A turn; whatever still runs when the block is left is cancelled."""
        call = VerifierCall(
            self._stub.Generate(
                command.to_pb(), metadata=metadata + self._dialling.metadata, timeout=timeout_s
            ),
            self.address,
        )
        self._calls.add(call)
        try:
            yield call
        finally:
            self._calls.discard(call)
            call.cancel()

    async def fork_session(
        self, session_id: str, fork_session_id: str, tokens: Sequence[int], timeout_s: float
    ) -> int:
        """Opens a session with these first tokens of another; returns how many of them have state. Raises Refusal."""
        request = verifier_pb.VerifierServiceForkSessionRequest(
            session_id=session_id,
            fork_session_id=fork_session_id,
            token_count=len(tokens),
            token_hash=chain_hash(tokens),
        )
        try:
            answer = await self._stub.ForkSession(
                request, timeout=timeout_s, metadata=self._dialling.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise failure_of(error, self.address) from error
        return int(answer.cached_token_count)

    async def end_session(self, session_id: str) -> None:
        """Frees what the verifier holds of a session; a verifier that cannot be reached has forgotten it or will."""
        request = verifier_pb.VerifierServiceEndSessionRequest(session_id=session_id)
        try:
            await self._stub.EndSession(
                request, timeout=END_SESSION_TIMEOUT_S, metadata=self._dialling.metadata
            )
        except grpc.aio.AioRpcError as error:
            log.info(
                "could not end a session",
                address=self.address,
                session_id=session_id,
                status=error.code().name,
            )

    def end_calls(self, refusal: Refusal) -> None:
        """Ends all turns under way here for one reason."""
        for call in tuple(self._calls):
            call.end(refusal)

    async def close(self) -> None:
        await self._channel.close()

    async def _connect(self) -> None:
        try:
            description = await self._stub.Describe(
                verifier_pb.VerifierServiceDescribeRequest(),
                timeout=self._times.connect_s,
                metadata=self._dialling.metadata,
            )
        except grpc.aio.AioRpcError as error:
            raise Gone(self._why(error)) from error
        if not description.model_id or not description.epoch:
            raise Gone("it describes itself without model_id or epoch: is this a verifier?")
        await self._hooks.prepare(description)
        self.description = description

    async def _watch_load(self) -> NoReturn:
        call: Any = self._stub.WatchLoad(
            verifier_pb.VerifierServiceWatchLoadRequest(), metadata=self._dialling.metadata
        )
        try:
            while True:
                async with asyncio.timeout(self._times.silence_s):
                    report = await call.read()
                if report is grpc.aio.EOF:
                    raise Gone("it ended its load reports")
                self._take_report(report)
        except TimeoutError as error:
            raise Gone(f"no load report for {self._times.silence_s:g} s", silent=True) from error
        except grpc.aio.AioRpcError as error:
            raise Gone(self._why(error)) from error
        finally:
            call.cancel()

    def _take_report(self, report: Load) -> None:
        assert self.description is not None, "a verifier is described before it is watched"
        if report.epoch != self.description.epoch:
            raise Gone("it was restarted")
        self.load = report
        if report.draining:
            self._set_state(WorkerState.DRAINING, "it is leaving")
        elif self._drained:
            self._set_state(WorkerState.DRAINING, "an operator drains it")
        else:
            self._set_state(WorkerState.READY, "")

    def _take_loss(self, gone: Gone) -> None:
        description, self.load = self.description, None
        self._set_state(WorkerState.LOST, str(gone))
        if description is not None:
            self._hooks.lost(self.address, description.epoch)
        if gone.silent:
            # Calls on a broken connection end by themselves; those on a silent one would wait for their deadline.
            self.end_calls(lost(self.address, str(gone)))

    def _set_state(self, state: WorkerState, message: str) -> None:
        if (state, message) == (self.state, self.message):
            return
        self.state, self.message = state, message
        log.info("verifier", address=self.address, state=state.name.lower(), reason=message)
        self._hooks.changed()

    def _why(self, error: grpc.aio.AioRpcError) -> str:
        details = error.details() or error.code().name
        return explain_handshake(details, encrypted=self._dialling.certificates is not None) or details

    def _drafter_view(self, status: verifier_pb.DrafterStatus) -> DrafterView:
        return DrafterView(
            drafter_id=status.drafter_id,
            connected=status.state == verifier_pb.DrafterStatus.STATE_CONNECTED,
            session_count=max(status.session_count, self._asked_drafters[status.drafter_id]),
            turnaround_us=status.turnaround_us,
            message=status.message,
        )
