"""A drafter's context rows are bit for bit those of one forward of its ids, however the verifier came by them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from sparkrelay.device.flat_model import DtypeName
from sparkrelay.protocol import chain_hash
from tests.device.tiny_drafts import save_projector
from tests.device.tiny_models import COMMON, VOCAB_SIZE, save_tiny
from tests.verifier_service.driver import Driver, block, of, turn, verdicts
from verifier_service.context_rows import ContextRowStore
from verifier_service.events import (
    AddMember,
    CancelTurn,
    Command,
    Event,
    ForkSession,
    MemberAdded,
    MemberContext,
    MemberRewound,
    MemberTurnStarted,
    TurnAccepted,
)
from verifier_service.models.huggingface import HuggingFaceModel
from verifier_service.ragged_batch import RaggedBatch, Segment

LONG = 600
GUESSES = 5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Of tiny products several threads make no shorter ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a draft of it."""
    root = tmp_path_factory.mktemp("rows")
    target = save_tiny(LlamaConfig(**COMMON), root / "target")
    (target / "tokenizer.json").write_text("{}")
    return target, save_projector(root / "draft")


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def loaded(request: pytest.FixtureRequest, folders: tuple[Path, Path]) -> HuggingFaceModel:
    dtype: DtypeName = request.param
    model = HuggingFaceModel.load(folders[0], model_id="tiny", dtype=dtype, context=folders[1])
    assert model.info.exact, model.info.exact_reason
    return model


@pytest.fixture
def model(loaded: HuggingFaceModel) -> HuggingFaceModel:
    """The same weights without any sequence."""
    return without_sequences(loaded)


def without_sequences(loaded: HuggingFaceModel) -> HuggingFaceModel:
    fresh = copy.copy(loaded)
    fresh._states, fresh._context = {}, ContextRowStore(48)
    return fresh


def text(seed: int, length: int = LONG) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, VOCAB_SIZE, length)]


