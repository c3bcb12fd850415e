"""Peers behind their one call: what they answer, and how they become a gap."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import peer_transformers, peer_vllm
from benchmarks.figures import Answer, Run
from benchmarks.measuring import Lane, measure
from benchmarks.systems import ChildSystem, Gap, Mode, Prompts, run_of
from benchmarks.workload import Workload
from tests.device.tiny_models import FAMILIES, VOCAB_SIZE, save_tiny

QUIET = Console(quiet=True)
PLAIN = {"dtype": "float32", "attention": "eager", "cache": "dynamic", "lookup": None}


class Echo:
    """A system that answers token_count copies of each prompt's first id, one a second; fails from its n-th run on."""

    def __init__(self, fails_from: int = 1000) -> None:
        self.asked: list[tuple[tuple[int, ...], int]] = []
        self._fails_from = fails_from

    def run(self, prompts: Prompts, token_count: int, mode: Mode) -> Run:
        if len(self.asked) >= self._fails_from:
            raise Gap("out of order")
        self.asked.append((tuple(ids[0] for ids in prompts), token_count))
        marks = tuple((float(count), count) for count in range(1, token_count + 1))
        return Run(tuple(Answer((ids[0],) * token_count, marks) for ids in prompts), float(token_count))


def test_every_lane_gets_the_same_prompts_in_the_same_repeat_after_a_warm_up() -> None:
    one, other = Echo(), Echo()
    lanes = [Lane("one", one, {}, (1, 2)), Lane("other", other, {}, (2, 1))]
    workload = Workload(tuple((number,) for number in range(30)))
    measured = measure(lanes, workload, 20, 3, QUIET)
    assert not measured.gaps
    assert sorted(one.asked) == sorted(other.asked)
    assert [count for _, count in one.asked].count(20) == 6 and len(one.asked) == 8
    warm_ups = {prompts for prompts, count in one.asked if count < 20}
    assert not warm_ups & {prompts for prompts, count in one.asked if count == 20}
    assert len(measured.rates("one", 2)) == 3
    assert measured.agreement("one", "other") == 1.0


def test_a_lane_that_fails_is_a_gap_and_the_others_go_on() -> None:
    lanes = [Lane("good", Echo(), {}, (1,)), Lane("bad", Echo(fails_from=2), {}, (1,))]
    measured = measure(lanes, Workload(((1,), (2,), (3,))), 5, 3, QUIET)
    assert measured.gaps == {"bad": "out of order"}
    assert len(measured.of("good", 1)) == 3 and measured.of("bad", 1) == []
    assert measured.ratio("good", "bad", 1) is None


def test_prompt_lookup_of_transformers_gives_its_plain_text_in_fewer_steps(tmp_path: Path) -> None:
    run_prompts, _ = _transformers(save_tiny(FAMILIES["llama"](), tmp_path))
    prompt = [5, 9, 13, 5, 9, 13, 5, 9, 13]
    ((plain_ids, plain_marks),) = run_prompts([prompt], 60, PLAIN).answers
    lookup = {**PLAIN, "lookup": {"tokens": 4, "ngram": 2}}
    ((lookup_ids, lookup_marks),) = run_prompts([prompt], 60, lookup).answers
    assert lookup_ids == plain_ids and len(plain_ids) == 60
    assert [count for _, count in plain_marks] == list(range(1, 61))
    assert len(lookup_marks) < 60 and lookup_marks[-1][1] == 60


def test_a_padded_batch_of_transformers_answers_as_each_user_alone(tmp_path: Path) -> None:
    run_prompts, _ = _transformers(save_tiny(FAMILIES["llama"](), tmp_path))
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
    together = run_prompts(prompts, 12, PLAIN).answers
    assert [ids for ids, _ in together] == [run_prompts([ids], 12, PLAIN).answers[0][0] for ids in prompts]
    assert all(marks[-1][1] == 12 for _, marks in together)
    assert max(max(ids) for ids, _ in together) < VOCAB_SIZE


