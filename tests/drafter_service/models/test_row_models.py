"""The kinds that read context rows, as the engine drives them: round by round, killed, cold, cut, with rows missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from drafter_service.calibration import Calibration
from drafter_service.context_rows import ContextRows
from drafter_service.models import (
    NOTHING,
    CannotLoad,
    DraftedBlock,
    DraftModel,
    DraftRequest,
    ModelOptions,
    TurnRules,
    load_model,
)
from drafter_service.models.dspark import drafter
from drafter_service.models.dspark.checkpoint import save_draft
from drafter_service.models.dspark.drafter import BlockModel, projector_hash
from drafter_service.models.dspark.network import DSparkNetwork
from drafter_service.models.dspark.packed import PackedSequence, packed_hidden
from drafter_service.models.mtp.drafter import MtpModel
from drafter_service.models.mtp.network import MtpNetwork, MtpSequence, mtp_of, sequences_hidden
from sparkrelay.device.choice import Chooser
from sparkrelay.frames import ContextKind
from sparkrelay.sampling import Sampling
from tests.drafter_service.models.dspark_networks import (
    HIDDEN,
    TAPS,
    VOCAB,
    draft_config,
    random_network,
    target_config,
)

GREEDY = Sampling()
WARM = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=5)
LENGTH = 60


class Story:
    """A session's ids and what the target thought of them; `rows` are what a verifier would send."""

    def __init__(self, seed: int, rows: torch.Tensor, width: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids: list[int] = torch.randint(0, VOCAB - 1, (LENGTH,), generator=generator).tolist()
        self.rows = rows
        self._width = width

    def request(
        self, length: int, sampling: Sampling = GREEDY, key: int = 1, rows_start: int = 0, limit: int = 4
    ) -> DraftRequest:
        """The session when it has so many ids, and rows of all but the last from rows_start on."""
        kept = ContextRows(self._width)
        words = self.rows.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        kept.put(rows_start, words[rows_start : length - 1])
        rules = TurnRules("turn", sampling, 1, frozenset(), 1)
        return DraftRequest(key, self.ids[:length], 0, limit, rules, kept)


def block_network(**fields: Any) -> DSparkNetwork:
    return random_network(draft_config(**fields)).bfloat16()


def block_model(network: DSparkNetwork, calibration: Calibration | None = None, **options: int) -> BlockModel:
    limit = options.get("limit_bytes", 2**30)
    return BlockModel(network, calibration or Calibration(), "hash", 7, limit, projector_hash(network))


def block_story(network: DSparkNetwork, seed: int = 0) -> Story:
    taps = torch.randn(LENGTH, TAPS * HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()
    story = Story(seed, network.context_rows(taps), HIDDEN)
    story.taps = taps  # type: ignore[attr-defined]
    return story


def mtp_network() -> MtpNetwork:
    torch.manual_seed(3)
    network = MtpNetwork(mtp_of(target_config()))
    for tensor in network.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 0.3)
    return network.eval().requires_grad_(False).bfloat16()


def plain_block(network: DSparkNetwork, story: Story, length: int, sampling: Sampling) -> list[int]:
    """What drafting must choose: the training form's hidden states, the head slot by slot, the turn's own choice."""
    taps: torch.Tensor = story.taps  # type: ignore[attr-defined]
    ids, anchor = torch.tensor(story.ids), torch.tensor([length - 1])
    hidden = packed_hidden(network, [PackedSequence(taps[: length - 1], ids, anchor)])
    chooser = Chooser(sampling, frozenset(), story.ids[:length], 1)
    chosen = [story.ids[length - 1]]
    state = None if network.markov_head is None else network.markov_head.first_state(hidden)
    for slot in range(hidden.shape[1]):
        row = network.base_logits(hidden[:, slot]).float()
        if network.markov_head is not None and state is not None:
            previous = network.markov_head.previous(torch.tensor([chosen[-1]]))
            features, state = network.markov_head.step(previous, hidden[:, slot], state)
            row = row + network.markov_head.bias(features).float()
        token_id = chooser.choose(row[0].numpy())
        chooser.append(token_id)
        chosen.append(token_id)
    return chosen[1:]


def one(model: DraftModel, request: DraftRequest) -> DraftedBlock:
    """The block of one session; reading may take several calls."""
    for _ in range(20):
        answer = model.draft([request])[0]
        if answer is not None:
            return answer
    raise AssertionError("never read to the end")


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"markov_head_type": "rnn"},
        {"markov_rank": 0, "enable_confidence_head": False},
        {"markov_rank": 0, "enable_confidence_head": False, "sample_from_anchor": False},
    ],
    ids=str,
)
def test_blocks_are_what_the_training_form_and_the_turn_s_choice_give(
    fields: dict[str, Any], sampling: Sampling
) -> None:
    network = block_network(**fields)
    model, story = block_model(network), block_story(network)
    agreed = 0
    for length in (2, 9, 10, 14, 31):
        block = one(model, story.request(length, sampling))
        expected = plain_block(network, story, length, sampling)
        assert len(block.token_ids) == len(block.confidences) == 4
        assert all(0.0 < confidence < 1.0 for confidence in block.confidences)
        agreed += list(block.token_ids) == expected
    assert agreed >= 4  # bfloat16 has near ties, and the two forms add up in another order


