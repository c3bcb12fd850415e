"""Where the gateway is, and how to reach it: argument, then environment, then what `sparkrelay up` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from sparkrelay.client.errors import InvalidRequest, SparkRelayError, Unavailable, error_of
from sparkrelay.outcomes import FieldViolation, Reason
from sparkrelay.security import (
    Dialling,
    InsecureSettings,
    channel_credentials,
    first_token,
    is_loopback,
    read_certificates,
)

TOKEN_FILE_VARIABLE = "SPARKRELAY_TOKEN_FILE"
CA_VARIABLE = "SPARKRELAY_CA_FILE"
CERT_VARIABLE = "SPARKRELAY_CERT_FILE"
KEY_VARIABLE = "SPARKRELAY_KEY_FILE"
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


@dataclass(frozen=True, slots=True)
class Access:
    """What `connect` was told of certificates and tokens; None: what the environment says.

    tls  None: if any certificate was given. True without a CA: the system's CAs count. False: without encryption
    """

    token: str | None = None
    tls: bool | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """The gateway: where it is and how it is reached."""

    address: str
    dialling: Dialling

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return self.dialling.metadata

    def error_of(self, failure: grpc.RpcError) -> SparkRelayError:
        """The error for a failed call."""
        return error_of(failure, self.address, encrypted=self.dialling.certificates is not None)

    def blocking_channel(self) -> grpc.Channel:
        if self.dialling.certificates is None:
            return grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        credentials = channel_credentials(self.dialling.certificates)
        return grpc.secure_channel(self.address, credentials, options=CHANNEL_OPTIONS)

    def aio_channel(self) -> grpc.aio.Channel:
        return self.dialling.channel(self.address, CHANNEL_OPTIONS)


def resolve_peer(address: str, access: Access, environment: Mapping[str, str]) -> Peer:
    """Raises InvalidRequest for certificates or tokens that cannot be used, and rather than show a token to a whole network."""
    ca, cert, key = (
        environment.get(variable, "") if given is None else given
        for given, variable in (
            (access.ca, CA_VARIABLE),
            (access.cert, CERT_VARIABLE),
            (access.key, KEY_VARIABLE),
        )
    )
    tls = bool(ca or cert) if access.tls is None else access.tls
    try:
        certificates = read_certificates(ca, cert, key) if tls else None
        token = _token(access.token, environment)
    except InsecureSettings as error:
        raise _refused("connect", str(error)) from None
    host = address.rpartition(":")[0] or address
    if token and certificates is None and access.tls is None and not is_loopback(host):
        raise _refused(
            "token",
            f"would travel unencrypted to {address}; give ca=... or tls=True, or tls=False if the network is trusted",
        )
    return Peer(address, Dialling(certificates, token))


def _token(token: str | None, environment: Mapping[str, str]) -> str:
    if token is not None:
        return token
    path = environment.get(TOKEN_FILE_VARIABLE, "")
    return first_token(path, TOKEN_FILE_VARIABLE) if path else ""


def _refused(field: str, message: str) -> InvalidRequest:
    violation = FieldViolation(field, message)
    return InvalidRequest(f"{field}: {message}", reason=Reason.INVALID_FIELD.name, violations=(violation,))
