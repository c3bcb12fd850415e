"""What the doctor makes of facts: every unhealthy one is found, named, and answered with what to do."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sparkrelay.cli import doctor
from sparkrelay.cli import doctor_checks as checks
from sparkrelay.cli.doctor_checks import Clock, Finding, ModelOnDisk, Port, Runtime, Served
from sparkrelay.cli.requirements import Package, Requirement
from sparkrelay.client.results import Drafter, Model, Worker

MODEL = ModelOnDisk(
    "tiny", checked="5 files", tokenizer="ab" * 32, has_chat_template=True, weight_bytes=300_000_000
)
TINY = Model("tiny", 2048, 1000, True, 1, 1, True)


def drafter(state: str = "connected", message: str = "") -> Drafter:
    return Drafter("drafter-1", state, message, "ngram", 0, 400, 1200, 0, 0, 0)


def worker(state: str = "ready", *drafters: Drafter, exact: bool = True, **more: str) -> Worker:
    return Worker(
        "127.0.0.1:7071", state, "", 0, "v", "tiny", exact, depth_policy="auto", drafters=drafters, **more
    )


def levels(findings: Sequence[Finding]) -> list[str]:
    return [each.level for each in findings]


def test_a_healthy_stack_is_all_ok() -> None:
    served = Served("127.0.0.1:7070", models=(TINY,), workers=(worker("ready", drafter()),))
    findings = [
        checks.check_python((3, 11, 7), "Linux"),
        *checks.check_packages([Package(Requirement("a", ">=1", ""), "1.2")]),
        checks.check_clock(Clock(2e9, 1e-9, 1.9e9)),
        checks.check_cores(2, "2 threads"),
        checks.check_memory(10**10, MODEL, 10**9, is_served=False),
        *checks.check_model(MODEL, wanted=True),
        *checks.check_tokenizers_agree(MODEL, served.workers),
        checks.check_ports([Port("gateway", 7070), Port("verifier", 7071, "python (process 1)", ours=True)]),
        *checks.check_runtime(Runtime("r.json", "running", 1, "tiny", (("gateway", True),))),
        *checks.check_served(served),
    ]
    assert set(levels(findings)) == {"ok"} and len(findings) == 12
    assert not any(each.next_step for each in findings)
    assert doctor.verdict(findings) == "\nAll is well."


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 14, 0), (2, 7, 18)])
def test_another_python_fails(version: tuple[int, int, int]) -> None:
    finding = checks.check_python(version, "Linux")
    assert finding.level == "fail" and "3.11" in finding.next_step


def test_packages_that_are_missing_or_wrong_name_the_command_that_installs_them() -> None:
    findings = checks.check_packages(
        [
            Package(Requirement("grpcio", ">=2", ""), "1.0"),
            Package(Requirement("torch", ">=2", "verifier"), None),
            Package(Requirement("jinja2", ">=3", "gateway"), "3.1"),
        ]
    )
    assert levels(findings) == ["fail", "warn", "ok"]
    assert "grpcio 1.0 (>=2)" in findings[0].what
    assert "torch" in findings[1].what and "'sparkrelay[verifier]'" in findings[1].next_step
    assert levels(checks.check_packages([])) == ["warn"]
    assert levels(checks.check_packages([Package(Requirement("grpcio", "", ""), None)])) == ["fail"]


def test_a_port_that_somebody_else_holds_is_named_with_its_holder() -> None:
    finding = checks.check_ports([Port("gateway", 7070, "nginx (process 5)"), Port("verifier", 7071)])
    assert finding.level == "warn" and "7070 (gateway) by nginx (process 5)" in finding.what


@pytest.mark.parametrize(
    ("runtime", "level", "words"),
    [
        (Runtime("r.json", "absent"), "warn", "sparkrelay up"),
        (Runtime("r.json", "stale", 77), "warn", "77"),
        (Runtime("r.json", "unreadable"), "fail", "rm r.json"),
        (
            Runtime("r.json", "running", 5, "tiny", (("gateway", True), ("verifier", False))),
            "fail",
            "verifier",
        ),
    ],
)
def test_a_runtime_file_that_is_no_running_stack_is_found(runtime: Runtime, level: str, words: str) -> None:
    (finding,) = checks.check_runtime(runtime)
    assert finding.level == level and words in finding.what + finding.next_step


def test_a_missing_model_fails_only_if_it_is_wanted() -> None:
    missing = ModelOnDisk(
        "tiny", problem="tiny is not on this machine.", next_step="Run `sparkrelay models pull tiny`."
    )
    assert levels(checks.check_model(missing, wanted=False)) == ["warn"]
    (finding,) = checks.check_model(missing, wanted=True)
    assert finding.level == "fail" and "models pull" in finding.next_step


def test_a_tokenizer_that_is_broken_or_another_one_is_found() -> None:
    broken = ModelOnDisk("tiny", checked="x", tokenizer_problem="tokenizer.json cannot be loaded")
    assert levels(checks.check_model(broken, wanted=True)) == ["ok", "warn"]
    other = worker("ready", tokenizer_hash="cd" * 32)
    assert levels(checks.check_tokenizers_agree(MODEL, [other])) == ["warn"]
    assert checks.check_tokenizers_agree(MODEL, [worker("ready", tokenizer_hash="ab" * 32)]) == []


def test_memory_that_is_too_small_fails_unless_the_model_is_loaded_already() -> None:
    assert checks.check_memory(10**9, MODEL, 9 * 10**8, is_served=False).level == "fail"
    assert checks.check_memory(10**9, MODEL, 9 * 10**8, is_served=True).level == "ok"
    roomy = ModelOnDisk("tiny", weight_bytes=3 * 10**8, bytes_per_token=20_000)
    finding = checks.check_memory(2 * 10**9, roomy, 7 * 10**8, is_served=False)
    assert finding.level == "ok" and "50000 tokens" in finding.what


def test_a_gateway_that_is_known_but_does_not_answer_fails() -> None:
    assert checks.check_served(Served()) == []
    (finding,) = checks.check_served(
        Served("h:1", error="No gateway answers at h:1. Start one with `sparkrelay up`.")
    )
    assert finding.level == "fail" and "sparkrelay up" in finding.what
    assert levels(checks.check_served(Served("h:1"))) == ["fail"]


@pytest.mark.parametrize(
    ("seen", "expected", "words"),
    [
        (worker("lost"), ["fail"], "lost"),
        (worker("connecting"), ["fail"], "connecting"),
        (worker("draining", drafter()), ["warn", "ok", "ok"], "draining"),
        (worker("ready", drafter(), exact=False, exact_reason="rope scales"), ["warn", "ok"], "rope scales"),
        (worker("ready"), ["ok", "warn"], "no drafter has dialled it"),
        (
            worker("ready", drafter("refused", "vocab_size: 5, not 7")),
            ["ok", "fail", "warn"],
            "vocab_size: 5, not 7",
        ),
        (worker("ready", drafter("lost", "silent for 3 s")), ["ok", "warn"], "silent for 3 s"),
    ],
)
def test_a_worker_that_is_away_inexact_or_plain_says_why(
    seen: Worker, expected: list[str], words: str
) -> None:
    findings = list(checks.check_worker(seen))
    assert levels(findings) == expected
    assert any(words in each.what for each in findings)


def test_a_clock_before_the_installation_fails_and_a_coarse_one_warns() -> None:
    assert checks.check_clock(Clock(0.0, 1e-9, 1.7e9)).level == "fail"
    assert checks.check_clock(Clock(1.8e9, 0.016, 1.7e9)).level == "warn"


def test_one_core_is_a_warning() -> None:
    assert checks.check_cores(1, "1 thread").level == "warn"


def test_the_verdict_counts() -> None:
    bad, odd = Finding("fail", "a", "b", "c"), Finding("warn", "a", "b")
    assert "1 failure, 2 warnings" in doctor.verdict([bad, odd, odd])
    assert "Nothing is broken; 1 warning." in doctor.verdict([odd])
