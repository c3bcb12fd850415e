"""Certificates and tokens: what is read, what is refused, and what each side says when the other cannot be let in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

import sparkrelay
from sparkrelay.client import InvalidRequest, SparkRelayError, Unauthenticated, Unavailable
from sparkrelay.client.address import Access, resolve_peer
from sparkrelay.security import (
    Dialling,
    InsecureSettings,
    TokenTable,
    caller_name,
    dialling,
    first_token,
    read_token_file,
    server_security,
)
from sparkrelay.settings import ServiceSettings
from sparkrelay.v1 import gateway_service_pb2 as gateway_pb
from sparkrelay.v1 import gateway_service_pb2_grpc as gateway_grpc
from tests.certificates import Certificates, make_certificates

ALICE, BOB = "a-token-of-alice-0001", "b-token-of-bob-00002"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "tokens"
    path.write_text(f"# who may ask\nalice:{ALICE}\n\nbob:{BOB}\n")
    return str(path)


class Gateway(gateway_grpc.GatewayServiceServicer):
    """Says who asked."""

    async def ListModels(self, request, context):  # type: ignore[no-untyped-def]
        return gateway_pb.ListModelsResponse(models=[gateway_pb.Model(model=f"for {caller_name.get()}")])

    async def Generate(self, request, context):  # type: ignore[no-untyped-def]
        yield gateway_pb.GenerateResponse(started=gateway_pb.TurnAccepted(model=f"for {caller_name.get()}"))
        yield gateway_pb.GenerateResponse(finished=gateway_pb.TurnFinished())


@asynccontextmanager
async def serving(**settings: str) -> AsyncGenerator[str]:
    """A gateway's port as `run_service` opens it."""
    credentials, checks = server_security(ServiceSettings(**settings))
    server = grpc.aio.server(interceptors=checks)
    Gateway.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]  # a test writes only the calls it needs
    gateway_grpc.add_GatewayServiceServicer_to_server(Gateway(), server)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def asked(address: str, **access: object) -> str:
    async with sparkrelay.aio.connect(address, **access) as client:  # type: ignore[arg-type]
        (model,) = await client.list_models()
        assert (await client.generate(token_ids=[1])).model == model.name
        return model.name


async def refusal(address: str, **access: object) -> SparkRelayError:
    with pytest.raises(SparkRelayError) as refused:
        await asked(address, **access)
    return refused.value


def refused_blocking(address: str, token: str | None) -> None:
    with sparkrelay.connect(address, token=token) as client, pytest.raises(Unauthenticated):
        client.generate(token_ids=[1])


def test_a_token_file_gives_names_and_says_what_is_wrong_by_line(tmp_path: Path, token_file: str) -> None:
    assert read_token_file(token_file, "token_file") == {"alice": ALICE, "bob": BOB}
    assert first_token(token_file, "token_file") == ALICE
    bad = tmp_path / "bad"
    for text, message in [
        ("", "0 tokens"),
        ("alice", "line 1"),
        ("alice:short", "line 1"),
        (f"#\n:{ALICE}", "line 2"),
        (f"alice:{ALICE} x", "line 1"),
        (f"alice:{ALICE}\nalice:{BOB}", "'alice' twice"),
        ("alice:ünprintable-äscii-tökens", "line 1"),
    ]:
        bad.write_text(text)
        with pytest.raises(InsecureSettings, match=message):
            read_token_file(str(bad), "token_file")
    with pytest.raises(InsecureSettings, match=r"token_file: cannot read .*missing: No such file"):
        read_token_file(str(tmp_path / "missing"), "token_file")


def test_a_token_is_known_whole_or_not_at_all() -> None:
    table = TokenTable({"alice": ALICE, "bob": BOB})
    assert (table.name_of(ALICE), table.name_of(BOB)) == ("alice", "bob")
    for wrong in ("", ALICE[:-1], ALICE + "x", "alice", f"alice:{ALICE}", "\udcff"):
        assert table.name_of(wrong) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert": "cert"}, "tls_cert, tls_key"),
        ({"tls_key": "key"}, "tls_cert, tls_key"),
        ({"tls_client_ca": "ca"}, "tls_client_ca"),
        ({"tls_cert": "no-such-file", "tls_key": "no-such-file"}, "tls_key: cannot read no-such-file"),
        ({"token_file": "no-such-file"}, "token_file: cannot read no-such-file"),
    ],
)
def test_settings_that_protect_nothing_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InsecureSettings, match=message):
        server_security(ServiceSettings(**settings))


