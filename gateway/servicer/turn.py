"""One turn, from the request to its last event.

1. A permit, the model, the session: refused here, or the turn is this session's only one.
2. The request becomes a ValidTurn: the whole conversation as ids.
3. A verifier and a drafter are chosen; what the session's tokens have in common with the conversation is kept.
4. The verifier's commits become deltas until it ends the turn, or a stop string or the client does.
5. However it ended: the session is free again, a temporary one is ended, and the turn is remembered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from gateway.placement import Placement, place
from gateway.retries import Retries
from gateway.servicer import translate
from gateway.servicer.desk import FrontDesk
from gateway.sessions import Session, TurnPlan
from gateway.texts import ModelText
from gateway.turn_output import Delta, Timing, TurnOutput, TurnSummary, Usage
from gateway.turns import TurnRecord
from gateway.validation import ValidTurn, check_id, invalid, parse_turn
from gateway.worker_pool import Event, TurnCommand, VerifierCall
from sparkrelay import wire
from sparkrelay.outcomes import FinishReason, Reason, Refusal
from sparkrelay.telemetry import TraceContext, to_metadata
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import verifier_service_pb2 as verifier_pb

log = structlog.get_logger(__name__)

# In this order: one TurnAccepted, any number of Deltas, one TurnSummary.
TurnEvent = gateway_pb.TurnAccepted | Delta | TurnSummary
TurnEvents = AsyncGenerator[TurnEvent, None]
TimeLeft = Callable[[], float | None]

# Longer input is tokenised on a thread: the tokenizer takes about a microsecond a character and lets others run meanwhile.
THREAD_FROM_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Job:
    """A turn that was let in: where it belongs, what is asked, what came of it."""

    session: Session
    record: TurnRecord
    turn: ValidTurn
    output: TurnOutput


class TurnRun:
    """One turn. `events` is what comes of it; the ids are known before anything can fail.

    time_left  seconds of the caller's deadline that are left, None without one
    tenant     who asks
    """

    def __init__(
        self,
        desk: FrontDesk,
        request: gateway_pb.GenerateRequest,
        trace: TraceContext,
        time_left: TimeLeft,
        tenant: str = "",
    ) -> None:
        self.turn_id = request.turn_id or desk.new_id("turn")
        self.trace = trace
        self._desk = desk
        self._request = request
        self._time_left = time_left
        self._tenant = tenant
        self._arrived_us = desk.outside.clock_us()
        self._handed_us = self._accepted_us = self._first_token_us = self._cached_count = 0
        self._started: verifier_pb.VerifierTurnStarted | None = None
        self._call: VerifierCall | None = None
        self._ended_for: Refusal | None = None  # somebody else than the caller ended it
        self._cancelled = False

    async def events(self) -> TurnEvents:
        """Raises Refusal."""
        if self._request.turn_id:
            self._desk.check_new_turn_id(self.turn_id)
        with self._desk.turn_permit(self.turn_id, self):
            job = await self._enter()
            try:
                async with aclosing(self._attempts(job)) as events:
                    async for event in events:
                        yield event
            except (asyncio.CancelledError, GeneratorExit):
                self._cancelled = True
                raise
            finally:
                self._settle(job)

    def end(self, refusal: Refusal) -> None:
        """Ends the turn from outside: whoever reads its events is told this refusal."""
        self._ended_for = refusal
        self._cancelled = refusal.reason is Reason.CANCELLED
        if self._call is not None:
            self._call.end(refusal)

    async def _enter(self) -> Job:
        desk = self._desk
        model = self._model()
        text = desk.text_of(model)
        turn = await self._parse(model, text)
        session = self._open_session(model)
        record = desk.turns.start(
            self.turn_id, self.trace.trace_id, session.session_id, model, desk.outside.wall_s()
        )
        output = TurnOutput(
            hidden_ids=turn.hidden_ids,
            detokenizer=text.tokenizer.detokenizer() if text.tokenizer else None,
            stop_strings=turn.stop_strings,
            include_rounds=turn.include_rounds,
        )
        return Job(session, record, turn, output)

    def _model(self) -> str:
        desk, request = self._desk, self._request
        if not request.session_id:
            return desk.model_name(request.model)
        model = desk.sessions.get(check_id("session_id", request.session_id)).model
        if request.model not in ("", model):
            raise invalid("model", f"is {request.model!r}, but the session's is {model!r}; leave it empty")
        return model

    async def _parse(self, model: str, text: ModelText) -> ValidTurn:
        raw = translate.raw_turn(self._request)
        limits, seed = self._desk.limits_of(model), self._desk.draw_seed()
        if self._request.ByteSize() < THREAD_FROM_BYTES:
            return parse_turn(raw, limits, text, seed)
        return await asyncio.to_thread(parse_turn, raw, limits, text, seed)

    def _open_session(self, model: str) -> Session:
        desk, session_id = self._desk, self._request.session_id
        if not session_id:
            session_id = desk.open_session(model, temporary=True).session_id
        return desk.sessions.begin_turn(session_id, self.turn_id, desk.outside.clock_us())

    async def _attempts(self, job: Job) -> TurnEvents:
        """Places the turn, again if a verifier refuses it before it began."""
        session, retries = job.session, Retries()
        refusal: Refusal | None = None
        while True:
            placement = self._place(job, retries.excluded, refusal)
            self._leave_old_place(session, placement)
            plan = session.plan_turn(job.turn.prompt_ids, placement.binding)
            try:
                async with aclosing(self._run(job, placement, plan)) as events:
                    async for event in events:
                        yield event
                return
            except Refusal as error:
                refusal = error
                pause_s = retries.pause_s(error, placement.binding.address, keep_len=plan.keep_len)
                if self._started is not None or pause_s is None:
                    raise
            if refusal.reason in (Reason.PREFIX_MISMATCH, Reason.SESSION_NOT_FOUND):
                session.tokens.clear()
            await asyncio.sleep(pause_s)

    def _leave_old_place(self, session: Session, placement: Placement) -> None:
        """A session that moves leaves nothing behind. At the same address it has been forgotten, or is kept."""
        if session.binding is not None and session.binding.address != placement.binding.address:
            self._desk.release(session)

    def _place(self, job: Job, excluded: frozenset[str], earlier: Refusal | None) -> Placement:
        """Raises the refusal of the earlier attempt, if there was one, when there is nowhere else to go."""
        try:
            return place(
                self._desk.pool.views,
                job.session.model,
                pinned=job.session.binding,
                warm_drafter_id=job.session.drafter_id,
                wants_drafter=not job.turn.speculation_off,
                excluded=excluded,
            )
        except Refusal as nowhere:
            raise earlier or nowhere from nowhere

    async def _run(self, job: Job, placement: Placement, plan: TurnPlan) -> TurnEvents:
        """One attempt at one verifier."""
        desk, turn, output = self._desk, job.turn, job.output
        worker = desk.pool.worker(placement.binding.address)
        session_id, salt = job.session.session_id, desk.prefix_salt(self._tenant)
        command = TurnCommand(session_id, self.turn_id, plan, turn, placement.drafter_ids, salt)
        timeout_s = self._time_left()
        if self._ended_for is not None:
            raise self._ended_for
        if timeout_s is not None and timeout_s <= 0:
            raise Refusal(
                Reason.DEADLINE_EXCEEDED, "The deadline passed before the turn began. Allow more time."
            )
        self._handed_us = desk.outside.clock_us()
        finished: verifier_pb.VerifierTurnFinished | None = None
        with worker.occupied(placement.drafter_ids):
            async with worker.generate(command, to_metadata(self.trace), timeout_s) as call:
                self._call = call
                while finished is None and output.match is None:
                    event = await _next_event(call, worker.address)
                    match event.WhichOneof("event"):
                        case "started":
                            self._accept(job, placement, event.started)
                            yield translate.accepted_pb(
                                job.record, placement, turn.sampling.seed, event.started
                            )
                        case "committed":
                            self._take_commits(job, event.committed)
                            delta = output.take()
                            if delta is not None:
                                yield delta
                        case "finished":
                            finished = event.finished
        last = output.take(final=True)
        if last is not None:
            yield last
        if finished is not None:
            # As it was when the prompt was read, which may be later than its acceptance.
            self._cached_count = finished.usage.cached_token_count
        summary = self._summary(job, _finish_reason(job, finished))
        desk.turns.finish(job.record, summary)
        yield summary

    def _accept(self, job: Job, placement: Placement, started: verifier_pb.VerifierTurnStarted) -> None:
        self._started = started
        self._cached_count = started.cached_token_count
        self._accepted_us = self._desk.outside.clock_us()
        job.session.turn_accepted(job.turn.prompt_ids)
        job.session.drafter_id = placement.drafter_ids[0] if placement.drafter_ids else ""

    def _take_commits(self, job: Job, batch: verifier_pb.CommitBatch) -> None:
        desk, session, output = self._desk, job.session, job.output
        if not self._first_token_us:
            self._first_token_us = desk.outside.clock_us()
        for commit in _readable_commits(batch):
            expected = len(job.turn.prompt_ids) + output.committed_count
            if commit.start != expected:
                message = f"The verifier committed at {commit.start} instead of {expected}, out of order: a bug of it."
                raise Refusal(Reason.INTERNAL, message)
            report = commit.report
            session.committed(commit.token_ids)
            output.add(commit.token_ids, commit.logprobs, report)
            if report is not None:
                session.drafter_id = report.drafter_id or session.drafter_id
                desk.turns.add_round(job.record, report)
                desk.board.publish(self.turn_id, session.session_id, report)

    def _summary(self, job: Job, reason: FinishReason) -> TurnSummary:
        output, started = job.output, self._started
        return TurnSummary(
            finish_reason=reason,
            stop_string=output.match.string if output.match else "",
            usage=Usage(
                prompt_token_count=started.prompt_token_count if started else 0,
                cached_token_count=self._cached_count,
                output_token_count=output.committed_count,
                discarded_token_count=output.discarded_count,
            ),
            timing=Timing(
                first_token_us=max(self._first_token_us - self._arrived_us, 0),
                total_us=self._desk.outside.clock_us() - self._arrived_us,
                queue_us=max(self._accepted_us - self._handed_us, 0),
            ),
            totals=output.totals,
        )

    def _settle(self, job: Job) -> None:
        """However the turn ended; it is over when its record says so."""
        desk, session, record = self._desk, job.session, job.record
        if record.summary is None:
            reason = FinishReason.CANCELLED if self._cancelled else FinishReason.UNSPECIFIED
            desk.turns.finish(record, self._summary(job, reason))
        desk.sessions.end_turn(session, desk.outside.clock_us())
        if session.temporary:
            desk.sessions.remove(session.session_id)
        if not desk.sessions.holds(
            session
        ):  # also one that was ended meanwhile: the turn may have opened it again
            desk.release(session)
        if record.summary is not None:
            log.info(
                "turn over",
                turn_id=record.turn_id,
                trace_id=record.trace_id,
                reason=record.summary.finish_reason.name,
                tokens=record.summary.usage.output_token_count,
                total_us=record.summary.timing.total_us,
            )


def _finish_reason(job: Job, finished: verifier_pb.VerifierTurnFinished | None) -> FinishReason:
    """finished: what the verifier said; None if a stop string ended the turn before it could."""
    if job.output.match is not None or finished is None:
        return FinishReason.STOP
    reason = FinishReason(finished.finish_reason)
    if reason is FinishReason.LENGTH and job.turn.ends_with_context:
        return FinishReason.CONTEXT
    return reason


def _readable_commits(batch: verifier_pb.CommitBatch) -> list[wire.Commit]:
    try:
        return wire.commits(batch)
    except Refusal as malformed:
        message = f"The verifier sent commits that cannot be read, a bug of it: {malformed.message}"
        raise Refusal(Reason.INTERNAL, message) from malformed


async def _next_event(call: VerifierCall, address: str) -> Event:
    event = await call.read()
    if event is None:
        raise Refusal(
            Reason.VERIFIER_LOST, f"The verifier at {address} ended the turn without saying how. Ask again."
        )
    return event