Make = Callable[[], tuple[Callable[[], DraftModel], list[Story]]]


def make_blocks() -> tuple[Callable[[], DraftModel], list[Story]]:
    network = block_network()
    return lambda: block_model(network), [block_story(network, seed) for seed in (1, 2, 3)]


def make_mtp() -> tuple[Callable[[], DraftModel], list[Story]]:
    network = mtp_network()
    stories = [
        Story(seed, torch.randn(LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed)), HIDDEN)
        for seed in (1, 2, 3)
    ]
    return lambda: MtpModel(network, "hash", 2**30), stories


@pytest.mark.parametrize("make", [make_blocks, make_mtp])
def test_killed_cold_or_in_company_a_model_drafts_the_same(make: Make) -> None:
    """Bit for bit, confidences included: what a model keeps is a cache, and company changes nothing."""
    new_model, stories = make()
    lived, seen = new_model(), []
    for length in (5, 6, 9, 30, 33):
        requests = [story.request(length, key=key) for key, story in enumerate(stories)]
        together = lived.draft(requests)
        for request, block in zip(requests, together, strict=True):
            assert block is not None and block.token_ids
            assert one(new_model(), request) == block
            seen.append(tuple(block.token_ids))
    assert len(set(seen)) > 5


@pytest.mark.parametrize("make", [make_blocks, make_mtp])
def test_a_session_that_was_cut_is_drafted_for_anew(make: Make) -> None:
    new_model, stories = make()
    model = new_model()
    one(model, stories[0].request(40))
    other = stories[1]
    other.ids[:12] = stories[0].ids[:12]
    other.rows[:12] = stories[0].rows[:12]
    request = other.request(25)
    assert one(model, request) == one(new_model(), request)
    assert one(model, request) != one(model, stories[0].request(25))


@pytest.mark.parametrize("make", [make_blocks, make_mtp])
def test_rows_that_do_not_exist_are_no_obstacle(make: Make) -> None:
    new_model, stories = make()
    part, whole = (stories[0].request(20, rows_start=start) for start in (8, 0))
    assert one(new_model(), part).token_ids
    assert one(new_model(), part).confidences != one(new_model(), whole).confidences
    assert one(new_model(), stories[0].request(20, rows_start=19)) == NOTHING
    assert one(new_model(), part._replace(rows=None)) == NOTHING


@pytest.mark.parametrize("make", [make_blocks, make_mtp])
def test_forgetting_loses_nothing_but_time(make: Make) -> None:
    new_model, stories = make()
    model = new_model()
    first = one(model, stories[0].request(20))
    model.forget(1)
    model.forget(99)
    assert one(model, stories[0].request(20)) == first


def test_long_prompts_wait_for_each_other_and_nobody_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter, "READ_ROWS", 40)
    network = block_network()
    stories = [block_story(network, seed) for seed in (1, 2, 3)]
    model = block_model(network)
    one(model, stories[2].request(55, key=2))
    requests = [stories[key].request(length, key=key) for key, length in enumerate((59, 60, 58))]
    first = model.draft(requests)
    assert first[:2] == [None, None] and first[2] is not None
    waiting, calls = requests[:2], 0
    while waiting:
        answers = model.draft(waiting)
        for request, answer in zip(waiting, answers, strict=True):
            assert answer is None or answer == one(block_model(network), request)
        waiting = [r for r, answer in zip(waiting, answers, strict=True) if answer is None]
        calls += 1
    assert 1 <= calls <= 3
    assert first[2] == one(block_model(network), requests[2])


def test_memory_has_a_limit() -> None:
    network = block_network()
    stories = [block_story(network, seed) for seed in (1, 2, 3)]
    model = block_model(network, limit_bytes=1)
    for _ in range(2):
        for key, story in enumerate(stories):
            request = story.request(20, key=key)
            assert one(model, request) == one(block_model(network), request)
    assert len(model._sessions._sessions) == 1


def test_limits_and_stop_ids_end_a_block() -> None:
    network = block_network()
    model, story = block_model(network), block_story(network)
    whole = one(model, story.request(20)).token_ids
    assert one(model, story.request(20, limit=2)).token_ids == whole[:2]
    request = story.request(20)
    stopping = request._replace(turn=TurnRules("other", GREEDY, 1, frozenset({whole[1]}), 1))
    assert one(model, stopping).token_ids == whole[: list(whole).index(whole[1]) + 1]


