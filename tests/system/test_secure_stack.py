"""The whole stack over mTLS with tokens: real processes that trust nobody without both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sparkrelay.client import Unauthenticated
from sparkrelay.client.blocking import connect
from tests.certificates import make_certificates
from tests.system.conftest import TOY, StartStack, drafter_beside

pytestmark = pytest.mark.system

TURN = {"token_ids": [7, 3, 9, 7, 3, 9, 7, 3], "max_tokens": 64, "ignore_default_stop_ids": True}


def test_the_whole_stack_generates_over_mtls_with_tokens(
    own_stack: StartStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_certificates(tmp_path)
    tokens = {name: tmp_path / name for name in ("clients", "services")}
    for name, path in tokens.items():
        path.write_text(f"{name}:a-token-of-{name}-{'0' * 16}\n")
    own = ("--tls-cert", made.cert, "--tls-key", made.key, "--tls-client-ca", made.ca)
    dials = ("--tls-ca", made.ca, "--verifier-token-file", str(tokens["services"]))
    added = {
        "verifier": (*own, "--token-file", str(tokens["services"])),
        "gateway": (*own, *dials, "--token-file", str(tokens["clients"])),
        "drafter": (*own, *dials, "--token-file", str(tokens["services"])),
    }
    flags = {name: (*TOY.flags.get(name, ()), *added[name]) for name in ("verifier", "gateway")}
    for variable, value in {
        "SPARKRELAY_CA_FILE": made.ca,
        "SPARKRELAY_CERT_FILE": made.cert,
        "SPARKRELAY_KEY_FILE": made.key,
        "SPARKRELAY_TOKEN_FILE": str(tokens["clients"]),
    }.items():
        monkeypatch.setenv(variable, value)
    stack = own_stack(replace(TOY, flags=flags))
    beside = drafter_beside(stack, "ngram", tmp_path, added["drafter"])
    with beside, connect(stack.gateway) as client:
        plain = client.generate(**TURN, speculation="off")
        drafted = client.generate(**TURN)
        assert drafted.token_ids == plain.token_ids
        assert drafted.totals.accepted > 0
    for wrong in ({"token": "a-token-of-nobody-000"}, {"ca": made.other_ca}, {"cert": "", "key": ""}):
        with connect(stack.gateway, **wrong) as client, pytest.raises(Unauthenticated):
            client.generate(**TURN)
