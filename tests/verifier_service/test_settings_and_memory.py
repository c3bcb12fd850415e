"""The verifier's settings, and how many state blocks they come to."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from sparkrelay.host.memory import MIB, FreeMemory
from sparkrelay.outcomes import FinishReason, Reason
from sparkrelay.settings import InvalidSettings, read
from tests.verifier_service.driver import Driver, of, turn
from verifier_service.__main__ import load_model, served_info
from verifier_service.events import TurnOver, TurnRefused
from verifier_service.memory_plan import plan_state, require_room_for_weights, weight_bytes
from verifier_service.models.toy import ToyModel
from verifier_service.settings import VerifierSettings


def test_every_setting_says_what_it_means() -> None:
    for name, field in VerifierSettings.model_fields.items():
        assert field.description and field.description.endswith("."), name


def test_flags_win_over_the_environment() -> None:
    environ = {"SPARKRELAY_VERIFIER_MODEL": "toy", "SPARKRELAY_VERIFIER_THREADS": "2"}
    settings = read(VerifierSettings, ["--threads", "3", "--depth-policy", "fixed:7"], environ)
    assert (settings.model, settings.threads, settings.depth_policy) == ("toy", 3, "fixed:7")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("depth_policy", "fixed:16"), ("dtype", "int8"), ("step_token_budget", "1"), ("model", "")],
)
def test_a_wrong_setting_is_named(flag: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=flag):
        read(VerifierSettings, [f"--{flag.replace('_', '-')}", value], {})


@pytest.mark.parametrize(("setting", "told"), [(0, 4096), (100, 100), (9999, 4096)])
def test_callers_are_told_the_smaller_of_the_models_limit_and_the_setting(setting: int, told: int) -> None:
    info = replace(ToyModel().info, context_limit=4096)
    assert served_info(info, setting) == replace(info, context_limit=told)


INFO = replace(ToyModel().info, block_bytes=3 * MIB, block_tokens=512, context_limit=2048)
AMPLE = FreeMemory(100_000 * MIB, "machine")


@pytest.mark.parametrize(
    ("free_mib", "set_mib", "margin_mib", "blocks"),
    [
        (0, 10, 2048, 3),  # what was set, whatever is free
        (9000, 10, 2048, 3),
        (8048, 0, 2048, 2000 - 4),  # what is free less the margin, less the growth of one session of 4 blocks
        (8048, 0, 0, 2682 - 4),
        (600, 0, 2048, 100 - 4),  # the margin is never more than half
        (24, 0, 2048, 2),  # nor the growth
        (6, 0, 2048, 1),
    ],
)
def test_state_gets_what_is_free_less_a_margin(
    free_mib: int, set_mib: int, margin_mib: int, blocks: int
) -> None:
    free = FreeMemory(free_mib * MIB, "machine")
    plan = plan_state(INFO, free, state_memory_mib=set_mib, memory_margin_mib=margin_mib)
    assert plan.block_count == blocks and plan.token_count == 512 * blocks
    if not set_mib:
        needed = blocks * INFO.block_bytes + plan.margin_bytes + plan.growth_bytes
        assert free.byte_count - INFO.block_bytes < needed <= free.byte_count
    facts = plan.facts()
    assert (facts["state_blocks"], facts["free_mib"], facts["free_by"]) == (blocks, free_mib, "machine")


def test_too_little_for_one_block_is_refused_with_what_is_free_and_what_to_set() -> None:
    with pytest.raises(
        ValueError, match=r"state_memory_mib: 2 MiB hold no block of 512 .* set at least 3, or 0"
    ):
        plan_state(INFO, AMPLE, state_memory_mib=2, memory_margin_mib=0)
    little = FreeMemory(5 * MIB, "container limit")
    with pytest.raises(ValueError, match=r"5 MiB are free \(container limit\), 2 of them kept back .*margin"):
        plan_state(INFO, little, state_memory_mib=0, memory_margin_mib=2048)


def checkpoint(folder: Path, header: dict[str, object]) -> Path:
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    return folder


TENSORS: dict[str, object] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "BF16", "shape": [1024, 1024], "data_offsets": [0, 2 * MIB]},
    "b": {"dtype": "F32", "shape": [512, 1024], "data_offsets": [2 * MIB, 4 * MIB]},
    "c": {"dtype": "U8", "shape": [MIB], "data_offsets": [4 * MIB, 5 * MIB]},
}


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, TENSORS)
    assert weight_bytes(folder, 2) == 4 * MIB and weight_bytes(folder, 4) == 7 * MIB
    require_room_for_weights(folder, "bfloat16", FreeMemory(4 * MIB, "machine"))
    with pytest.raises(ValueError, match=r"at least 4 MiB as bfloat16, and 3 MiB are free \(machine\)"):
        require_room_for_weights(folder, "bfloat16", FreeMemory(4 * MIB - 1, "machine"))
    with pytest.raises(ValueError, match="use dtype bfloat16"):
        require_room_for_weights(folder, "float32", FreeMemory(4 * MIB, "machine"))
    (folder / "config.json").write_text("{}")
    settings = read(VerifierSettings, ["--model", str(folder)], {})
    with pytest.raises(ValueError, match="model: the weights"):
        load_model(settings, lambda: FreeMemory(0, "machine"))


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 16, struct.pack("<Q", 4) + b"{{{{"])
def test_a_file_that_is_no_checkpoint_is_left_to_the_loader(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    require_room_for_weights(tmp_path, "bfloat16", FreeMemory(0, "machine"))


def test_a_request_that_can_never_fit_is_refused_with_tokens_limit_and_setting() -> None:
    free = FreeMemory(12 * MIB, "machine")
    info = replace(ToyModel().info, block_bytes=3 * MIB)
    plan = plan_state(info, free, state_memory_mib=0, memory_margin_mib=2048)
    driver = Driver(block_count=plan.block_count)
    assert plan.token_count == 16
    [refused] = of(driver.run(turn("s", "t", [1] * 16)), TurnRefused)
    assert (refused.reason, refused.field) == (Reason.OUT_OF_MEMORY, "append_token_ids")
    for part in ("16 tokens", "room for 16", "state_memory_mib"):
        assert part in refused.message
    [over] = of(driver.run(turn("s", "u", [1] * 15, max_tokens=9)), TurnOver)
    assert (over.finish_reason, over.session_token_count) == (FinishReason.CONTEXT, 16)
