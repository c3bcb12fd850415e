"""The plan of threads, as a table of machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkrelay.host.cgroups import Cgroups
from sparkrelay.host.cores import Cores, ThreadPlan, explain, plan_threads, read_cores, usable_cores

# usable, physical, quota, drafters: cores to compute with, verifier's and drafter's threads, spin count
MACHINES = [
    (1, 1, None, 1, 1, ThreadPlan(1, 1, None)),
    (2, 2, None, 1, 2, ThreadPlan(2, 1, None)),
    (4, 4, None, 1, 4, ThreadPlan(4, 1, None)),
    (4, 2, None, 1, 2, ThreadPlan(2, 1, None)),  # two cores of two threads each
    (8, 8, None, 1, 8, ThreadPlan(8, 2, 10_000)),
    (16, 8, None, 1, 8, ThreadPlan(8, 2, 10_000)),
    (64, 64, None, 1, 64, ThreadPlan(64, 16, 10_000)),
    (64, 64, None, 4, 64, ThreadPlan(64, 4, 10_000)),
    (8, 8, None, 9, 8, ThreadPlan(8, 1, 10_000)),
    (64, 64, 4.0, 1, 4, ThreadPlan(4, 1, None)),  # a container on a large machine
    (64, 64, 2.5, 1, 2, ThreadPlan(2, 1, None)),
    (64, 64, 0.5, 1, 1, ThreadPlan(1, 1, None)),
    (2, 2, 16.0, 1, 2, ThreadPlan(2, 1, None)),  # a quota above what there is
]


@pytest.mark.parametrize(("usable", "physical", "quota", "drafters", "compute", "plan"), MACHINES)
def test_threads_follow_from_the_cores_that_can_compute(
    usable: int, physical: int, quota: float | None, drafters: int, compute: int, plan: ThreadPlan
) -> None:
    cores = Cores(usable, physical, quota)
    assert cores.compute_count == compute
    assert plan_threads(compute, drafters) == plan
    assert plan.environment == ({"GOMP_SPINCOUNT": "10000"} if plan.spin_count else {})


def test_the_plan_says_what_it_follows_from() -> None:
    assert explain(Cores(2, 2), plan_threads(2)) == "verifier 2, drafter 1 (2 usable cores)"
    told = explain(Cores(64, 32, 12.0), plan_threads(12))
    assert (
        told == "verifier 12, drafter 3, GOMP_SPINCOUNT 10000 (64 usable cores, 32 physical, a quota of 12)"
    )


def topology(folder: Path, siblings: dict[int, str], name: str) -> Path:
    for number, threads in siblings.items():
        place = folder / f"cpu{number}" / "topology"
        place.mkdir(parents=True)
        (place / name).write_text(f"{threads}\n")
    return folder


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_threads_of_one_core_count_once_and_only_within_the_mask(tmp_path: Path, name: str) -> None:
    folder = topology(tmp_path, {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}, name)
    nowhere = Cgroups(tmp_path / "none", tmp_path / "none")
    assert read_cores({0, 1, 4, 5}, folder, nowhere) == Cores(4, 2, None)
    assert read_cores({0, 1}, folder, nowhere) == Cores(2, 2, None)
    assert read_cores({0, 4}, folder, nowhere) == Cores(2, 1, None)
    assert read_cores({7, 8, 9}, folder, nowhere) == Cores(3, 3, None), "a machine that does not tell"


def test_this_very_machine_has_a_core() -> None:
    cores = read_cores()
    assert 1 <= cores.physical <= cores.usable == len(usable_cores())
    assert cores.compute_count >= 1
