"""The verifier's settings, and how many state blocks they come to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sparkrelay.settings import InvalidSettings, read
from verifier_service.__main__ import served_info
from verifier_service.host_memory import MIB, block_count, free_bytes
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


def test_blocks_fill_the_memory_they_are_given() -> None:
    info = replace(ToyModel().info, block_bytes=3 * MIB)
    assert block_count(info, 10, 0) == 3
    assert block_count(info, 0, 600 * MIB) == 100
    with pytest.raises(ValueError, match="state_memory_mib"):
        block_count(info, 2, 0)


def test_a_container_limit_counts(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert free_bytes(tmp_path) > 0
    (tmp_path / "memory.max").write_text("12\n")
    assert free_bytes(tmp_path) == 7
