"""Who may connect, and how nobody else can listen: certificates and tokens, for those who serve and for those who dial.

A service with `tls_cert` and `tls_key` speaks TLS alone; with `tls_client_ca` too it wants a certificate of every caller (mTLS).
With `token_file` it wants a bearer token of every call: a file of lines `name:token`, whose names are the tenants.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

from sparkrelay.errors import abort
from sparkrelay.outcomes import Reason, Refusal

MIN_TOKEN_CHARS = 16
MAX_TOKENS = 10_000
AUTHORIZATION = "authorization"
BEARER = "Bearer "

# Whose call this is: the name of its token, empty where tokens are not asked for. Set before a call reaches its servicer.
caller_name: ContextVar[str] = ContextVar("caller_name", default="")


class InsecureSettings(ValueError):
    """Certificates or tokens that cannot be used; the message names the setting, the file, and what to do."""


class SecuritySettings(Protocol):
    """What this file needs of a service's settings; `sparkrelay.settings.ServiceSettings` has these fields."""

    @property
    def tls_cert(self) -> str: ...
    @property
    def tls_key(self) -> str: ...
    @property
    def tls_client_ca(self) -> str: ...
    @property
    def tls_ca(self) -> str: ...
    @property
    def token_file(self) -> str: ...
    @property
    def verifier_token_file(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM texts. ca: who signed the other side's; cert and key: our own, both or none."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class Dialling:
    """How to reach another service. certificates None: without encryption. token: shown with every call, "" for none."""

    certificates: Certificates | None = None
    token: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call must carry."""
        return ((AUTHORIZATION, BEARER + self.token),) if self.token else ()

    def channel(self, address: str, options: tuple[tuple[str, Any], ...]) -> grpc.aio.Channel:
        """A channel for asyncio; its calls are to be given `metadata`."""
        if self.certificates is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, channel_credentials(self.certificates), options=options)


PLAINTEXT = Dialling()


class TokenTable:
    """The tokens that are taken, by name. Looking one up takes as long for a wrong one as for a right one."""

    def __init__(self, tokens: dict[str, str]) -> None:
        self._hashes = [(name, _hash(token)) for name, token in tokens.items()]

    def name_of(self, token: str) -> str | None:
        """The name of a token; None if it is not taken."""
        found, wanted = None, _hash(token)
        for name, digest in self._hashes:
            if hmac.compare_digest(digest, wanted):
                found = name
        return found


def read_token_file(path: str, setting: str) -> dict[str, str]:
    """Name to token. Lines `name:token`; empty ones and those that begin with # say nothing. Raises InsecureSettings."""
    tokens: dict[str, str] = {}
    for number, line in enumerate(_read(path, setting).decode("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, token = line.strip().partition(":")
        if (
            not name
            or len(token) < MIN_TOKEN_CHARS
            or not token.isascii()
            or not token.isprintable()
            or " " in token
        ):
            raise InsecureSettings(
                f"{setting}: line {number} of {path} is not name:token with a token of at least {MIN_TOKEN_CHARS} printable "
                "ASCII characters; make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
            )
        if name in tokens:
            raise InsecureSettings(
                f"{setting}: {path} names {name!r} twice; give each token a name of its own"
            )
        tokens[name] = token
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise InsecureSettings(
            f"{setting}: {path} has {len(tokens)} tokens; write 1 to {MAX_TOKENS} lines name:token"
        )
    return tokens


def first_token(path: str, setting: str) -> str:
    """The token to show to others: of the first line. Raises InsecureSettings."""
    return next(iter(read_token_file(path, setting).values()))


def server_credentials(settings: SecuritySettings) -> grpc.ServerCredentials | None:
    """None: the service speaks without encryption. Raises InsecureSettings."""
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise InsecureSettings("tls_cert, tls_key: one of them is not set; give both files, or neither")
    if not settings.tls_cert:
        if settings.tls_client_ca:
            raise InsecureSettings(
                "tls_client_ca: callers can only be asked for certificates with tls_cert and tls_key"
            )
        return None
    pair = (_read(settings.tls_key, "tls_key"), _read(settings.tls_cert, "tls_cert"))
    client_ca = _read(settings.tls_client_ca, "tls_client_ca") if settings.tls_client_ca else None
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def server_security(
    settings: SecuritySettings,
) -> tuple[grpc.ServerCredentials | None, tuple[grpc.aio.ServerInterceptor, ...]]:
    """How a service with these settings is protected: credentials for its port, and what checks every call.

    Raises InsecureSettings.
    """
    if not settings.token_file:
        return server_credentials(settings), ()
    tokens = TokenTable(read_token_file(settings.token_file, "token_file"))
    return server_credentials(settings), (TokenCheck(tokens),)


def dialling(settings: SecuritySettings) -> Dialling:
    """How a service with these settings reaches verifiers: over TLS if it knows who signs (tls_ca), else as PLAINTEXT.

    Its own certificate, if it has one, is shown to whoever asks. Raises InsecureSettings.
    """
    token = (
        first_token(settings.verifier_token_file, "verifier_token_file")
        if settings.verifier_token_file
        else ""
    )
    if not settings.tls_ca:
        return Dialling(token=token)
    return Dialling(read_certificates(settings.tls_ca, settings.tls_cert, settings.tls_key), token)


def read_certificates(ca: str, cert: str, key: str) -> Certificates:
    """From files; "" for none. Without a CA those of the system count. Raises InsecureSettings."""
    if bool(cert) != bool(key):
        raise InsecureSettings("cert, key: one of them is not set; give both files, or neither")
    return Certificates(
        ca=_read(ca, "ca") if ca else None,
        cert=_read(cert, "cert") if cert else None,
        key=_read(key, "key") if key else None,
    )


def channel_credentials(certificates: Certificates) -> grpc.ChannelCredentials:
    """For grpc's secure channels."""
    return grpc.ssl_channel_credentials(certificates.ca, certificates.key, certificates.cert)


def is_loopback(host: str) -> bool:
    """True for an address that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def explain_handshake(details: str, *, encrypted: bool) -> str:
    """What to do when a connection failed for its certificates; "" if that was not the reason. `details` are gRPC's words."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return "its certificate is not signed by the CA that was given, or is for another name: give the right CA file"
    if "WRONG_VERSION_NUMBER" in details:
        return "it does not speak TLS: connect without, or start it with tls_cert and tls_key"
    if "Socket closed" in details and "failed to connect" in details:
        if encrypted:
            return "it ended the TLS handshake: it wants a client certificate that its CA has signed, give cert and key"
        return "it ended the connection at once: it speaks TLS, give the CA file that signed its certificate"
    return ""


class TokenCheck(grpc.aio.ServerInterceptor):
    """Lets a call through if it shows a token that is taken, and says whose it is."""

    def __init__(self, tokens: TokenTable) -> None:
        self._tokens = tokens

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        shown = dict(details.invocation_metadata or ()).get(AUTHORIZATION, "")
        name = (
            self._tokens.name_of(str(shown).removeprefix(BEARER)) if str(shown).startswith(BEARER) else None
        )
        if name is None:
            return handler if handler is None else _refusing(handler, bool(shown))
        caller_name.set(name)
        return handler


def _refusing(handler: Any, had_token: bool) -> Any:
    """A handler of the same kind that refuses."""
    what = "is not one that this service takes" if had_token else "is missing"
    message = f"The bearer token {what}. Send one of the service's token_file: connect(token=...), or SPARKRELAY_TOKEN_FILE."

    async def refuse(request: Any, context: Any) -> None:
        await abort(context, Refusal(Reason.UNAUTHENTICATED, message))

    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[handler.request_streaming, handler.response_streaming]
    return make(refuse, handler.request_deserializer, handler.response_serializer)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _read(path: str, setting: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InsecureSettings(f"{setting}: cannot read {path}: {error.strerror or error}") from None
