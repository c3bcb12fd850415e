"""Turns that outlive their streams: each runs in a task of its own and writes its log; streams read the log.

start  -> the task runs the turn; the first listener reads from its beginning
break  -> the listener is gone, the turn goes on; after linger_ms without another listener it is cancelled
resume -> a new listener reads from the token that its client lacks; one before it that still is there is told SUPERSEDED
end    -> the log stays for `resume_keep_ms`, so that the last events can be asked for again
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from gateway.journal import ResumePoint, TurnLog
from gateway.servicer.answers import internal
from gateway.servicer.desk import FrontDesk
from gateway.servicer.turn import TurnEvents, TurnRun
from gateway.turn_output import Delta, TurnSummary
from gateway.validation import check_id, invalid
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb

MAX_LINGER_MS = 120_000


class Listener:
    """One stream of a turn: reads its log from a point on, and waits for more."""

    def __init__(self, log: TurnLog, point: ResumePoint) -> None:
        self._log = log
        self._point = point
        self._superseded = False
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """There is more to read."""
        self._changed.set()

    def supersede(self) -> None:
        """Another listener takes over."""
        self._superseded = True
        self._changed.set()

    async def events(self) -> TurnEvents:
        """Raises Refusal: the one that the turn failed with, SUPERSEDED, or RESUME_LOST if the log was cut before it was read."""
        log, number = self._log, self._point.number
        while log.accepted is None and log.end is None:
            await self._more()
        if log.accepted is not None:
            yield log.accepted
        while True:
            while number < log.delta_count:
                delta = self._point.cut(log.delta(number))
                number += 1
                if delta is not None:
                    yield delta
                self._check_superseded()
            if log.end is not None:
                break
            await self._more()
        if isinstance(log.end, Refusal):
            raise log.end
        yield log.end

    async def _more(self) -> None:
        await self._changed.wait()
        self._changed.clear()
        self._check_superseded()

    def _check_superseded(self) -> None:
        if self._superseded:
            raise Refusal(
                Reason.SUPERSEDED, "Another stream has resumed this turn and goes on with it; read there."
            )


class LingeringTurn:
    """A turn under way, or its log alone once it is over."""

    def __init__(self, log: TurnLog) -> None:
        self.log = log
        self.listener: Listener | None = None
        self.unheard_count = 0  # how often a listener has left: which of them a timer was started for


class LingeringTurns:
    """All turns that were asked for with linger_ms and are still known. Used from one event loop."""

    def __init__(self, desk: FrontDesk) -> None:
        self._desk = desk
        self._turns: dict[str, LingeringTurn] = {}

    def start(self, run: TurnRun, linger_ms: int) -> TurnEvents:
        """Starts a turn; returns its first stream. Raises Refusal."""
        _check_linger(linger_ms)
        self._check_journal()
        if self._desk.journal.find(run.turn_id) is not None:
            raise invalid("turn_id", "names a turn that is known here; resume it, or choose another")
        turn = LingeringTurn(self._desk.journal.open(run.turn_id, run.trace.trace_id))
        self._turns[run.turn_id] = turn
        self._desk.in_background(self._work(run, turn))
        return self._listen(turn, ResumePoint(), linger_ms)

    async def resume(self, request: gateway_pb.GenerateRequest) -> TurnEvents:
        """Another stream of a turn, from the token that its client lacks. Raises Refusal."""
        _check_linger(request.linger_ms)
        turn_id, next_index = check_id("resume.turn_id", request.resume.turn_id), request.resume.next_index
        if next_index < 0:
            raise invalid("resume.next_index", f"is {next_index}; send 0 or more")
        log = await self._find(turn_id)
        turn = self._turns.get(turn_id) or LingeringTurn(log)
        point = log.resume_point(next_index)
        async with aclosing(self._listen(turn, point, request.linger_ms)) as events:
            async for event in events:
                yield event

    async def _find(self, turn_id: str) -> TurnLog:
        """A turn's log, also of an earlier process. Raises Refusal."""
        journal = self._desk.journal
        log = journal.find(turn_id)
        if log is None and journal.store is not None:
            log = await asyncio.to_thread(journal.store.load, turn_id)
        if log is None:
            raise self._unknown(turn_id)
        return log

    def _check_journal(self) -> None:
        store = self._desk.journal.store
        if store is not None and store.broken and self._desk.settings.journal_required:
            raise Refusal(
                Reason.OVERLOADED,
                f"The gateway's journal cannot be written ({store.broken}), and it takes no turns without it. "
                "Ask without linger_ms, or try again later.",
                retry_after_ms=self._desk.settings.overload_retry_ms,
            )

    async def _listen(self, turn: LingeringTurn, point: ResumePoint, linger_ms: int) -> TurnEvents:
        listener = Listener(turn.log, point)
        if turn.listener is not None:
            turn.listener.supersede()
        turn.listener = listener
        try:
            async with aclosing(listener.events()) as events:
                async for event in events:
                    yield event
        finally:
            if turn.listener is listener:
                turn.listener = None
                turn.unheard_count += 1
                if turn.log.end is None:
                    self._desk.in_background(self._give_up(turn, turn.unheard_count, linger_ms / 1000))

    async def _give_up(self, turn: LingeringTurn, unheard_count: int, linger_s: float) -> None:
        """Cancels the turn if nobody has listened since."""
        await asyncio.sleep(linger_s)
        if turn.listener is None and turn.unheard_count == unheard_count and turn.log.end is None:
            self._desk.cancel_turn(turn.log.turn_id, f"nobody listened for {linger_s:g} s")

    async def _work(self, run: TurnRun, turn: LingeringTurn) -> None:
        """Runs the turn to its end, heard or not."""
        journal, log = self._desk.journal, turn.log
        end: TurnSummary | Refusal = Refusal(Reason.CANCELLED, "The gateway ended.")
        try:
            async with aclosing(run.events()) as events:
                async for event in events:
                    match event:
                        case Delta():
                            journal.add(log, event)
                        case TurnSummary():
                            end = event
                        case _:
                            journal.accept(log, event)
                    if turn.listener is not None:
                        turn.listener.wake()
        except Refusal as refusal:
            refusal.turn_id, refusal.trace_id = run.turn_id, run.trace.trace_id
            end = refusal
        except Exception as error:  # noqa: BLE001  the boundary: logged there
            end = internal(error, turn_id=run.turn_id, trace=run.trace)
        finally:
            journal.end(log, end, self._desk.outside.clock_us())
            del self._turns[log.turn_id]
            if turn.listener is not None:
                turn.listener.wake()

    def _unknown(self, turn_id: str) -> Refusal:
        return Refusal(
            Reason.TURN_NOT_FOUND,
            f"Turn {turn_id!r} cannot be resumed here: it is unknown, was asked for without linger_ms, or has been over for "
            f"more than {self._desk.settings.resume_keep_ms / 1000:g} s. Ask again as a new turn with the same seed.",
        )


def _check_linger(linger_ms: int) -> None:
    if not 0 <= linger_ms <= MAX_LINGER_MS:
        raise invalid("linger_ms", f"is {linger_ms}; send 0 to {MAX_LINGER_MS}")
