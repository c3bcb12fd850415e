"""VerifierService: translates, hands over, waits, translates back.

generate.py       one turn for the gateway          speculate.py     the two streams of a drafter
validation.py     request in, checked command out   drafter_link.py  the same without I/O
turn_output.py    a turn's events on their way out  hub.py           where the engine, turns and drafters meet
formats.py        response formats, compiled       forks.py         a session from another one's tokens
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio

from sparkrelay.errors import abort
from sparkrelay.frames import ContextKind, Drain, Fingerprint, duration_us
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.protocol import BLOCK_LIMIT, PROTOCOL_MAX, PROTOCOL_MIN
from sparkrelay.telemetry import from_metadata
from sparkrelay.v1 import errors_pb2, verifier_service_pb2_grpc
from sparkrelay.v1 import verifier_service_pb2 as pb2
from sparkrelay.wire import fingerprint_pb
from verifier_service.drafters import Drafter
from verifier_service.engine import EngineLoad
from verifier_service.events import Command
from verifier_service.models import ModelInfo
from verifier_service.servicer.drafter_link import LinkSettings
from verifier_service.servicer.forks import fork_command
from verifier_service.servicer.formats import Formats
from verifier_service.servicer.generate import generate
from verifier_service.servicer.hub import Hub
from verifier_service.servicer.speculate import feed_context, speculate
from verifier_service.servicer.validation import NOISE_VERSION, check_session_id

FRAME_LIMIT_BYTES = 4 * 1024 * 1024
REPORT_EVERY_S = 1.0
DRAIN_MARGIN = 0.8  # of the drain's time for turns to finish; the rest is for saying goodbye
TICKS_PER_PING = 4


@dataclass(frozen=True, slots=True)
class VerifierIdentity:
    """Who this verifier is. epoch: random id of this run of it. depth_policy: as set, for people."""

    verifier_id: str
    epoch: str
    info: ModelInfo
    depth_policy: str = ""

    @property
    def fingerprint(self) -> Fingerprint:
        """What its drafters must fit."""
        context = self.info.context
        tokens_only = Fingerprint(
            target_id=self.info.model_id,
            tokenizer_hash=self.info.tokenizer_hash,
            vocab_size=self.info.vocab_size,
            block_size=BLOCK_LIMIT,
            context_kind=ContextKind.TOKENS,
            noise_versions=(NOISE_VERSION,),
        )
        if context is None:
            return tokens_only
        return replace(
            tokens_only,
            context_kind=ContextKind.ROWS,
            tap_layers=context.tap_layers,
            context_width=context.width,
            context_hash=context.hash,
        )

    @property
    def link_settings(self) -> LinkSettings:
        return LinkSettings(
            fingerprint=self.fingerprint,
            verifier_id=self.verifier_id,
            epoch=self.epoch,
            vocab_size=self.info.vocab_size,
            frame_limit_bytes=FRAME_LIMIT_BYTES,
        )


class VerifierServicer(verifier_service_pb2_grpc.VerifierServiceServicer):
    """The service over an engine on another thread. Must be made on the running event loop.

    post     hands commands to the engine, together
    load     what the engine is doing; any thread may ask
    crashed  called if an event of the engine cannot be handled: a bug, the process must end
    now_s    a monotonic clock in seconds
    formats  what compiles response formats; None: they are refused

    Events of the engine go to `deliver`.
    """

    def __init__(
        self,
        identity: VerifierIdentity,
        *,
        post: Callable[[Sequence[Command]], object],
        load: Callable[[], EngineLoad],
        crashed: Callable[[BaseException], None],
        now_s: Callable[[], float],
        formats: Formats | None = None,
        link_settings: LinkSettings | None = None,
    ) -> None:
        settings = link_settings or identity.link_settings
        self._identity = identity
        self._load = load
        self._now_s = now_s
        self._tick_s = settings.ping_every_s / TICKS_PER_PING
        self._hub = Hub(settings, post=post, crashed=crashed, now_s=now_s)
        self.deliver = self._hub.deliver
        self._formats = formats or Formats(None)
        self._draining = False
        self._ended = False

    # ---- calls ----------------------------------------------------------------------------------------------------------------

    # The three streams write for themselves (context.write), so that their `finally` runs when the call is
    # cancelled, and not later.

    async def Generate(  # type: ignore[override]
        self, request: pb2.VerifierServiceGenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        received_us = int(self._now_s() * 1e6)
        await generate(
            self._hub, self._formats, self._identity, request, context, received_us, lambda: self._draining
        )

    async def Speculate(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[pb2.SpeculateRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        await speculate(self._hub, request_iterator, context, self._tick_s)

    async def FeedContext(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[pb2.FeedContextRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        await feed_context(self._hub, request_iterator, context)

    async def Describe(
        self, request: pb2.VerifierServiceDescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb2.VerifierServiceDescribeResponse:
        who, info = self._identity, self._identity.info
        return pb2.VerifierServiceDescribeResponse(
            verifier_id=who.verifier_id,
            epoch=who.epoch,
            model_id=info.model_id,
            tokenizer_hash=info.tokenizer_hash,
            vocab_size=info.vocab_size,
            context_limit=info.context_limit,
            default_stop_ids=info.default_stop_ids,
            dtype=info.dtype,
            exact=info.exact,
            exact_reason=info.exact_reason,
            numerics=info.numerics,
            noise_versions=[NOISE_VERSION],
            protocol_min=PROTOCOL_MIN,
            protocol_max=PROTOCOL_MAX,
            block_tokens=info.block_tokens,
            block_count=self._load().block_count,
            block_bytes=info.block_bytes,
            fingerprint=fingerprint_pb(who.fingerprint),
            depth_policy=who.depth_policy,
            has_response_format=self._formats.available,
        )

    async def WatchLoad(
        self, request: pb2.VerifierServiceWatchLoadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb2.VerifierServiceWatchLoadResponse]:
        watched = self._hub.watch()
        try:
            while True:
                yield self._report()
                if self._ended:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REPORT_EVERY_S):
                        await watched.wait()
                watched.clear()
        finally:
            self._hub.unwatch(watched)

    async def ForkSession(
        self, request: pb2.VerifierServiceForkSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb2.VerifierServiceForkSessionResponse:
        try:
            command = fork_command(request)
            if self._draining:
                raise Refusal(
                    Reason.DRAINING, "this verifier is draining and opens no new sessions; use another one"
                )
            forked = await self._hub.forks.ask(command)
        except Refusal as refusal:
            trace = from_metadata(context.invocation_metadata())
            refusal.trace_id = trace.trace_id if trace is not None else ""
            await abort(context, refusal)
        return pb2.VerifierServiceForkSessionResponse(cached_token_count=forked.state_len)

    async def EndSession(
        self, request: pb2.VerifierServiceEndSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb2.VerifierServiceEndSessionResponse:
        try:
            check_session_id(request.session_id)
        except Refusal as refusal:
            await abort(context, refusal)
        self._hub.end_session(request.session_id)
        return pb2.VerifierServiceEndSessionResponse()

    # ---- the end --------------------------------------------------------------------------------------------------------------

    async def drain(self, limit_s: float) -> None:
        """Refuses new turns, lets running ones finish, cancels the others in time, then ends the open streams."""
        self._draining = True
        limit_s *= DRAIN_MARGIN
        for link in self._hub.links():
            if link.invitable:
                link.say(Drain(int(limit_s * 1000)))
        self._hub.announce()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._hub.idle.wait()
        self.fail("this verifier is draining: the turn did not finish in time")
        self._ended = True
        self._hub.announce()
        for link in self._hub.links():
            link.close()

    def fail(self, message: str) -> None:
        """Ends all turns that are under way: this verifier cannot go on with them."""
        self._hub.fail_turns(Refusal(Reason.VERIFIER_LOST, message))

    # ---- reports --------------------------------------------------------------------------------------------------------------

    def _report(self) -> pb2.VerifierServiceWatchLoadResponse:
        load = self._load()
        return pb2.VerifierServiceWatchLoadResponse(
            epoch=self._identity.epoch,
            draining=self._draining,
            active_turn_count=load.active_turn_count,
            queued_turn_count=load.queued_turn_count,
            session_count=load.session_count,
            used_block_count=load.used_block_count,
            block_count=load.block_count,
            step_us=duration_us(load.step_us),
            step_count=load.step_count,
            committed_token_count=load.committed_token_count,
            drafters=[_drafter_pb(drafter) for drafter in self._hub.drafters.all()],
        )


def _drafter_pb(drafter: Drafter) -> pb2.DrafterStatus:
    return pb2.DrafterStatus(
        drafter_id=drafter.drafter_id,
        incarnation=drafter.incarnation,
        state=pb2.DrafterStatus.State.ValueType(drafter.state),
        reason=errors_pb2.Reason.ValueType(drafter.reason),
        message=drafter.message,
        session_count=len(drafter.members),
        proposal_kind=drafter.proposal_kind,
        round_trip_us=duration_us(drafter.round_trip_us),
        turnaround_us=duration_us(drafter.turnaround_us),
        drafted_count=drafter.drafted_count,
        verified_count=drafter.verified_count,
        accepted_count=drafter.accepted_count,
    )
