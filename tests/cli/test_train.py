"""`sparkrelay train`, from a tiny target alone to a draft that can be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from drafter_service.calibration import load_calibration
from drafter_service.models.dspark.checkpoint import load_draft, load_mtp, read_config, target_vocabulary
from drafter_service.training import calibration_run
from drafter_service.training.pipeline import target_fingerprint
from sparkrelay.cli import build_app
from tests.drafter_service.training.tiny_target import save_target, save_tokenizer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_target(tmp_path_factory.mktemp("target"))
    save_tokenizer(folder)
    return folder


def train(work: Path, target: Path, *arguments: str) -> Result:
    command = [
        "train",
        str(work),
        "--target",
        str(target),
        "--samples",
        "44",
        "--sequences",
        "11",
        "--threads",
        "1",
    ]
    small = ["samples_per_step=2", "anchors_per_sample=4", "block_size=3", "rank=4", "warmup_steps=2"]
    return CliRunner().invoke(
        build_app(), [*command, *(part for one in small for part in ("--set", one)), *arguments]
    )


@pytest.mark.timeout(300)
def test_one_command_trains_goes_on_and_refuses_to_mix_runs(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_run, "FEWEST_ANCHORS", 10)  # so few samples hold out little
    first = train(tmp_path, target, "--set", "steps=3")
    assert first.exit_code == 0, first.output
    run = tmp_path / "runs" / "dspark"
    assert "step 3: held out: loss" in first.output
    network = load_draft(run / "draft", torch.bfloat16, target_vocabulary(target))
    assert (network.config.block_size, network.config.markov_rank) == (3, 4)
    about = read_config(run / "draft")
    assert about["target"] == target_fingerprint(target.name, target)
    assert about["training"]["steps_done"] == 3
    assert about["mask_token_id"] == 8  # the last special token that ends or begins nothing
    samples = (tmp_path / "data" / "samples.jsonl").read_text()

    second = train(tmp_path, target, "--set", "steps=5")
    assert second.exit_code == 0, second.output
    assert (tmp_path / "data" / "samples.jsonl").read_text() == samples
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == [3, 5]

    calibrated = CliRunner().invoke(build_app(), ["calibrate", str(tmp_path), "--target", str(target)])
    assert calibrated.exit_code == 0, calibrated.output
    assert "greedy turns" in calibrated.output and "ECE BEFORE" in calibrated.output
    assert len(load_calibration(run / "draft").greedy) == 3

    third = train(tmp_path, target, "--set", "steps=5", "--set", "learning_rate=0.5")
    assert third.exit_code == 1
    assert "learning_rate: is 0.5, but" in third.output and "give the run another name" in third.output

    mtp = train(tmp_path, target, "--kind", "mtp", "--run", "mtp", "--set", "steps=2", "--no-keep-states")
    assert mtp.exit_code == 0, mtp.output
    calibrated = CliRunner().invoke(
        build_app(), ["calibrate", str(tmp_path), "--target", str(target), "--run", "other"]
    )
    assert calibrated.exit_code == 1 and "is no run" in calibrated.output
    load_mtp(tmp_path / "runs" / "mtp" / "draft", torch.float32, target_vocabulary(target))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "eagle"], "choose dspark, dflash or mtp"),
        (["--set", "speed=3"], "write NAME=VALUE; the names are taps,"),
        (["--set", "steps=many"], "'many' is no value for it"),
        (["--set", "taps=3"], "target_layer_ids: 3 cannot be read"),
    ],
)
def test_what_cannot_be_trained_is_said(
    target: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = train(tmp_path, target, *arguments)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.replace("│", " ").split())
