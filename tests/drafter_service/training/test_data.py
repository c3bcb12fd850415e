"""Training data: what the target writes, how it is kept, and that a killed run writes what it would have written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from drafter_service.training.data import DataPlan, write_samples
from drafter_service.training.prompts import UnusablePrompts, chat_format, prompt_ids, read_prompts
from drafter_service.training.samples import (
    SAMPLES_FILE,
    Outcome,
    Sample,
    SampleFolder,
    read_outcomes,
    read_samples,
)
from drafter_service.training.states import ComputedStates, StateFolder, write_states
from drafter_service.training.writer import LOOP_CHECK_TOKENS, Assignment, Writer
from sparkrelay.device.flat_batch import FlatBatch, FlatEntry
from sparkrelay.device.flat_model import FlatCausalLM
from tests.drafter_service.training.tiny_target import WordTokenizer, rules, save_target

TAPS = (0, 2)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> FlatCausalLM:
    return FlatCausalLM.load(save_target(tmp_path_factory.mktemp("target")), dtype="bfloat16")


def plan(count: int, **changes: object) -> DataPlan:
    fields: dict[str, object] = {"prompts": ((1, 5, 20, 21, 2, 7),), "starters": ((30, 31), (32,))}
    return DataPlan(sample_count=count, greedy_share=0.5, temperature=1.2, seed=9, **{**fields, **changes})  # type: ignore[arg-type]


def greedy_answer(target: FlatCausalLM, prompt: tuple[int, ...], count: int) -> list[int]:
    """Plain decoding, one token at a time, alone."""
    ids, state = list(prompt), target.new_state()
    while len(ids) < len(prompt) + count:
        part = np.array(ids[state.length :], np.int64)
        entry = FlatEntry(state, state.length, len(part))
        row = target.forward(FlatBatch(part, (entry,), np.array([len(part) - 1])))[0]
        ids.append(int(row.argmax()))
    return ids[len(prompt) :]


def test_a_greedy_answer_is_the_target_s_own(target: FlatCausalLM) -> None:
    prompt = (1, 5, 20, 21, 2, 7)
    assignments = iter([Assignment(number, prompt, 0.0) for number in range(3)])
    found = list(Writer(target, rules(token_limit=60), 4).write(assignments))
    assert [outcome.number for outcome in found] == [0, 1, 2]
    for outcome in found:
        sample = outcome.sample
        assert sample is not None and sample.token_ids[: sample.prompt_len] == prompt
        answer = sample.token_ids[sample.prompt_len :]
        assert len(answer) > 4
        assert list(answer) == greedy_answer(target, prompt, len(answer))


def test_what_is_written_does_not_depend_on_company_or_on_a_kill(
    target: FlatCausalLM, tmp_path: Path
) -> None:
    alone, together = SampleFolder(tmp_path / "alone"), SampleFolder(tmp_path / "together")
    write_samples(plan(20), alone, Writer(target, rules(), 2), lambda folder: None)

    class Killed(Exception):
        pass

    def kill(folder: SampleFolder) -> None:
        if len(folder.numbers) == 7:
            raise Killed

    with pytest.raises(Killed):
        write_samples(plan(20), together, Writer(target, rules(), 8), kill)
    with (tmp_path / "together" / SAMPLES_FILE).open("a") as file:
        file.write('{"number": 19, "prom')  # the kill came in the middle of a line
    again = SampleFolder(tmp_path / "together")
    assert again.numbers == together.numbers and len(again.numbers) == 7
    write_samples(plan(20), again, Writer(target, rules(), 5), lambda folder: None)

    def outcomes(name: str) -> dict[int, Outcome]:
        return {outcome.number: outcome for outcome in read_outcomes(tmp_path / name / SAMPLES_FILE)}

    assert outcomes("together") == outcomes("alone")
    samples = [sample for _, sample in read_samples(tmp_path / "alone")]
    assert again.numbers == set(range(20)) and 4 < len(samples) == again.sample_count
    assert {sample.temperature for sample in samples} == {0.0, 1.2}
    assert {sample.own_prompt for sample in samples} == {True, False}
    assert sum(sample.token_ids[3:5] == (30, 31) or sample.token_ids[3] == 32 for sample in samples) > 1
    assert sum(len(sample.token_ids) - sample.prompt_len for sample in samples) == again.answer_token_count


def first_repetition(token_ids: Sequence[int]) -> int:
    """A strict loop rule: a text ends where an id comes for the second time."""
    return next((i for i, token_id in enumerate(token_ids) if token_id in token_ids[:i]), len(token_ids))


def test_what_repeats_itself_is_cut_off_and_writing_ends(target: FlatCausalLM) -> None:
    writer = Writer(target, rules(loop_start=first_repetition, token_limit=400), 4)
    found = [o.sample for o in writer.write(iter(Assignment(n, (1, 5, 40 + n, 2, 7), 0.0) for n in range(6)))]
    samples = [sample for sample in found if sample is not None]
    assert len(samples) > 2
    for sample in samples:
        answer = sample.token_ids[5:]
        assert sample.looped
        assert greedy_answer(target, sample.token_ids[:5], len(answer) + 1)[-1] in answer
        assert first_repetition(answer) == len(answer)
    assert writer.written_tokens <= 6 * LOOP_CHECK_TOKENS


def test_messages_that_are_no_use_are_dropped_with_a_reason(target: FlatCausalLM) -> None:
    tight = rules(max_prompt_tokens=6, min_prompt_tokens=5)
    reasons = {o.dropped for o in Writer(target, tight, 8).write(plan(40, prompts=()).assignments(set()))}
    assert {"message too long", "message too short"} <= reasons
    long = Assignment(0, tuple([3] * 88), 0.0)
    assert [o.dropped for o in Writer(target, rules(), 2).write(iter([long]))] == ["prompt too long"]


def test_a_prompt_is_kept_once_a_temperature(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path)
    sample = Sample((1, 2, 3, 4), 2, 0.0, False, False)
    assert folder.add(Outcome(0, sample, "")).sample == sample
    assert folder.add(Outcome(1, Sample((1, 2, 9, 9), 2, 0.0, False, False), "")).dropped == "duplicate"
    assert folder.add(Outcome(2, Sample((1, 2, 9, 9), 2, 1.0, False, False), "")).sample is not None
    again = SampleFolder(tmp_path)
    assert (again.sample_count, again.answer_token_count, again.numbers) == (2, 4, {0, 1, 2})
    assert again.add(Outcome(3, sample, "")).dropped == "duplicate"


def test_states_are_the_target_s_layers_whether_kept_or_computed(
    target: FlatCausalLM, tmp_path: Path
) -> None:
    samples = [(n, Sample(tuple(range(3, 20 + n)), 5, 0.0, False, False)) for n in range(5)]
    computed = ComputedStates(target, TAPS)
    folder = StateFolder(tmp_path, TAPS)
    write_states(computed, samples[:2], folder, lambda done: None)
    (tmp_path / "states-00000009.unfinished").write_bytes(b"cut off")
    folder = StateFolder(tmp_path, TAPS)
    assert len(folder) == 2 and 1 in folder and 2 not in folder
    write_states(computed, samples, folder, lambda done: None)
    assert len(folder) == 5
    for number, sample in samples:
        kept, anew = folder.read(number, sample), computed.read(number, sample)
        assert kept.taps.shape == (len(sample.token_ids) - 1, 2 * 32)
        assert kept.taps.equal(anew.taps) and kept.final.equal(
            anew.final
        )  # exact mode: company changes no bit
        ids = np.array(sample.token_ids[:-1], np.int64)
        entry = FlatEntry(target.new_state(), 0, len(ids))
        output = target.forward_with_taps(FlatBatch(ids, (entry,), np.zeros(0, np.int64)), (0, 2, 3))
        assert kept.taps[:, 32:].equal(output.taps[2]) and kept.final.equal(output.taps[3])
    with pytest.raises(ValueError, match=r"has the layers \[0, 2\], not \[1\]"):
        StateFolder(tmp_path, (1,))


def test_the_chat_format_is_what_stands_around_a_message() -> None:
    tokenizer = WordTokenizer()
    found = chat_format(tokenizer)
    message = tokenizer.encode("tell me", add_special_tokens=False)
    assert (*found.opening, *message, *found.closing) == prompt_ids(tokenizer, "tell me")
    assert found.opening and found.closing
    with pytest.raises(UnusablePrompts, match="does not put a user's message"):
        chat_format(WordTokenizer("nothing"))


def test_prompt_files_are_read_and_their_mistakes_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"turns": ["One?", "Two?"]}\n\n{"turns": ["Three?"]}\n{"turns": ["One?"]}\n')
    assert read_prompts([good]) == ["One?", "Three?"]
    bad.write_text('{"turns": ["One?"]}\n{"text": "Two?"}\n')
    with pytest.raises(UnusablePrompts, match=r"bad\.jsonl, line 2: expected"):
        read_prompts([good, bad])
