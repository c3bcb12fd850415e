"""GatewayService: messages in, plain calls of the front desk, messages out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc.aio

from gateway.servicer import translate
from gateway.servicer.answers import answering, fail, refuse
from gateway.servicer.desk import FrontDesk
from gateway.servicer.fork import fork_session
from gateway.servicer.lingering import LingeringTurns
from gateway.servicer.turn import TurnRun
from gateway.validation import check_id, invalid
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.security import caller_name
from sparkrelay.telemetry import from_metadata, new_trace_context
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import gateway_service_pb2_grpc as gateway_grpc

MAX_IDLE_LIMIT_MS = 7 * 24 * 3600 * 1000


class GatewayServicer(gateway_grpc.GatewayServiceServicer):
    """What clients talk to."""

    def __init__(self, desk: FrontDesk) -> None:
        self._desk = desk
        self._lingering = LingeringTurns(desk)

    async def Generate(
        self, request: gateway_pb.GenerateRequest, context: Any
    ) -> AsyncGenerator[gateway_pb.GenerateResponse, None]:
        trace = from_metadata(context.invocation_metadata())
        turn_id = request.resume.turn_id if request.WhichOneof("input") == "resume" else ""
        try:
            if request.WhichOneof("input") == "resume":
                events = self._lingering.resume(request)
            else:
                trace = trace or new_trace_context(self._desk.outside.random_bytes)
                run = TurnRun(self._desk, request, trace, context.time_remaining, caller_name.get())
                turn_id = run.turn_id
                events = self._lingering.start(run, request.linger_ms) if request.linger_ms else run.events()
            async with aclosing(events):
                async for event in events:
                    yield translate.event_pb(event)
        except Refusal as refusal:
            await refuse(context, refusal, turn_id=turn_id, trace=trace)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001  the boundary: logged there
            await fail(context, error, turn_id=turn_id, trace=trace)

    @answering
    async def CancelTurn(
        self, request: gateway_pb.CancelTurnRequest, context: Any
    ) -> gateway_pb.CancelTurnResponse:
        self._desk.cancel_turn(check_id("turn_id", request.turn_id), "CancelTurn was called")
        return gateway_pb.CancelTurnResponse()

    @answering
    async def CreateSession(
        self, request: gateway_pb.CreateSessionRequest, context: Any
    ) -> gateway_pb.CreateSessionResponse:
        desk = self._desk
        if not 0 <= request.idle_limit_ms <= MAX_IDLE_LIMIT_MS:
            raise invalid("idle_limit_ms", f"is {request.idle_limit_ms}; send 0 to {MAX_IDLE_LIMIT_MS}")
        if desk.draining:
            raise Refusal(Reason.DRAINING, "The gateway is leaving and opens no more sessions. Try again.")
        model = desk.model_name(request.model)
        session = desk.open_session(model, idle_limit_us=request.idle_limit_ms * 1000)
        return gateway_pb.CreateSessionResponse(session=translate.session_pb(session))

    @answering
    async def ForkSession(
        self, request: gateway_pb.ForkSessionRequest, context: Any
    ) -> gateway_pb.ForkSessionResponse:
        session = await fork_session(self._desk, request, context.time_remaining())
        return gateway_pb.ForkSessionResponse(session=translate.session_pb(session))

    @answering
    async def GetSession(
        self, request: gateway_pb.GetSessionRequest, context: Any
    ) -> gateway_pb.GetSessionResponse:
        session = self._desk.sessions.get(check_id("session_id", request.session_id))
        return gateway_pb.GetSessionResponse(session=translate.session_pb(session))

    @answering
    async def ListSessions(
        self, request: gateway_pb.ListSessionsRequest, context: Any
    ) -> gateway_pb.ListSessionsResponse:
        page, next_token = self._desk.sessions.page(request.page_size, request.page_token)
        return gateway_pb.ListSessionsResponse(
            sessions=[translate.session_pb(session) for session in page], next_page_token=next_token
        )

    @answering
    async def EndSession(
        self, request: gateway_pb.EndSessionRequest, context: Any
    ) -> gateway_pb.EndSessionResponse:
        session = self._desk.sessions.remove(check_id("session_id", request.session_id))
        if session is not None:
            self._desk.release(session)
        return gateway_pb.EndSessionResponse()

    @answering
    async def GetTurn(self, request: gateway_pb.GetTurnRequest, context: Any) -> gateway_pb.GetTurnResponse:
        record = self._desk.turns.get(check_id("turn_id", request.turn_id))
        return gateway_pb.GetTurnResponse(turn=translate.turn_pb(record, with_rounds=True))

    @answering
    async def ListTurns(
        self, request: gateway_pb.ListTurnsRequest, context: Any
    ) -> gateway_pb.ListTurnsResponse:
        page, next_token = self._desk.turns.page(request.page_size, request.page_token, request.session_id)
        return gateway_pb.ListTurnsResponse(
            turns=[translate.turn_pb(record, with_rounds=False) for record in page],
            next_page_token=next_token,
        )

    async def WatchRounds(
        self, request: gateway_pb.WatchRoundsRequest, context: Any
    ) -> AsyncGenerator[gateway_pb.WatchRoundsResponse, None]:
        with self._desk.board.watch(request.session_id) as watcher:
            await context.send_initial_metadata(())  # tells the caller that rounds from now on will be seen
            async with aclosing(watcher.rounds()) as rounds:
                async for seen in rounds:
                    yield translate.seen_round_pb(seen)

    @answering
    async def ListModels(
        self, request: gateway_pb.ListModelsRequest, context: Any
    ) -> gateway_pb.ListModelsResponse:
        desk = self._desk
        models = []
        for name, hosts in desk.pool.descriptions().items():
            drafters = {
                drafter.drafter_id
                for view in desk.pool.views
                for drafter in view.drafters
                if view.model == name and drafter.connected
            }
            limits = desk.limits_of(name)
            models.append(
                gateway_pb.Model(
                    model=name,
                    context_limit=limits.context_limit,
                    vocab_size=limits.vocab_size,
                    has_chat_template=desk.text_of(name).chat is not None,
                    has_response_format=limits.has_response_format,
                    verifier_count=len(hosts),
                    drafter_count=len(drafters),
                    exact=all(host.exact for host in hosts),
                )
            )
        return gateway_pb.ListModelsResponse(models=models)
