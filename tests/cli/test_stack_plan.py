"""What `up` starts, before it starts anything."""

from __future__ import annotations

import socket

from sparkrelay.cli.stack_plan import StackOptions, any_free_port, free_port, plan_stack
from sparkrelay.host.cores import plan_threads


def argument(arguments: tuple[str, ...], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def test_the_usual_ports_are_taken_where_they_are_free() -> None:
    plan = plan_stack(StackOptions(drafter_count=2), cores=2, pick_port=lambda usual: usual)
    assert [process.listen for process in plan.processes] == [
        "127.0.0.1:7071",
        "127.0.0.1:7072",
        "127.0.0.1:7073",
        "127.0.0.1:7070",
    ]
    assert plan.gateway.health_listen == "127.0.0.1:7170"


def test_drafters_and_gateway_dial_the_verifier_of_the_plan() -> None:
    ports = iter(range(9000, 9100))
    plan = plan_stack(StackOptions(drafter_count=2), cores=2, pick_port=lambda _usual: next(ports))
    for process in (*plan.drafters, plan.gateway):
        assert argument(process.arguments, "--verifiers") == plan.verifier.listen == "127.0.0.1:9000"
    assert (
        len({process.listen for process in plan.processes} | {p.health_listen for p in plan.processes}) == 8
    )


def test_threads_and_their_spinning_are_those_of_the_plan() -> None:
    for cores, drafter_count in ((2, 1), (4, 1), (16, 1), (16, 2)):
        plan = plan_stack(StackOptions(drafter_count=drafter_count), cores, free_port)
        threads = plan_threads(cores, drafter_count)
        assert argument(plan.verifier.arguments, "--threads") == str(threads.verifier)
        for drafter in plan.drafters:
            assert argument(drafter.arguments, "--threads") == str(threads.drafter)
        for process in (plan.verifier, *plan.drafters):
            assert process.environment == threads.environment


def test_the_gateway_finds_the_text_of_a_model_in_a_folder_and_asks_for_none_of_a_toy() -> None:
    plan = plan_stack(StackOptions(model="./models/mine"), 2, free_port)
    assert argument(plan.gateway.arguments, "--tokenizer") == "./models/mine"
    for toy in ("toy", "toy:free"):
        assert "--tokenizer" not in plan_stack(StackOptions(model=toy), 2, free_port).gateway.arguments


def test_drafter_none_is_a_stack_without_drafters() -> None:
    assert plan_stack(StackOptions(drafter="none"), 2, free_port).drafters == ()


def test_the_verifier_makes_the_rows_that_a_trained_draft_reads() -> None:
    for kind in ("dspark", "dflash", "mtp"):
        plan = plan_stack(
            StackOptions(model="some-model", drafter=kind, drafter_model="./draft"), 2, free_port
        )
        assert argument(plan.verifier.arguments, "--context") == "./draft"
        (drafter,) = plan.drafters
        assert argument(drafter.arguments, "--model") == "./draft"
        assert argument(drafter.arguments, "--target") == "some-model"
    assert "--context" not in plan_stack(StackOptions(), 2, free_port).verifier.arguments


def test_a_causal_lm_drafter_without_a_model_gets_the_target_itself() -> None:
    plan = plan_stack(StackOptions(model="some-model", drafter="causal_lm"), 2, free_port)
    assert argument(plan.drafters[0].arguments, "--model") == "some-model"


def test_further_flags_reach_their_service_alone() -> None:
    plan = plan_stack(StackOptions(flags={"drafter": ("--seed", "7")}), 2, free_port)
    assert plan.drafters[0].arguments[-2:] == ("--seed", "7")
    assert "--seed" not in plan.verifier.arguments


def test_a_busy_port_is_replaced_by_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = busy.getsockname()[1]
        assert free_port(taken) not in (taken, 0)
    assert any_free_port(7070) != 7070
