"""Whose prompts may share what was computed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparkrelay
from gateway.settings import GatewaySettings
from gateway.tenants import prefix_salt
from sparkrelay.settings import read
from tests.gateway.fake_verifier import running


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=2, max_size=2, unique=True))
def test_no_two_tenants_or_secrets_have_one_salt(names: list[tuple[str, str]]) -> None:
    first, second = (prefix_salt(secret, tenant) for secret, tenant in names)
    assert first != second
    assert max(len(first), len(second)) == 16 and first == prefix_salt(*names[0])


def test_salts_are_known_answers_that_all_gateways_agree_on() -> None:
    assert prefix_salt("", "") == b""
    assert prefix_salt("secret", "").hex() == "ce5242180e2a8f4f9449594861c285b5"
    assert prefix_salt("secret", "alice").hex() == "ac10a749eb8aa4def05e43cf545d228a"


@pytest.mark.parametrize("secret", ["", "a secret of ours"])
async def test_every_turn_tells_the_verifier_the_salt(secret: str) -> None:
    async with (
        running(prefix_salt_secret=secret) as stack,
        sparkrelay.aio.connect(stack.address) as client,
    ):
        session = await client.create_session()
        for _ in range(2):
            await session.generate(token_ids=[5, 9], max_tokens=2)
        await client.generate(token_ids=[5, 9], max_tokens=2)
        assert {each.prefix_salt for each in stack.verifier.requests} == {prefix_salt(secret, "")}
        assert len(stack.verifier.requests) == 3


def test_the_secret_is_never_shown() -> None:
    settings = read(GatewaySettings, [], {"SPARKRELAY_GATEWAY_PREFIX_SALT_SECRET": "hush"})
    assert settings.prefix_salt_secret.get_secret_value() == "hush" and "hush" not in repr(settings)
