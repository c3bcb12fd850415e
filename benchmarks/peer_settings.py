"""At which of their own settings the peers run: some are tried with one user, the fastest is kept, in a file if one is named.

A search that was broken off goes on where it was: a start of vLLM with another setting compiles for a minute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.measuring import best_mode
from benchmarks.systems import ChildSystem, Gap, Mode
from benchmarks.vllm_environment import VllmSetting, ngram_settings
from benchmarks.workload import Workload

TRIAL_TOKENS = 48

TRIALS = 2

Start = Callable[[], ChildSystem]
StartVllm = Callable[[str, VllmSetting], ChildSystem]


@dataclass(slots=True)
class PeerSettings:
    """Names of the chosen settings, "" for none; what each tried one reached in tokens a second; why lanes are gaps.

    complete  nothing is left to be tried
    """

    transformers_plain: str = ""
    transformers_lookup: str = ""
    vllm_plain: str = ""
    vllm_ngram: str = ""
    tried: dict[str, dict[str, float]] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        names = ("transformers_plain", "transformers_lookup", "vllm_plain", "vllm_ngram")
        return {
            "chosen": {name: getattr(self, name) for name in names},
            "tried": self.tried,
            "gaps": self.gaps,
            "complete": self.complete,
        }


def plain_modes(dtype: str) -> dict[str, Mode]:
    """Plain settings of transformers, the usual best first."""
    return {
        f"{attention}, {cache} cache": {
            "dtype": dtype,
            "attention": attention,
            "cache": cache,
            "lookup": None,
        }
        for attention in ("sdpa", "eager")
        for cache in ("dynamic", "static")
    }


def lookup_modes(plain: Mode) -> dict[str, Mode]:
    """Settings of transformers' prompt lookup, which needs a dynamic cache."""
    return {
        f"{count} tokens, up to {longest}-grams": {
            **plain,
            "cache": "dynamic",
            "lookup": {"tokens": count, "ngram": longest},
        }
        for count, longest in ((3, 2), (5, 2), (10, 2), (5, 3))
    }


def read_settings(file: str) -> PeerSettings:
    """What `file` holds; nothing known yet if there is none, or no name."""
    if not file or not Path(file).is_file():
        return PeerSettings()
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    known = {name: content[name] for name in ("tried", "gaps", "complete")}
    return PeerSettings(**content["chosen"], **known)


def write_settings(file: str, settings: PeerSettings) -> None:
    """Nothing without a name."""
    if file:
        Path(file).write_text(json.dumps(settings.as_dict(), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Search:
    """Looks for the best settings with one user at a time.

    first_only  take the first of each list and try nothing
    file        where each finding is noted at once; "" for nowhere
    """

    workload: Workload
    console: Console
    first_only: bool = False
    file: str = ""
    trials: int = TRIALS

    def of_transformers(self, start: Start, dtype: str, found: PeerSettings) -> None:
        """Fills in the two names of transformers, or its gap."""
        plain = plain_modes(dtype)
        if found.transformers_lookup or "transformers" in found.gaps:
            return
        if self.first_only:
            found.transformers_plain, found.transformers_lookup = (
                next(iter(plain)),
                next(iter(lookup_modes({}))),
            )
            return
        self.console.print("transformers: which of its settings are fastest here ...")
        try:
            with start() as child:
                found.transformers_plain = self._keep("transformers plain", child, plain, found)
                lookup = lookup_modes(plain[found.transformers_plain])
                found.transformers_lookup = self._keep("transformers lookup", child, lookup, found)
        except Gap as gap:
            found.gaps["transformers"] = str(gap)
        write_settings(self.file, found)

    def of_vllm(self, start: StartVllm, plain: Mapping[str, VllmSetting], found: PeerSettings) -> None:
        """Fills in the two names of vLLM, or its gaps. Each setting is a start of its own."""
        found.vllm_plain = self._fastest_start("vllm plain", start, plain, found)
        if found.vllm_plain:
            ngram = ngram_settings(plain[found.vllm_plain])
            found.vllm_ngram = self._fastest_start("vllm ngram", start, ngram, found)

    def _fastest_start(
        self, name: str, start: StartVllm, settings: Mapping[str, VllmSetting], found: PeerSettings
    ) -> str:
        if self.first_only:
            return next(iter(settings))
        reached = found.tried.setdefault(name, {})
        failures = []
        for label, setting in settings.items():
            if label in reached:
                continue
            self.console.print(f"{name}: trying {label} ...")
            try:
                with start(name, setting) as child:
                    reached |= best_mode(
                        child, {label: {}}, self.workload, TRIAL_TOKENS, self.console, self.trials
                    )[1]
            except Gap as gap:
                failures.append(f"{label}: {gap}")
            write_settings(self.file, found)
        if not reached:
            found.gaps[name] = "; ".join(failures)
            return ""
        return max(reached, key=lambda label: reached[label])

    def _keep(self, name: str, child: ChildSystem, modes: Mapping[str, Mode], found: PeerSettings) -> str:
        best, reached = best_mode(child, modes, self.workload, TRIAL_TOKENS, self.console, self.trials)
        found.tried[name] = reached
        return best