def _transformers(folder: Path) -> tuple[Any, Any]:
    options = json.dumps({"model": str(folder), "threads": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["peer", options])
        return peer_transformers.start()


@dataclass
class FakeOutput:
    """What vLLM says of one request after a step."""

    request_id: str
    token_ids: list[int]

    @property
    def outputs(self) -> list[FakeOutput]:
        return [self]


@dataclass
class FakeEngine:
    """Speaks as vLLM's engine: each request counts up from its first id, the second one by two a step; outputs in any order."""

    left: dict[str, tuple[int, int]] = field(default_factory=dict)
    done: dict[str, list[int]] = field(default_factory=dict)

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: dict[str, Any]) -> None:
        assert params["temperature"] == 0.0 and params["ignore_eos"]
        self.left[request_id] = (prompt["prompt_token_ids"][0], params["max_tokens"])
        self.done[request_id] = []

    def has_unfinished_requests(self) -> bool:
        return any(len(self.done[name]) < count for name, (_, count) in self.left.items())

    def step(self) -> list[FakeOutput]:
        outputs = []
        for number, (name, (first, count)) in enumerate(self.left.items()):
            so_far = self.done[name]
            if len(so_far) < count:
                so_far += range(first + len(so_far), first + min(len(so_far) + 1 + number, count))
                outputs.append(FakeOutput(name, list(so_far)))
        return outputs[::-1]


def test_vllms_outputs_go_to_the_users_who_asked() -> None:
    answers = peer_vllm._run(FakeEngine(), [[100, 1], [200]], 5, "run1", dict)
    assert [ids for ids, _ in answers] == [list(range(100, 105)), list(range(200, 205))]
    assert [[count for _, count in marks] for _, marks in answers] == [[1, 2, 3, 4, 5], [2, 4, 5]]


CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from benchmarks.child import Answered, serve
def start():
    options = json.loads(sys.argv[2])
    print("noise on standard output")
    if options.get("broken"): raise RuntimeError("no such wheel")
    def run(prompts, count, mode):
        if mode.get("fail"): raise ValueError("cannot do that")
        return Answered([([ids[0]] * count, [(0.5, 1), (1.0, count)]) for ids in prompts], {'steps': count})
    return run, {"version": "1"}
serve(start)
"""


class ScriptedChild(ChildSystem):
    """A child of a few lines instead of a module."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        super().__init__("scripted", "unused", options, folder)
        root = str(Path(__file__).parents[2])
        self._command = [sys.executable, "-c", CHILD, root, json.dumps(options)]


def test_a_child_answers_until_its_input_ends_and_its_noise_disturbs_nobody(tmp_path: Path) -> None:
    with ScriptedChild(tmp_path, {}) as child:
        assert child.about == {"version": "1"}
        run = child.run([[7, 8], [9]], 3, {})
        with pytest.raises(Gap, match="ValueError: cannot do that"):
            child.run([[7]], 3, {"fail": True})
        assert child.run([[7]], 2, {}).answers[0].token_ids == (7, 7)
        process = child._process
    assert [answer.token_ids for answer in run.answers] == [(7, 7, 7), (9, 9, 9)]
    assert run.answers[0].marks == ((0.5, 1), (1.0, 3)) and run.wall_s > 0
    assert run.notes == {"steps": 3}
    assert process is not None and process.returncode == 0
    assert "noise" in (tmp_path / "scripted.log").read_text(encoding="utf-8")


def test_a_child_that_cannot_start_is_a_gap_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(Gap, match="RuntimeError: no such wheel"), ScriptedChild(tmp_path, {"broken": True}):
        pass
    nowhere = ChildSystem("peer", "benchmarks.peer_vllm", {}, tmp_path, python="/nonexistent/python")
    with pytest.raises(Gap, match="/nonexistent/python cannot be started"), nowhere:
        pass
    wrong_module = ChildSystem("peer", "benchmarks.no_such_module", {}, tmp_path)
    with pytest.raises(Gap, match=r"ended: .*no_such_module"), wrong_module:
        pass


def test_a_childs_answer_reads_back_as_it_was_written() -> None:
    message = {"answers": [{"token_ids": [1, 2], "marks": [[0.5, 1], [1, 2]]}], "wall_s": 1}
    assert run_of(message) == Run((Answer((1, 2), ((0.5, 1), (1.0, 2))),), 1.0)
