"""The benchmarks end to end on the toy model: real processes, every promised key, every gap by name."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks import engine, own_engine, peers, soak
from benchmarks.peer_settings import PeerSettings, Search, read_settings, write_settings
from benchmarks.systems import ChildSystem, Gap
from benchmarks.vllm_environment import VllmSetting
from benchmarks.workload import Workload

QUIET = Console(quiet=True)
PROMPTS = Workload(tuple((number % 13 + 1, 2, 3, number % 7 + 1) for number in range(40)))

pytestmark = pytest.mark.system


def rendered(table: Table) -> str:
    file = io.StringIO()
    Console(width=130, file=file).print(table)
    return file.getvalue()


def test_engine_reports_every_user_count_by_stack_and_engine_alike(tmp_path: Path) -> None:
    options = engine.Options("toy", user_counts=(1, 8), token_count=24, repeats=2, threads=1)
    measured, lanes, facts = engine.run(options, PROMPTS, None, tmp_path, QUIET)
    result = json.loads(json.dumps(engine.as_result(measured, lanes, engine.Floor(0, 0.0), facts, options)))
    assert result["plain_over_transformers"] is None, "the toy is no model of transformers"
    assert result["users8_over_users1"] > 0
    assert set(result["tokens_per_s"]) == {"1", "8"} and min(result["tokens_per_s"].values()) > 0
    assert result["by_system"]["engine"]["8"]["count"] == 2
    assert result["ratios"]["stack_over_engine"]["1"]["median"] > 0
    assert result["gaps"] == {} and result["floor"]["ms"] == 0
    assert measured.agreement("engine", "stack") == 1.0, "both are the same engine on the same prompts"
    assert set(result["step_profile_ms"]["8"]) == set(engine.PARTS) == set(own_engine.PARTS)
    assert result["step_profile_ms"]["8"]["choice"] > 0
    assert " choice" in rendered(engine.profile_table(result))
    assert measured.of("stack", 8)[0].answers[7].marks[-1][1] == 24
    assert "plain_over_transformers: not measured, budget 1.5" in rendered(
        engine.table(measured, lanes, engine.Floor(0, 0.0), result)
    )


def test_peers_that_are_not_here_are_named_gaps_beside_our_figures(tmp_path: Path) -> None:
    options = peers.Options(
        "toy", user_counts=(1, 2), token_count=24, repeats=2, threads=1, vllm_python="/nonexistent/python"
    )
    search = Search(PROMPTS, QUIET, first_only=True)
    settings = PeerSettings()
    peers.find_settings(settings, search, options, tmp_path, tmp_path)
    assert settings.transformers_plain and settings.vllm_ngram
    measured, lanes, facts = peers.run(options, settings, PROMPTS, tmp_path, tmp_path, QUIET)
    result = json.loads(json.dumps(peers.as_result(measured, lanes, facts, options)))
    assert set(result["tokens_per_s"]) == {"ours plain", "ours ngram"}
    assert set(result["tokens_per_s"]["ours ngram"]) == {"1", "2"}
    assert set(result["gaps"]) == {*peers.PLAIN_PEERS, *peers.SPECULATIVE_PEERS}
    assert "/nonexistent/python" in result["gaps"]["vllm plain"]
    assert result["plain_over_vllm"] == {"1": None, "2": None}
    assert result["speculative_over_best_peer"] is None
    assert result["agreement_with_ours"]["ours ngram"] == 1.0, "speculation changes no token"
    assert result["accepted_length"]["ours plain"]["1"] == 1.0 < result["accepted_length"]["ours ngram"]["1"]
    shown = rendered(peers.table(measured, lanes, result))
    assert "gap: vllm ngram" in shown and "gap: transformers lookup" in shown


def test_without_vllm_the_gap_says_how_to_get_it(tmp_path: Path) -> None:
    settings = PeerSettings()
    search = Search(PROMPTS, QUIET, first_only=True)
    peers.find_settings(settings, search, peers.Options(), tmp_path, tmp_path)
    assert settings.gaps == dict.fromkeys(("vllm plain", "vllm ngram"), peers.NO_VLLM)
    assert "--install-vllm" in peers.NO_VLLM and settings.complete


def test_a_search_that_was_broken_off_goes_on_where_it_was(tmp_path: Path) -> None:
    file = str(tmp_path / "settings.json")
    assert read_settings(file) == PeerSettings() == read_settings("")
    tried = {"vllm plain": {"all cores": 40.0, "as it comes": 50.0}}
    write_settings(file, PeerSettings("sdpa, dynamic cache", "3 tokens, up to 2-grams", tried=tried))
    found = read_settings(file)
    started: list[str] = []

    def start(name: str, setting: VllmSetting) -> ChildSystem:
        started.append(name)
        raise Gap("not here")

    settings = {"all cores": VllmSetting(), "as it comes": VllmSetting(), "eager": VllmSetting()}
    Search(PROMPTS, QUIET, file=file).of_vllm(start, settings, found)
    assert started.count("vllm plain") == 1, "two of the three were tried before"
    assert found.vllm_plain == "as it comes", "the fastest one"
    assert started.count("vllm ngram") == 3 and found.vllm_ngram == ""
    assert "3 tokens, up to 4-grams: not here" in found.gaps["vllm ngram"]
    assert read_settings(file).tried["vllm plain"] == tried["vllm plain"]


def test_a_soaked_stack_holds_nothing_when_its_users_have_gone(tmp_path: Path) -> None:
    options = soak.Options("toy", minutes=8 / 60, sessions=8, state_memory_mib=1, threads=1)
    soaked = soak.soak(options, tmp_path, QUIET)
    result = json.loads(json.dumps(soak.as_result(soaked, options)))
    assert (result["leaked_blocks"], result["leaked_handles"]) == (0, 0)
    assert (result["open_turns"], result["gateway_sessions"]) == (0, 0)
    assert result["errors"] == {}
    for key in (
        "turns",
        "tokens",
        "sessions",
        "cancelled_turns",
        "rewinds",
        "drafted_tokens",
        "accepted_tokens",
    ):
        assert result[key] > 0, f"a run without any {key} shows nothing"
    assert set(result["rss_slope_mib_per_min"]) == {"verifier", "drafter-1", "gateway"}
    assert all(isinstance(slope, float) for slope in result["rss_slope_mib_per_min"].values())
    assert "left: 0 blocks, 0 handles, 0 open turns, 0 sessions" in rendered(soak.table(soaked, result))


def test_what_is_left_is_seen() -> None:
    """The count would be zero as well if nobody looked."""
    assert soak.Leftovers(0, 0, 0, 0).nothing
    for field in range(4):
        counts = [0, 0, 0, 0]
        counts[field] = 1
        assert not soak.Leftovers(*counts).nothing