def test_confidences_are_calibrated_by_position_and_kind_of_turn() -> None:
    network = block_network()
    story = block_story(network)
    raw = one(block_model(network), story.request(20)).confidences
    tempered = block_model(network, Calibration(greedy=(2.0, 1.0, 0.5), sampled=(4.0,)))
    logits = [float(np.log(c / (1 - c))) for c in raw]
    found = one(tempered, story.request(20)).confidences
    expected = [1 / (1 + np.exp(-logit / t)) for logit, t in zip(logits, (2.0, 1.0, 0.5, 0.5), strict=True)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert max(abs(a - b) for a, b in zip(found, raw, strict=True)) > 0.01


def test_the_fingerprint_says_which_rows_are_read() -> None:
    network = block_network()
    about = block_model(network).fingerprint
    assert about.context_kind is ContextKind.ROWS
    assert (about.context_width, about.tap_layers, about.block_size) == (HIDDEN, (1, 5), 4)
    assert about.context_hash == projector_hash(network)
    other = block_network()
    other.fc.weight[0, 0] += 1
    assert projector_hash(other) != about.context_hash
    assert MtpModel(mtp_network(), "", 1).fingerprint.tap_layers == (8,)


@pytest.mark.parametrize("kind", ["dspark", "dflash", "mtp"])
def test_a_kind_is_loaded_from_its_folder_and_its_target_s(tmp_path: Path, kind: str) -> None:
    draft, target = tmp_path / "draft", tmp_path / "target"
    target.mkdir()
    headless = {"markov_rank": 0, "enable_confidence_head": False}
    network = mtp_network() if kind == "mtp" else block_network(**(headless if kind == "dflash" else {}))
    save_draft(network, draft, {"target": {"tokenizer_hash": "abc"}}, with_vocabulary=False)
    (target / "config.json").write_text("{}")
    save_file(
        {
            "model.embed_tokens.weight": network.embed_tokens.weight,
            "lm_head.weight": network.lm_head.weight.clone(),
        },
        target / "model.safetensors",
    )
    options = ModelOptions(block_size=7, model=str(draft), target=str(target))
    model = load_model(kind, options).model
    assert (model.fingerprint.proposal_kind, model.fingerprint.tokenizer_hash) == (kind, "abc")
    network.requires_grad_(False)
    if isinstance(network, DSparkNetwork):
        request = block_story(network).request(20)
        straight: DraftModel = block_model(network)
    else:
        request = make_mtp()[1][0].request(20)
        straight = MtpModel(network, "", 2**30)
    assert one(model, request).token_ids == one(straight, request).token_ids
    with pytest.raises(CannotLoad, match="model, target"):
        load_model(kind, ModelOptions(block_size=7, model=str(draft)))
    wrong = "dspark" if kind == "mtp" else "mtp"
    with pytest.raises(CannotLoad, match=r"model: .*is no tensor of|model: .*is missing"):
        load_model(wrong, options)


def mtp_by_hand(network: MtpNetwork, story: Story, length: int) -> int:
    rows = story.rows[: length - 1].bfloat16()
    hidden = sequences_hidden(network, [MtpSequence(rows, torch.tensor(story.ids[1:length]))])
    return int(network.base_logits(hidden[-1:]).argmax())


def test_mtp_drafts_the_token_behind_the_anchor() -> None:
    network = mtp_network()
    _, stories = make_mtp()
    model = MtpModel(network, "hash", 2**30)
    found = [list(one(model, stories[0].request(length)).token_ids) for length in range(2, 40)]
    expected = [[mtp_by_hand(network, stories[0], length)] for length in range(2, 40)]
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 36
    assert len({ids[0] for ids in found}) > 5


def spans_of(rows: ContextRows, end: int) -> list[tuple[int, int]]:
    return [(span.start, len(span.rows)) for span in rows.spans(0, end)]


def put(rows: ContextRows, start: int, count: int) -> None:
    rows.put(start, np.full((count, 2), start + 1, np.uint16))


def test_rows_are_kept_by_position_in_any_order() -> None:
    rows = ContextRows(2)
    put(rows, 10, 5)
    put(rows, 0, 4)
    assert spans_of(rows, 99) == [(0, 4), (10, 5)]
    put(rows, 4, 6)
    assert spans_of(rows, 99) == [(0, 15)] and spans_of(rows, 7) == [(0, 7)]
    rows.truncate(6)
    put(rows, 600, 2)
    assert spans_of(rows, 999) == [(0, 6), (600, 2)]
    values: Sequence[int] = [int(span.rows[0, 0]) for span in rows.spans(3, 999)]
    assert values == [1, 601]
