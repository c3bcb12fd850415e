"""Settings, thread plan, and the calls that tell people what a drafter is and does."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio
import pytest

from drafter_service.engine import Totals
from drafter_service.links import LinkState, LinkStatus
from drafter_service.servicer import DrafterServicer
from drafter_service.settings import DrafterSettings
from sparkrelay.frames import Fingerprint, Hello
from sparkrelay.settings import InvalidSettings, read
from sparkrelay.v1 import drafter_service_pb2 as pb2
from sparkrelay.v1 import drafter_service_pb2_grpc as pb2_grpc


def test_the_defaults_are_prompt_lookup_for_the_verifier_on_this_machine() -> None:
    settings = read(DrafterSettings, [], {})
    assert (settings.kind, settings.verifier_addresses, settings.block_size) == (
        "ngram",
        ("127.0.0.1:7071",),
        7,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--verifiers", "nowhere"], "verifiers: 'nowhere' is no address"),
        (["--verifiers", "a:1,a:1"], "verifiers: names an address twice"),
        (["--ngram-min", "5"], "ngram_min 5 is above ngram_max 4"),
        (["--backoff-min-ms", "9000"], "backoff_min_ms 9000 is above backoff_max_ms 3000"),
        (["--kind", "causal_lm"], "the kind causal_lm needs one"),
        (["--block-size", "16"], "block_size: .* less than or equal to 15"),
    ],
)
def test_settings_that_cannot_work_name_the_field(flags: list[str], message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        read(DrafterSettings, flags, {})


def test_link_states_have_the_numbers_of_the_proto() -> None:
    for state in LinkState:
        assert pb2.LinkStatus.State.Name(state) == f"STATE_{state.name}"


@pytest.fixture
async def stub() -> AsyncIterator[pb2_grpc.DrafterServiceAsyncStub]:
    hello = Hello(1, 1, "drafter-1", "run", Fingerprint(block_size=7, proposal_kind="ngram"))
    totals = Totals(sessions_by_link={4: 2}, block_count=5, token_count=20, step_us=30)
    refused = LinkStatus("b:2", LinkState.REFUSED, "vocab_size differs")
    connected = LinkStatus("a:1", LinkState.CONNECTED, "", "verifier-1")
    server = grpc.aio.server()
    servicer = DrafterServicer(hello, totals, lambda: [(connected, 4), (refused, 9)])
    pb2_grpc.add_DrafterServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield pb2_grpc.DrafterServiceStub(channel)
    servicer.end_watches()
    await server.stop(0)


async def test_describe_says_what_it_needs_of_a_verifier(stub: pb2_grpc.DrafterServiceAsyncStub) -> None:
    answer = await stub.Describe(pb2.DrafterServiceDescribeRequest())
    assert (answer.drafter_id, answer.incarnation, answer.fingerprint.proposal_kind) == (
        "drafter-1",
        "run",
        "ngram",
    )


async def test_load_names_every_link_and_what_went_wrong_with_it(
    stub: pb2_grpc.DrafterServiceAsyncStub,
) -> None:
    report = await stub.WatchLoad(pb2.DrafterServiceWatchLoadRequest()).read()
    assert isinstance(report, pb2.DrafterServiceWatchLoadResponse)
    assert (report.session_count, report.block_count, report.token_count, report.step_us) == (2, 5, 20, 30)
    assert [(link.address, link.session_count, link.message) for link in report.links] == [
        ("a:1", 2, ""),
        ("b:2", 0, "vocab_size differs"),
    ]