def one_shot(model: HuggingFaceModel, ids: Sequence[int]) -> np.ndarray:
    """[len(ids), width] the rows of one forward of all of them."""
    model.open(-1)
    try:
        model.resize(-1, range(len(ids) // 512 + 1))
        model.forward(RaggedBatch.of([Segment(-1, 0, ids, 0)]))
        return model.context_rows(-1, 0, len(ids))
    finally:
        model.close(-1)


class Echo:
    """What one drafter was told of its session: rows by position."""

    def __init__(self, member_id: int, session_id: str, held: Sequence[int] = ()) -> None:
        self.member_id = member_id
        self.join = AddMember(session_id, member_id, "echo", len(held), chain_hash(held), 15, True)
        self.rows: dict[int, bytes] = {}
        self.base_len = 0
        self.draft_budget = 0
        self.fed_count = self.kept_count = self.rewound_count = self.sent_count = 0

    def hear(self, events: Sequence[Event]) -> None:
        for event in events:
            if (
                isinstance(event, MemberContext)
                and event.member_id == self.member_id
                and event.rows is not None
            ):
                self.fed_count += len(event.rows)
                self._put(event.rows_start, event.rows)
            elif isinstance(event, MemberRewound) and event.member_id == self.member_id:
                self.rewound_count += 1
                self.rows = {position: row for position, row in self.rows.items() if position < event.length}
            elif isinstance(event, MemberAdded) and event.member_id == self.member_id:
                self.kept_count = event.keep_tokens
        for verdict in verdicts(events):
            if verdict.handle == self.member_id:
                self._put(verdict.base_len - 1, verdict.rows)
                self.base_len = verdict.base_len + verdict.accepted_count + 1
                self.draft_budget = verdict.draft_budget

    def _put(self, start: int, rows: np.ndarray) -> None:
        self.rows.update((start + index, row.tobytes()) for index, row in enumerate(rows))

    def differing(self, model: HuggingFaceModel, ids: Sequence[int]) -> int:
        """How many rows are not those of one forward. All but the last position's must be there, from kept_count on."""
        expected = one_shot(model, ids)
        assert set(range(self.kept_count, len(ids) - 1)) <= self.rows.keys() <= set(range(len(ids)))
        return sum(row != expected[position].tobytes() for position, row in self.rows.items())


def play(
    driver: Driver, echoes: Sequence[Echo], *commands: Command, truth: Sequence[int] = ()
) -> list[Event]:
    """Until the engine sleeps. truth: the ids of the session, from which blocks are made: right, wrong, half right."""
    events: list[Event] = []
    waiting: list[Command] = list(commands)
    while True:
        told = driver.step(*waiting)
        waiting = []
        events += told
        for echo in echoes:
            echo.hear(told)
            right = list(truth[echo.base_len : echo.base_len + min(GUESSES, echo.draft_budget)])
            if right:
                wrong_at = echo.sent_count % (GUESSES + 2)
                ids = right[:wrong_at] + [(i + 1) % VOCAB_SIZE for i in right[wrong_at:]]
                waiting.append(block(echo.member_id, echo.base_len, ids if wrong_at <= GUESSES else ()))
                echo.sent_count += 1
            echo.draft_budget = 0
        if not waiting and driver.due_us is None:
            return events
        driver.now_us = max(driver.now_us, driver.due_us or 0)


def plain(model: HuggingFaceModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The session's ids after a turn without a drafter."""
    driver = Driver(without_sequences(model), "off", block_count=8)
    driver.run(turn("plain", "plain", prompt, max_tokens=max_tokens))
    return [*prompt, *driver.output("plain")]


def test_rows_of_chunks_decoding_and_verified_blocks(model: HuggingFaceModel) -> None:
    prompt = text(1)
    truth = plain(model, prompt, 40)
    driver = Driver(model, "fixed:5", block_count=16, step_token_budget=100)
    echo = Echo(1, "a")
    events = play(driver, [echo], turn("a", "t", prompt, max_tokens=40), echo.join, truth=truth)
    assert len(of(events, MemberContext)) > 5, "it follows the reading of the prompt"
    rounds = [event.round for event in driver.rounds("t") if event.round is not None]
    accepted, depth = sum(r.accepted_count for r in rounds), sum(r.depth for r in rounds)
    assert depth > accepted > 0 and any(r.depth == 0 for r in rounds)
    assert echo.differing(model, [*prompt, *driver.output("t")]) == 0
    assert [*prompt, *driver.output("t")] == truth


def test_a_later_turn_goes_on_where_the_rows_end(model: HuggingFaceModel) -> None:
    driver = Driver(model, block_count=16)
    echo = Echo(1, "a")
    play(driver, [echo], turn("a", "t1", text(2, 30), max_tokens=9), echo.join)
    ids = text(2, 30) + driver.output("t1")
    kept = ids[:34]
    again = turn("a", "t2", text(3, 20), keep_len=34, keep_hash=chain_hash(kept), max_tokens=9)
    play(driver, [echo], again)
    whole = kept + text(3, 20) + driver.output("t2")
    going_on = turn("a", "t3", (5, 6), keep_len=len(whole), keep_hash=chain_hash(whole), max_tokens=4)
    play(driver, [echo], going_on)
    assert echo.rewound_count == 2, "to what is kept, and by the one id whose row was never made"
    assert echo.differing(model, [*whole, 5, 6, *driver.output("t3")]) == 0


def test_a_prefix_hit_a_fork_and_a_cold_drafter_cost_no_row(model: HuggingFaceModel) -> None:
    prompt = text(4)
    driver = Driver(model, block_count=32, step_token_budget=200)
    driver.run(turn("a", "t1", prompt, max_tokens=6))
    committed = prompt + driver.output("t1")
    hit, fork, cold = Echo(1, "b"), Echo(2, "c"), Echo(3, "a", committed[:300])
    events = play(driver, [hit], turn("b", "t2", prompt[:550] + text(5, 40), max_tokens=6), hit.join)
    (accepted,) = of(events, TurnAccepted)
    assert accepted.cached_token_count >= 544, "the beginning is copied, not read"
    assert (
        hit.fed_count > 550 and hit.differing(model, [*prompt[:550], *text(5, 40), *driver.output("t2")]) == 0
    )

    driver.run(ForkSession("a", "c", len(committed) - 2))
    start = turn(
        "c", "t3", (9,), keep_len=len(committed) - 2, keep_hash=chain_hash(committed[:-2]), max_tokens=6
    )
    play(driver, [fork], start, fork.join)
    assert fork.fed_count >= LONG and fork.differing(model, [*committed[:-2], 9, *driver.output("t3")]) == 0

    going_on = turn("a", "t4", (7,), keep_len=len(committed), keep_hash=chain_hash(committed), max_tokens=12)
    driver.step(going_on)
    driver.step()
    events = play(driver, [cold], cold.join)
    (started,) = of(events, MemberTurnStarted)
    assert started.base_len > len(committed) + 1, "it joined while the turn was under way"
    assert cold.kept_count == 300, "what it held with rows it keeps"
    assert cold.differing(model, [*committed, 7, *driver.output("t4")]) == 0


def test_what_was_preempted_is_read_again_to_the_same_rows(model: HuggingFaceModel) -> None:
    driver = Driver(model, "fixed:5", block_count=3)
    prompts = {"a": text(6, 490), "b": text(7, 1000)}
    echoes = [Echo(1, "a"), Echo(2, "b")]
    begin = [turn(session, session, prompt, max_tokens=60) for session, prompt in prompts.items()]
    play(driver, echoes, *begin, *[echo.join for echo in echoes])
    assert driver.engine.load().preempted_count > 0
    late = Echo(3, "b")
    ids = prompts["b"] + driver.output("b")
    play(
        driver,
        [late],
        turn("b", "t2", (4,), keep_len=len(ids), keep_hash=chain_hash(ids), max_tokens=3),
        late.join,
    )
    for echo, session_id in zip(echoes, prompts, strict=True):
        seen = prompts[session_id] + driver.output(session_id)
        echo.rows = {position: row for position, row in echo.rows.items() if position < len(seen)}
        assert echo.differing(model, seen) == 0
    assert late.fed_count > 1000 and late.differing(model, [*ids, 4, *driver.output("t2")]) == 0


def test_a_turn_that_is_cancelled_while_it_is_read_leaves_no_hole(model: HuggingFaceModel) -> None:
    prompt = text(8)
    driver = Driver(model, block_count=16, step_token_budget=100)
    echo = Echo(1, "a")
    echo.hear(driver.step(turn("a", "t1", prompt, max_tokens=6), echo.join))
    echo.hear(driver.step())
    assert 0 < echo.fed_count < LONG // 2
    echo.hear(driver.step_once(CancelTurn("t1")))
    play(driver, [echo], turn("a", "t2", (4, 5), keep_len=LONG, keep_hash=chain_hash(prompt), max_tokens=6))
    assert echo.rewound_count == 1
    assert echo.differing(model, [*prompt, 4, 5, *driver.output("t2")]) == 0


def test_rows_count_as_state_memory(folders: tuple[Path, Path], model: HuggingFaceModel) -> None:
    dtype: DtypeName = "bfloat16" if model.info.dtype == "bfloat16" else "float32"
    without = HuggingFaceModel.load(folders[0], model_id="tiny", dtype=dtype)
    assert without.info.context is None and model.info.context is not None
    assert model.info.block_bytes - without.info.block_bytes == 512 * 48 * 2
