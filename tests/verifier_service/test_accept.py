"""Coupled acceptance: any block, from any drafter, commits exactly what plain decoding would have written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkrelay.device.choice import Chooser
from sparkrelay.sampling import Sampling
from verifier_service.accept import BlockVerdict, rejection_verify, residual, verify_block

VOCAB_SIZE = 12
PROMPT = (3, 1, 4, 1, 5)
TURN_LENGTH = 24

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 3, 8]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.02]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    min_tokens=st.sampled_from([0, 7]),
    seed=st.integers(0, 2**64 - 1),
)


class HashedModel:
    """Logits that depend on the last two tokens through a table: a model small enough to run a thousand times."""

    def __init__(self, seed: int, scale: float = 2.0) -> None:
        table = np.random.default_rng(seed).normal(scale=scale, size=(VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE))
        self._table = table.astype(np.float32)

    def row(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        row: npt.NDArray[np.float32] = self._table[token_ids[-2], token_ids[-1]]
        return row

    def rows(self, token_ids: Sequence[int], draft_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """[1 + depth, vocab]: what one forward over the anchor and the block gives."""
        return np.stack([self.row([*token_ids, *draft_ids[:k]]) for k in range(len(draft_ids) + 1)])


def decode_plainly(model: HashedModel, sampling: Sampling, stop_ids: set[int]) -> list[int]:
    """The turn without speculation, written without any of the code under test but the choice itself."""
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + TURN_LENGTH:
        token_id = Chooser(sampling, stop_ids, tokens, len(PROMPT)).choose(model.row(tokens))
        tokens.append(token_id)
        if token_id in stop_ids:
            break
    return tokens[len(PROMPT) :]


def draft_block(kind: str, plain: list[int], done: int, depth: int, rng: np.random.Generator) -> list[int]:
    """A block as drafters of every character would propose it; `plain` is the answer they try to guess."""
    truth = [*plain[done : done + depth], *rng.integers(0, VOCAB_SIZE, depth).tolist()][:depth]
    if kind == "knows everything":
        return truth
    if kind == "always wrong":
        return [(token_id + 1) % VOCAB_SIZE for token_id in truth]
    if kind == "random":
        return [int(token_id) for token_id in rng.integers(0, VOCAB_SIZE, depth)]
    return [token_id if rng.random() < 0.7 else int(rng.integers(VOCAB_SIZE)) for token_id in truth]


DRAFTERS = st.sampled_from(["knows everything", "always wrong", "random", "mostly right"])


@settings(max_examples=150, deadline=None)
@given(
    sampling=SAMPLINGS, drafter=DRAFTERS, model_seed=st.integers(0, 2**32), rng_seed=st.integers(0, 2**32),
    stop_ids=st.sets(st.integers(0, VOCAB_SIZE - 1), max_size=2),
)  # fmt: skip
def test_any_blocks_commit_exactly_what_plain_decoding_writes(
    sampling: Sampling, drafter: str, model_seed: int, rng_seed: int, stop_ids: set[int]
) -> None:
    model, rng = HashedModel(model_seed), np.random.default_rng(rng_seed)
    plain = decode_plainly(model, sampling, stop_ids)
    tokens = list(PROMPT)
    chooser = Chooser(sampling, stop_ids, tokens, len(PROMPT))
    stopped = False
    while not stopped and (remaining := len(PROMPT) + TURN_LENGTH - len(tokens)) > 0:
        depth = min(int(rng.integers(0, 16)), remaining - 1)
        block = draft_block(drafter, plain, len(tokens) - len(PROMPT), depth, rng)
        verdict = verify_block(model.rows(tokens, block), block, chooser, stop_ids)
        assert verdict.tokens[: verdict.accepted] == tuple(block[: verdict.accepted])
        assert verdict.tokens[verdict.accepted :] == (
            () if verdict.next_token is None else (verdict.next_token,)
        )
        assert (verdict.next_token is None) <= verdict.stopped, "without a next token the turn is over"
        if drafter == "knows everything" and not verdict.stopped:
            assert verdict.accepted == depth
        if drafter == "always wrong":
            assert verdict.accepted == 0
        tokens.extend(verdict.tokens)
        stopped = verdict.stopped
        assert chooser.length == len(tokens)
    assert tokens[len(PROMPT) :] == plain


def greedy_rows(*tokens: int) -> npt.NDArray[np.float32]:
    """Rows whose greedy choice is known."""
    return np.eye(VOCAB_SIZE, dtype=np.float32)[list(tokens)]


class CountingChooser(Chooser):
    """Counts the rows that were looked at."""

    looked_at = 0

    def choose(self, row: npt.NDArray[np.float32]) -> int:
        self.looked_at += 1
        return super().choose(row)


def greedy_chooser() -> CountingChooser:
    return CountingChooser(Sampling(), (), PROMPT, len(PROMPT))


def test_a_block_accepted_whole_earns_a_bonus_token() -> None:
    verdict = verify_block(greedy_rows(7, 8, 9), [7, 8], greedy_chooser(), ())
    assert verdict == BlockVerdict(accepted=2, next_token=9, tokens=(7, 8, 9), stopped=False)


def test_rows_behind_the_first_mismatch_are_not_looked_at() -> None:
    chooser = greedy_chooser()
    verdict = verify_block(greedy_rows(7, 8, 9, 2), [7, 3, 9], chooser, ())
    assert verdict == BlockVerdict(accepted=1, next_token=8, tokens=(7, 8), stopped=False)
    assert chooser.looked_at == 2


def test_no_draft_token_is_one_step_of_plain_decoding() -> None:
    verdict = verify_block(greedy_rows(6), [], greedy_chooser(), ())
    assert verdict == BlockVerdict(accepted=0, next_token=6, tokens=(6,), stopped=False)


def test_a_draft_block_is_cut_after_its_first_stop_id() -> None:
    verdict = verify_block(greedy_rows(7, 8, 9, 2), [7, 8, 9], greedy_chooser(), {8})
    assert verdict == BlockVerdict(accepted=2, next_token=None, tokens=(7, 8), stopped=True)


def test_a_stop_id_as_the_last_draft_token_earns_no_bonus() -> None:
    verdict = verify_block(greedy_rows(7, 8, 9), [7, 8], greedy_chooser(), {8})
    assert verdict == BlockVerdict(accepted=2, next_token=None, tokens=(7, 8), stopped=True)


@pytest.mark.parametrize(("block", "accepted"), [([7, 3], 1), ([7], 1), ([], 0)])
def test_a_stop_id_that_the_target_adds_itself_is_the_next_token(block: list[int], accepted: int) -> None:
    rows = greedy_rows(7, 8, 9)[: len(block) + 1] if block else greedy_rows(8)
    verdict = verify_block(rows, block, greedy_chooser(), {8})
    assert (verdict.accepted, verdict.next_token, verdict.stopped) == (accepted, 8, True)


def test_a_rejected_stop_id_stops_nothing() -> None:
    verdict = verify_block(greedy_rows(7, 2, 9), [7, 8], greedy_chooser(), {8})
    assert verdict == BlockVerdict(accepted=1, next_token=2, tokens=(7, 2), stopped=False)


def test_what_was_committed_before_a_broken_row_is_kept_and_the_failure_told() -> None:
    rows = greedy_rows(7, 8, 9)
    rows[1] = np.nan
    chooser = greedy_chooser()
    verdict = verify_block(rows, [7, 8], chooser, ())
    assert (verdict.accepted, verdict.next_token, verdict.tokens, verdict.stopped) == (1, None, (7,), False)
    assert verdict.failure is not None and "finite best logit" in verdict.failure
    assert chooser.length == len(PROMPT) + 1


def test_a_missing_row_is_a_bug() -> None:
    with pytest.raises(ValueError, match="rows: are 2; 2 draft tokens need 3"):
        verify_block(greedy_rows(7, 8), [7, 8], greedy_chooser(), ())


# ------------------------------------------------------------------------------------------------ the rejection rule


def laws(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float64]:
    return rng.dirichlet(np.ones(shape[-1]), size=shape[:-1])


def test_equal_distributions_accept_every_block_whole() -> None:
    rng = np.random.default_rng(0)
    target = laws(rng, 500, 4, 6)
    verdicts = rejection_verify(
        target_probs=target,
        draft_probs=target[:, :3],
        draft_ids=rng.integers(0, 6, (500, 3)),
        uniforms=rng.random((500, 4)),
    )
    assert (verdicts.accepted == 3).all()


def test_a_token_that_the_target_never_writes_is_never_accepted_nor_drawn() -> None:
    rng = np.random.default_rng(1)
    target, draft = laws(rng, 2000, 2, 5), laws(rng, 2000, 1, 5)
    target[:, :, 2] = 0.0
    target /= target.sum(axis=-1, keepdims=True)
    draft_ids = np.full((2000, 1), 2)
    verdicts = rejection_verify(
        target_probs=target, draft_probs=draft, draft_ids=draft_ids, uniforms=rng.random((2000, 2))
    )
    assert (verdicts.accepted == 0).all()
    assert (verdicts.next_token != 2).all()


@given(seed=st.integers(0, 2**32), vocab_size=st.integers(1, 8))
def test_the_residual_is_what_the_target_has_beyond_the_draft(seed: int, vocab_size: int) -> None:
    rng = np.random.default_rng(seed)
    target, draft = laws(rng, 5, vocab_size), laws(rng, 5, vocab_size)
    left = residual(target, draft)
    np.testing.assert_allclose(left.sum(axis=-1), 1.0)
    # min(target, draft) is accepted, the rest is drawn from the residual: together the target.
    overlap = np.minimum(target, draft)
    np.testing.assert_allclose(overlap + (1 - overlap.sum(-1, keepdims=True)) * left, target, atol=1e-12)


def test_a_draw_at_either_end_of_the_uniform_is_a_possible_token() -> None:
    target = np.array([[[0.0, 0.5, 0.5, 0.0]]] * 2)
    nothing = np.zeros((2, 0, 4))
    uniforms = np.array([[0.0], [np.nextafter(1.0, 0.0)]])
    verdicts = rejection_verify(
        target_probs=target, draft_probs=nothing, draft_ids=np.zeros((2, 0), np.int64), uniforms=uniforms
    )
    assert verdicts.next_token.tolist() == [1, 2]
