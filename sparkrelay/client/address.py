"""Where the gateway is, and how to reach it: argument, then SPARKRELAY_GATEWAY, then what `sparkrelay up` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkrelay.client.errors import Unavailable
from sparkrelay.outcomes import Reason

GATEWAY_VARIABLE = "SPARKRELAY_GATEWAY"

# A generation may take minutes; a question about state may not.
GENERATE_TIMEOUT_S = 600.0
QUERY_TIMEOUT_S = 30.0
CANCEL_TIMEOUT_S = 5.0
PARTING_S = 1.0  # what a client that is closed waits for the answers to its last cancels

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # A gateway that vanished without a word is noticed within half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),  # what is safe to repeat is decided here, not by the channel
)


def resolve_address(
    argument: str | None, environment: Mapping[str, str], runtime: Mapping[str, Any] | None
) -> str:
    """Raises Unavailable, with the next step, if nothing names a gateway."""
    if argument:
        return argument
    if environment.get(GATEWAY_VARIABLE):
        return environment[GATEWAY_VARIABLE]
    if runtime and runtime.get("gateway"):
        return str(runtime["gateway"])
    raise Unavailable(
        f"No gateway is known. Start one with `sparkrelay up`, set {GATEWAY_VARIABLE}, or name an address.",
        reason=Reason.UNSPECIFIED.name,
    )


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What every call carries."""
    return (("authorization", f"Bearer {token}"),) if token else ()
