"""The projector: the draft's own, whatever the family; what it is called; which folders are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from drafter_service.models.dspark.checkpoint import save_draft
from drafter_service.models.dspark.drafter import projector_hash
from drafter_service.models.mtp.drafter import identity_hash
from drafter_service.models.mtp.network import MtpNetwork, mtp_of
from sparkrelay.device.projector import Projector, UnusableProjector, load_projector
from tests.device.tiny_drafts import save_projector
from tests.drafter_service.models.dspark_networks import HIDDEN, draft_config, random_network, target_config

TARGET = {"hidden_size": 48, "layer_count": 4}


def taps_of(projector: Projector, row_count: int, hidden: int, seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randn(row_count, hidden, generator=generator).bfloat16()
        for layer in projector.tap_layers
    }


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_and_hash_are_those_of_the_draft_itself(family: str, tmp_path: Path) -> None:
    network = random_network(draft_config(family)).bfloat16()
    save_draft(network, tmp_path / "draft", {}, with_vocabulary=False)
    projector = load_projector(tmp_path / "draft", hidden_size=HIDDEN, layer_count=9)
    assert projector.tap_layers == network.config.target_layer_ids
    assert (projector.width, projector.hash) == (HIDDEN, projector_hash(network))
    taps = taps_of(projector, 8, HIDDEN)
    expected = network.context_rows(torch.cat([taps[layer] for layer in projector.tap_layers], dim=-1))
    assert torch.equal(projector.rows(taps, 4), expected) and expected.abs().max() > 0.1


def test_a_row_does_not_depend_on_its_company(tmp_path: Path) -> None:
    projector = load_projector(save_projector(tmp_path / "draft"), **TARGET)
    taps = taps_of(projector, 70, 48)
    together = projector.rows(taps, 4)
    for start, stop in ((0, 1), (1, 4), (4, 11), (11, 70)):
        part = projector.rows({layer: rows[start:stop] for layer, rows in taps.items()}, 4)
        assert torch.equal(part, together[start:stop])


def test_products_have_as_many_rows_as_the_targets_are_padded_to() -> None:
    seen: list[int] = []

    def project(side_by_side: torch.Tensor) -> torch.Tensor:
        seen.append(len(side_by_side))
        assert not side_by_side[5:].any(), "what pads is finite"
        return side_by_side[:, :48]

    projector = Projector((2, 0), 48, "hash", project)
    taps = taps_of(projector, 5, 48)
    for multiple in (1, 4, 16):
        assert torch.equal(projector.rows(taps, multiple), taps[2])
    assert seen == [5, 8, 16]


def test_an_mtp_draft_reads_the_last_layer_as_it_is(tmp_path: Path) -> None:
    network = MtpNetwork(mtp_of(target_config()))
    save_draft(network, tmp_path / "draft", {}, with_vocabulary=False)
    projector = load_projector(tmp_path / "draft", hidden_size=HIDDEN, layer_count=9)
    assert (projector.tap_layers, projector.hash) == ((8,), identity_hash(8))
    taps = taps_of(projector, 5, HIDDEN)
    assert torch.equal(projector.rows(taps, 4), taps[8])
    with pytest.raises(UnusableProjector, match="num_target_layers: is 9; the target has 4"):
        load_projector(tmp_path / "draft", hidden_size=HIDDEN, layer_count=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 64}, "hidden_size: is 64; the target has 48"),
        ({"target_layer_ids": None}, "target_layer_ids: is None"),
        ({"target_layer_ids": [1, "2"]}, "a list of 1 to 64 layers is needed"),
        ({"target_layer_ids": [0, 4]}, "has 4; the target has layers 0 to 3"),
        ({"target_layer_ids": [-2]}, "has -2"),
        ({"target_layer_ids": [1, 3]}, r"fc.weight: is \[48, 144\]; for this target \[48, 96\] is needed"),
        ({"rms_norm_eps": None}, "rms_norm_eps: is None"),
    ],
)
def test_a_draft_for_another_target_is_refused_by_the_field(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnusableProjector, match=message):
        load_projector(save_projector(tmp_path / "draft", **fields), **TARGET)


def test_a_folder_that_is_no_draft_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"config\.json"):
        load_projector(tmp_path, **TARGET)
    draft = save_projector(tmp_path / "draft")
    weights = (draft / "model.safetensors").read_bytes()
    (draft / "model.safetensors").write_bytes(weights[:40])
    with pytest.raises(UnusableProjector, match="cannot be read"):
        load_projector(draft, **TARGET)
    (draft / "model.safetensors").write_bytes(weights.replace(b"fc.weight", b"fd.weight"))
    with pytest.raises(UnusableProjector, match=r"fc\.weight: is missing"):
        load_projector(draft, **TARGET)
    (draft / "config.json").write_text("[]")
    with pytest.raises(UnusableProjector, match="is no JSON object"):
        load_projector(draft, **TARGET)


def test_weights_may_lie_in_several_files(tmp_path: Path) -> None:
    draft = save_projector(tmp_path / "draft")
    whole = load_projector(draft, **TARGET)
    (draft / "model.safetensors").rename(draft / "part-1.safetensors")
    names = dict.fromkeys(("fc.weight", "hidden_norm.weight"), "part-1.safetensors")
    (draft / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert load_projector(draft, **TARGET).hash == whole.hash