def test_a_service_dials_over_tls_when_it_knows_who_signs(
    certificates: Certificates, token_file: str
) -> None:
    assert dialling(ServiceSettings()) == Dialling()
    settings = ServiceSettings(
        tls_ca=certificates.ca,
        tls_cert=certificates.cert,
        tls_key=certificates.key,
        verifier_token_file=token_file,
    )
    made = dialling(settings)
    assert made.certificates is not None and made.certificates.cert == Path(certificates.cert).read_bytes()
    assert made.metadata == (("authorization", f"Bearer {ALICE}"),)


async def test_over_tls_the_right_ca_is_served_and_a_wrong_one_is_told_so(certificates: Certificates) -> None:
    async with serving(tls_cert=certificates.cert, tls_key=certificates.key) as address:
        assert await asked(address, ca=certificates.ca) == "for "
        wrong = await refusal(address, ca=certificates.other_ca)
        assert (type(wrong), wrong.reason) == (Unauthenticated, "UNAUTHENTICATED")
        assert "give the right CA" in wrong.message
        plain = await refusal(address)
        assert isinstance(plain, Unavailable)
        assert "it speaks TLS, give the CA file" in plain.message
    async with serving() as address:
        other_way = await refusal(address, ca=certificates.ca)
        assert isinstance(other_way, Unauthenticated)
        assert "does not speak TLS" in other_way.message


async def test_with_mtls_a_caller_without_a_certificate_is_told_to_give_one(
    certificates: Certificates,
) -> None:
    files = {"tls_cert": certificates.cert, "tls_key": certificates.key, "tls_client_ca": certificates.ca}
    async with serving(**files) as address:
        own = {"cert": certificates.cert, "key": certificates.key}
        assert await asked(address, ca=certificates.ca, **own) == "for "
        missing = await refusal(address, ca=certificates.ca)
        assert isinstance(missing, Unauthenticated)
        assert "client certificate" in missing.message and "cert and key" in missing.message


async def test_a_token_names_its_caller_and_a_wrong_or_missing_one_is_refused_in_every_call(
    token_file: str,
) -> None:
    async with serving(token_file=token_file) as address:
        assert await asked(address, token=ALICE) == "for alice"
        assert await asked(address, token=BOB) == "for bob"
        for token, what in [("wrong-token-of-nobody", "is not one"), (None, "is missing")]:
            refused = await refusal(address, token=token)
            assert (type(refused), refused.reason) == (Unauthenticated, "UNAUTHENTICATED")
            assert what in refused.message and "SPARKRELAY_TOKEN_FILE" in refused.message
            async with sparkrelay.aio.connect(address, token=token) as client:
                with pytest.raises(Unauthenticated):
                    await client.generate(token_ids=[1])
            await asyncio.to_thread(refused_blocking, address, token)
        async with grpc.aio.insecure_channel(address) as channel:
            stub = gateway_grpc.GatewayServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as basic:
                await stub.ListModels(
                    gateway_pb.ListModelsRequest(), metadata=(("authorization", f"Basic {ALICE}"),)
                )
            assert basic.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_environment_gives_certificates_and_token(certificates: Certificates, token_file: str) -> None:
    environment = {
        "SPARKRELAY_TOKEN_FILE": token_file,
        "SPARKRELAY_CA_FILE": certificates.ca,
        "SPARKRELAY_CERT_FILE": certificates.cert,
        "SPARKRELAY_KEY_FILE": certificates.key,
    }
    peer = resolve_peer("gateway.example:7070", Access(), environment)
    assert peer.dialling.token == ALICE
    assert peer.dialling.certificates is not None
    assert resolve_peer("localhost:7070", Access(tls=False, token=""), environment).dialling == Dialling()


def test_a_token_is_not_shown_to_a_whole_network_unless_it_is_trusted() -> None:
    with pytest.raises(InvalidRequest, match=r"unencrypted to gateway\.example:7070") as refused:
        resolve_peer("gateway.example:7070", Access(token=ALICE), {})
    assert refused.value.field == "token"
    for address, access in [
        ("127.0.0.1:7070", Access(token=ALICE)),
        ("[::1]:7070", Access(token=ALICE)),
        ("gateway.example:7070", Access(token=ALICE, tls=False)),
        ("gateway.example:7070", Access(token=ALICE, tls=True)),
    ]:
        assert resolve_peer(address, access, {}).dialling.token == ALICE
    with pytest.raises(InvalidRequest, match="cert, key"):
        resolve_peer("127.0.0.1:1", Access(cert="only this"), {})
