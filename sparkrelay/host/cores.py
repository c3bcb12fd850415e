"""The cores that this process may use, and how the services of one machine share them.

The plan is a pure function of what was read, so that `sparkrelay up`, `sparkrelay doctor` and a service that is started alone
come to the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sparkrelay.host.cgroups import Cgroups

SMALL_CORE_COUNT = 4
SPIN_COUNT = 10_000


@dataclass(frozen=True, slots=True)
class Cores:
    """What there is.

    usable    logical cores in the affinity mask
    physical  of these, how many cores: two threads of one core (SMT) count once
    quota     cores' worth of time the container allows, None without a limit
    """

    usable: int
    physical: int
    quota: float | None = None

    @property
    def compute_count(self) -> int:
        """Cores to compute with. Physical ones, because two threads of one core share its multipliers; whole ones of the quota,
        because threads that meet at barriers all wait for the one that was throttled.
        """
        allowed = self.physical if self.quota is None else min(self.physical, int(self.quota))
        return max(1, allowed)


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """Threads of each service. spin_count: GOMP_SPINCOUNT of all of them, None to leave it alone."""

    verifier: int
    drafter: int
    spin_count: int | None

    @property
    def environment(self) -> dict[str, str]:
        """What a service's environment needs; libgomp reads it when torch is imported."""
        return {} if self.spin_count is None else {"GOMP_SPINCOUNT": str(self.spin_count)}


def read_cores(
    affinity: Collection[int] | None = None,
    topology: Path = Path("/sys/devices/system/cpu"),
    cgroups: Cgroups | None = None,
) -> Cores:
    """The cores of this process. affinity: numbers of the logical cores it may run on; left out, the system is asked."""
    mask = usable_cores() if affinity is None else affinity
    siblings = {_siblings(topology / f"cpu{number}" / "topology", number) for number in mask}
    return Cores(max(1, len(mask)), max(1, len(siblings)), (cgroups or Cgroups()).cpu_quota())


def usable_cores() -> Collection[int]:
    """Numbers of the logical cores in this process's affinity mask; all of them where there is no such mask (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def plan_threads(core_count: int, drafter_count: int = 1) -> ThreadPlan:
    """How a verifier and its drafters share `core_count` cores of one machine.

    The verifier takes all: it computes while the drafters wait for its verdicts. A drafter takes one on a small machine, measured
    to cost the verifier least, else its share of a quarter of them. With more cores than that, waiting threads spin only shortly,
    so that they do not take cores from whoever computes; a passive wait would be slower (both measured on 2 and 4 cores).
    """
    small = core_count <= SMALL_CORE_COUNT
    drafter = 1 if small else max(1, core_count // 4 // max(1, drafter_count))
    return ThreadPlan(core_count, drafter, None if small else SPIN_COUNT)


def explain(cores: Cores, plan: ThreadPlan) -> str:
    """The plan in one line, and what it follows from."""
    facts = [f"{cores.usable} usable cores"]
    if cores.physical != cores.usable:
        facts.append(f"{cores.physical} physical")
    if cores.quota is not None:
        facts.append(f"a quota of {cores.quota:g}")
    spin = "" if plan.spin_count is None else f", GOMP_SPINCOUNT {plan.spin_count}"
    return f"verifier {plan.verifier}, drafter {plan.drafter}{spin} ({', '.join(facts)})"


def _siblings(folder: Path, number: int) -> str:
    """Names the physical core: the list of its threads; without one, a core of its own."""
    for name in ("core_cpus_list", "thread_siblings_list"):
        try:
            return (folder / name).read_text(encoding="ascii").strip() or str(number)
        except OSError:
            continue
    return str(number)
