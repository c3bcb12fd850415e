"""At which of their own settings the peers run: some are tried with one user, the fastest is kept, in a file if one is named."""

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
    """Names of the chosen settings, "" for none; what each tried one reached in tokens a second; why lanes are gaps."""

    transformers_plain: str = ""
    transformers_lookup: str = ""
    vllm_plain: str = ""
    vllm_ngram: str = ""
    tried: dict[str, dict[str, float]] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        names = ("transformers_plain", "transformers_lookup", "vllm_plain", "vllm_ngram")
        return {
            "chosen": {name: getattr(self, name) for name in names},
            "tried": self.tried,
            "gaps": self.gaps,
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


def load_or_find(file: str, find: Callable[[], PeerSettings]) -> PeerSettings:
    """What `file` holds, if it exists; else what `find` finds, which is then written there if a file is named."""
    if file and Path(file).is_file():
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        return PeerSettings(**content["chosen"], tried=content["tried"], gaps=content["gaps"])
    found = find()
    if file:
        Path(file).write_text(json.dumps(found.as_dict(), indent=1) + "\n", encoding="utf-8")
    return found


@dataclass(frozen=True, slots=True)
class Search:
    """Looks for the best settings with one user at a time.

    first_only  take the first of each list and try nothing
    """

    workload: Workload
    console: Console
    first_only: bool = False
    trials: int = TRIALS

    def of_transformers(self, start: Start, dtype: str, found: PeerSettings) -> None:
        """Fills in the two names of transformers, or its gap."""
        plain = plain_modes(dtype)
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
        reached: dict[str, float] = {}
        failures = []
        for label, setting in settings.items():
            self.console.print(f"{name}: trying {label} ...")
            try:
                with start(name, setting) as child:
                    reached |= best_mode(
                        child, {label: {}}, self.workload, TRIAL_TOKENS, self.console, self.trials
                    )[1]
            except Gap as gap:
                failures.append(f"{label}: {gap}")
        found.tried[name] = reached
        if not reached:
            found.gaps[name] = "; ".join(failures)
            return ""
        return max(reached, key=lambda label: reached[label])

    def _keep(self, name: str, child: ChildSystem, modes: Mapping[str, Mode], found: PeerSettings) -> str:
        best, reached = best_mode(child, modes, self.workload, TRIAL_TOKENS, self.console, self.trials)
        found.tried[name] = reached
        return best
