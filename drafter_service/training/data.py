"""Training data: which samples a run consists of, and the loop that has them written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from drafter_service.training.samples import SampleFolder
from drafter_service.training.writer import Assignment, Writer
from sparkrelay import noise

_PLAN_TAG = 0x7E3C_0000_DA7A_0001
"""Keeps the draw of a sample's temperature and first words apart from the noise of its tokens."""


@dataclass(frozen=True, slots=True)
class DataPlan:
    """Which samples there are to be. A sample's number decides everything about it.

    prompts        ids of prompts from files; sample i < len(prompts) answers prompt i
    starters       first ids of messages: every second message that the target writes begins with one of these
    sample_count   assignments in all; behind the files' prompts the target writes its own
    greedy_share   of the answers, 0 to 1; the others are sampled
    temperature    of the sampled ones
    seed           of the run
    """

    prompts: Sequence[tuple[int, ...]]
    starters: Sequence[tuple[int, ...]]
    sample_count: int
    greedy_share: float
    temperature: float
    seed: int

    def assignment(self, number: int) -> Assignment:
        prompt = self.prompts[number] if number < len(self.prompts) else None
        first_word, second_word = noise.key(self.seed ^ _PLAN_TAG, number)
        temperature = 0.0 if first_word < self.greedy_share * 2**32 else self.temperature
        starter: tuple[int, ...] = ()
        if prompt is None and self.starters and second_word % 2:
            starter = self.starters[second_word // 2 % len(self.starters)]
        return Assignment(number, prompt, temperature, starter)

    def assignments(self, done: set[int]) -> Iterator[Assignment]:
        """What is not done yet, by number."""
        return (self.assignment(number) for number in range(self.sample_count) if number not in done)


def write_samples(
    plan: DataPlan, folder: SampleFolder, writer: Writer, on_progress: Callable[[SampleFolder], None]
) -> None:
    """Has every sample of the plan written that the folder lacks."""
    for outcome in writer.write(plan.assignments(folder.numbers)):
        folder.add(outcome)
        on_progress(folder)
