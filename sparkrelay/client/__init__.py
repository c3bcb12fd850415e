"""The client SDK: `connect` for threads, `connect_aio` for asyncio, one set of results and errors."""

from sparkrelay.client.aio import AsyncClient, AsyncSession
from sparkrelay.client.aio import connect as connect_aio
from sparkrelay.client.aio_stream import AsyncGenerationStream
from sparkrelay.client.blocking import Client, Session, connect
from sparkrelay.client.blocking_stream import GenerationStream
from sparkrelay.client.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    ResumeLost,
    SessionBusy,
    SparkRelayError,
    Unauthenticated,
    Unavailable,
)
from sparkrelay.client.formats import json_schema, lark, regex
from sparkrelay.client.results import (
    Delta,
    Drafter,
    Generation,
    Model,
    RoundReport,
    RoundTotals,
    SessionInfo,
    Timing,
    TokenLogprob,
    Turn,
    TurnStarted,
    Usage,
    WatchedRound,
    Worker,
)

__all__ = [
    "AsyncClient",
    "AsyncGenerationStream",
    "AsyncSession",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Delta",
    "Drafter",
    "Generation",
    "GenerationStream",
    "InternalError",
    "InvalidRequest",
    "Model",
    "NotFound",
    "Overloaded",
    "ResumeLost",
    "RoundReport",
    "RoundTotals",
    "Session",
    "SessionBusy",
    "SessionInfo",
    "SparkRelayError",
    "Timing",
    "TokenLogprob",
    "Turn",
    "TurnStarted",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "WatchedRound",
    "Worker",
    "connect",
    "connect_aio",
    "json_schema",
    "lark",
    "regex",
]
