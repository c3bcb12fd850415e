"""A causal language model as the draft model, with tiny random Llamas: it drafts what plain decoding would have chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drafter_service.models import NOTHING, DraftedBlock, DraftRequest, ModelOptions, TurnRules, load_model
from drafter_service.models.causal_lm import READ_ROWS, CausalModel, tokenizer_hash_of
from sparkrelay.device.choice import Chooser
from sparkrelay.device.flat_batch import FlatBatch, FlatEntry
from sparkrelay.device.flat_model import FlatCausalLM
from sparkrelay.sampling import Sampling

VOCAB = 96
GREEDY = Sampling()
FILTERED = Sampling(
    temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.2, min_tokens=3, seed=11
)
COOL = Sampling(temperature=0.7, min_p=0.02, frequency_penalty=0.3, seed=12)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.6,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def flat(request: pytest.FixtureRequest, checkpoint: Path) -> FlatCausalLM:
    return FlatCausalLM.load(checkpoint, dtype=request.param, exact=True)


def causal(flat: FlatCausalLM, limit_bytes: int = 2**30) -> CausalModel:
    return CausalModel(flat, 7, "", limit_bytes, flat.layout.bytes_per_token(flat.dtype))


def rules(sampling: Sampling, output_start: int, stop_ids: Sequence[int] = ()) -> TurnRules:
    return TurnRules("t", sampling, output_start, frozenset(stop_ids), 1)


def prompt(length: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, length)]


def plain(flat: FlatCausalLM, ids: Sequence[int], turn: TurnRules, count: int) -> list[int]:
    """Plain decoding, one row at a time: what the target says."""
    state, chooser, read, text = (
        flat.new_state(),
        Chooser(turn.sampling, turn.stop_ids, ids, turn.output_start),
        0,
        list(ids),
    )
    for _ in range(count):
        rows = np.array(text[read:], dtype=np.int64)
        entry = FlatEntry(state, read, len(rows))
        logits = flat.forward(FlatBatch(rows, (entry,), np.array([len(rows) - 1], dtype=np.int64))).numpy()
        read = len(text)
        token = chooser.choose(logits[0])
        chooser.append(token)
        text.append(token)
    return text[len(ids) :]


def drafted(model: CausalModel, *requests: DraftRequest) -> list[DraftedBlock]:
    """The blocks, after as many calls as reading takes."""
    for _ in range(100):
        blocks = model.draft(requests)
        if all(block is not None for block in blocks):
            return [block for block in blocks if block is not None]
    raise AssertionError("it never ends reading")


@pytest.mark.parametrize("sampling", [GREEDY, FILTERED, COOL], ids=["greedy", "T=1 filtered", "T=0.7"])
def test_the_target_as_its_own_draft_model_is_right_every_time(
    flat: FlatCausalLM, sampling: Sampling
) -> None:
    model = causal(flat)
    prompts = [prompt(length, length) for length in (3, 40, 200)]
    turns = [rules(sampling, len(ids)) for ids in prompts]
    texts = [plain(flat, ids, turn, 36) for ids, turn in zip(prompts, turns, strict=True)]
    produced = [0, 0, 0]
    for accepted in (7, 7, 3, 0, 5, 1):  # what a verifier may take of a block, plus its own token
        requests = [
            DraftRequest(key, [*ids, *text[:done]], 0, 7, turn)
            for key, (ids, text, done, turn) in enumerate(zip(prompts, texts, produced, turns, strict=True))
        ]
        for key, block in enumerate(drafted(model, *requests)):
            assert block.token_ids == texts[key][produced[key] : produced[key] + 7]
            assert all(0.0 < confidence <= 1.0 for confidence in block.confidences)
            produced[key] = min(produced[key] + accepted + 1, 36 - 7)


def test_sessions_are_drafted_together_as_they_are_alone(flat: FlatCausalLM) -> None:
    requests = [
        DraftRequest(key, prompt(5 + key, key), 0, 1 + key % 7, rules(FILTERED, 5)) for key in range(9)
    ]
    alone = [drafted(causal(flat), request)[0] for request in requests]
    assert drafted(causal(flat), *requests) == alone


def test_rejected_drafts_and_rewinds_leave_no_trace(flat: FlatCausalLM) -> None:
    model, ids = causal(flat), prompt(30, 3)
    drafted(model, DraftRequest(1, ids, 0, 7, rules(GREEDY, 30)))
    for cut, more in ((30, [5]), (31, [6, 7]), (12, [1, 2, 3]), (1, [9])):
        ids = [*ids[:cut], *more]
        turn = rules(GREEDY, len(ids))
        (block,) = drafted(model, DraftRequest(1, ids, 1, 5, turn))
        assert block.token_ids == plain(flat, ids, turn, 5)


def test_a_long_prompt_is_read_in_several_calls_while_others_go_on(flat: FlatCausalLM) -> None:
    model = causal(flat)
    long, short = prompt(3 * READ_ROWS, 1), prompt(4, 2)
    requests = [
        DraftRequest(1, long, 0, 4, rules(GREEDY, 10)),
        DraftRequest(2, short, 0, 4, rules(GREEDY, 4)),
    ]
    answers = [model.draft(requests) for _ in range(3)]
    assert [answer[0] is None for answer in answers] == [True, True, False]
    assert all(answer[1] is not None for answer in answers)
    last = answers[-1][0]
    assert last is not None
    assert last.token_ids == plain(flat, long, rules(GREEDY, 10), 4)


def test_nothing_is_drafted_behind_a_stop_id(flat: FlatCausalLM) -> None:
    ids = prompt(10, 4)
    text = plain(flat, ids, rules(GREEDY, 10), 7)
    stop = text[2]
    (block,) = drafted(causal(flat), DraftRequest(1, ids, 0, 7, rules(GREEDY, 10, [stop])))
    assert block.token_ids == text[: text.index(stop) + 1]


def test_the_least_recently_drafted_sessions_make_room_and_are_read_again_when_they_return(
    flat: FlatCausalLM,
) -> None:
    slab_bytes = 512 * flat.layout.bytes_per_token(flat.dtype)
    model = causal(flat, limit_bytes=2 * slab_bytes)
    requests = [DraftRequest(key, prompt(20, key), 0, 3, rules(GREEDY, 20)) for key in range(4)]
    first = [drafted(model, request)[0] for request in requests]
    assert model.state_bytes <= 2 * slab_bytes
    assert [drafted(model, request)[0] for request in requests] == first
    assert model.draft(requests)[2:] == [NOTHING, NOTHING]
    assert model.state_bytes <= 2 * slab_bytes


def test_a_session_beyond_the_models_context_gets_nothing(flat: FlatCausalLM) -> None:
    assert causal(flat).draft([DraftRequest(1, [1] * flat.context_limit, 0, 3, rules(GREEDY, 1))]) == [
        NOTHING
    ]


def test_a_forgotten_session_holds_no_memory(flat: FlatCausalLM) -> None:
    model = causal(flat)
    drafted(model, DraftRequest(1, [1, 2], 0, 3, rules(GREEDY, 1)))
    assert model.state_bytes > 0
    model.forget(1)
    model.forget(1)
    assert model.state_bytes == 0


def test_a_folder_is_loaded_with_its_tokenizers_hash(checkpoint: Path) -> None:
    options = ModelOptions(block_size=5, model=str(checkpoint), dtype="float32")
    fingerprint = load_model("causal_lm", options).model.fingerprint
    assert (fingerprint.tokenizer_hash, fingerprint.vocab_size, fingerprint.block_size) == ("", VOCAB, 5)
    (checkpoint / "tokenizer.json").write_text("{}")
    try:
        assert len(tokenizer_hash_of(checkpoint)) == 64
        fingerprint = load_model("causal_lm", options).model.fingerprint
        assert (fingerprint.tokenizer_hash, fingerprint.vocab_size) == (tokenizer_hash_of(checkpoint), 0)
    finally:
        (checkpoint / "tokenizer.json").unlink()
