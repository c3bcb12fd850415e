"""Training samples on disk: JSON lines that only grow, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and the target's answer.

    token_ids    prompt and answer
    prompt_len   ids of the prompt: what is behind them is supervised
    temperature  at which the answer was written
    own_prompt   the target wrote the message as well
    looped       the answer went into a loop, which was cut off
    seed         of the coupled noise with which a sampled answer was written
    """

    token_ids: tuple[int, ...]
    prompt_len: int
    temperature: float
    own_prompt: bool
    looped: bool
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the sample with this number: it, or why there is none."""

    number: int
    sample: Sample | None
    dropped: str


class SampleFolder:
    """The samples of one run. One process writes."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there. A last line that was cut off by a kill is taken away."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / SAMPLES_FILE
        self.numbers: set[int] = set()
        self.sample_count = 0
        self.token_count = 0
        self.answer_token_count = 0
        self.loop_count = 0
        self._prompts: set[bytes] = set()
        self._repair()
        for outcome in read_outcomes(self._file):
            self._count(outcome)

    def add(self, outcome: Outcome) -> Outcome:
        """Writes an outcome down, and returns it; of samples with one prompt and temperature all but the first are dropped."""
        if outcome.sample is not None and _prompt_key(outcome.sample) in self._prompts:
            outcome = Outcome(outcome.number, None, "duplicate")
        line = json.dumps(_record(outcome), separators=(",", ":"))
        with self._file.open("a", encoding="ascii") as file:
            file.write(line + "\n")
        self._count(outcome)
        return outcome

    def _count(self, outcome: Outcome) -> None:
        self.numbers.add(outcome.number)
        sample = outcome.sample
        if sample is not None:
            self.sample_count += 1
            self.token_count += len(sample.token_ids)
            self.answer_token_count += len(sample.token_ids) - sample.prompt_len
            self.loop_count += sample.looped
            self._prompts.add(_prompt_key(sample))

    def _repair(self) -> None:
        if not self._file.exists():
            return
        content = self._file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self._file.open("r+b") as file:
                file.truncate(whole)


def read_outcomes(file: Path) -> Iterator[Outcome]:
    """All outcomes of a file, in the order in which they were written; nothing if there is no file."""
    if not file.exists():
        return
    with file.open(encoding="ascii") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield _outcome(json.loads(line))


def read_samples(folder: Path) -> list[tuple[int, Sample]]:
    """The samples of a folder with their numbers, by number."""
    outcomes = read_outcomes(folder / SAMPLES_FILE)
    return sorted(
        ((outcome.number, outcome.sample) for outcome in outcomes if outcome.sample is not None),
        key=lambda pair: pair[0],
    )


def _prompt_key(sample: Sample) -> bytes:
    prompt = array("q", sample.token_ids[: sample.prompt_len]).tobytes()
    return hashlib.sha256(f"{sample.temperature}:".encode() + prompt).digest()


def _record(outcome: Outcome) -> dict[str, Any]:
    sample = outcome.sample
    if sample is None:
        return {"number": outcome.number, "dropped": outcome.dropped}
    return {
        "number": outcome.number,
        "prompt_len": sample.prompt_len,
        "temperature": sample.temperature,
        "own_prompt": sample.own_prompt,
        "looped": sample.looped,
        "seed": sample.seed,
        "token_ids": sample.token_ids,
    }


def _outcome(record: dict[str, Any]) -> Outcome:
    if "token_ids" not in record:
        return Outcome(record["number"], None, record["dropped"])
    sample = Sample(
        tuple(record["token_ids"]),
        record["prompt_len"],
        record["temperature"],
        record["own_prompt"],
        record["looped"],
        record["seed"],
    )
    return Outcome(record["number"], sample, "")
