"""Logits of a row are bit-equal whatever else is in the batch: the promise of exact mode, on the demo model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparkrelay.device.flat_model import DtypeName, FlatCausalLM
from sparkrelay.device.numerics import probe
from sparkrelay.store import ModelFiles
from tests.device.ragged import Line, run, step
from tests.requirements import unavailable

LENGTH = 530
WATCHED = range(498, LENGTH)
"""Positions whose logits are compared: around the border between key blocks at 511/512/513."""
MOST_DEPTH = 15
SESSIONS = 16


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def model(request: pytest.FixtureRequest, demo_model: ModelFiles) -> FlatCausalLM:
    dtype: DtypeName = request.param
    loaded = FlatCausalLM.load(demo_model.path, dtype=dtype)
    numerics = probe(loaded)
    if not numerics.exact:
        unavailable("exact mode", numerics.reason, "a CPU whose kernels pass the start-up probe")
    return loaded


@pytest.fixture(scope="module")
def plain(model: FlatCausalLM) -> Line:
    """The reference: a prompt read at once, then one row at a time, alone."""
    return plain_line(model)


def text(model: FlatCausalLM, seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.vocab_size, length)


def plain_line(model: FlatCausalLM) -> Line:
    return run(model, text(model, 1, LENGTH), [WATCHED.start] + [1] * len(WATCHED), kept_from=WATCHED.start)


def differing(plain: Line, other: Line) -> list[int]:
    """Watched positions that `other` has computed and whose logits differ in any bit."""
    seen = [position for position in WATCHED if position in other.rows]
    assert seen, "nothing was compared"
    return [position for position in seen if not torch.equal(plain.rows[position], other.rows[position])]


def forked(model: FlatCausalLM, line: Line, length: int) -> Line:
    """The line as it was after `length` positions, with no rows yet."""
    state = line.state.fork()
    state.rewind(length)
    return Line(line.ids, state)


def in_company(model: FlatCausalLM, plain: Line) -> Line:
    """The watched rows at random depths among 16 sessions: some decode, some verify, some still read their prompts."""
    generator = np.random.default_rng(9)
    line = forked(model, plain, WATCHED.start)
    others = [
        forked(model, plain, int(generator.integers(1, LENGTH - 2 * MOST_DEPTH))) for _ in range(SESSIONS - 3)
    ] + [Line(text(model, 20 + n, 400), model.new_state()) for n in range(2)]
    while line.left:
        parts = [(line, min(int(generator.integers(1, MOST_DEPTH + 2)), line.left))]
        parts += [
            (other, min(int(generator.integers(1, MOST_DEPTH + 2)), other.left))
            for other in others
            if other.left
        ]
        order = generator.permutation(len(parts))
        step(model, [parts[place] for place in order], kept_from=WATCHED.start)
    return line


@pytest.mark.parametrize("chunk", [7, 100, 192, 511, 512, 513])
def test_a_prompt_read_in_chunks_gives_the_bits_of_plain_decoding(
    model: FlatCausalLM, plain: Line, chunk: int
) -> None:
    chunks = [chunk] * (LENGTH // chunk + 1)
    assert differing(plain, run(model, plain.ids, chunks, kept_from=WATCHED.start)) == []


def test_a_prompt_read_in_random_chunks_gives_the_bits_of_plain_decoding(
    model: FlatCausalLM, plain: Line
) -> None:
    generator = np.random.default_rng(4)
    line = run(
        model, plain.ids, generator.choice([1, 2, 3, 5, 17, 61, 130], size=LENGTH), kept_from=WATCHED.start
    )
    assert differing(plain, line) == []


@pytest.mark.parametrize("depth", range(MOST_DEPTH + 1))
def test_every_depth_gives_the_bits_of_plain_decoding(model: FlatCausalLM, plain: Line, depth: int) -> None:
    line = forked(model, plain, WATCHED.start + depth % 4)
    while line.left:
        step(model, [(line, min(depth + 1, line.left))])
    assert differing(plain, line) == []


@pytest.mark.parametrize("position", [510, 511, 512, 513])
def test_one_kept_row_of_a_long_chunk_has_the_bits_of_plain_decoding(
    model: FlatCausalLM, plain: Line, position: int
) -> None:
    line = forked(model, plain, position - 60)
    step(model, [(line, 61)], kept_from=position)
    assert list(line.rows) == [position]
    assert differing(plain, line) == []


def test_a_session_among_sixteen_has_the_bits_of_one_alone(model: FlatCausalLM, plain: Line) -> None:
    assert differing(plain, in_company(model, plain)) == []


def test_a_rejected_block_leaves_no_trace(model: FlatCausalLM, plain: Line) -> None:
    line = forked(model, plain, 505)
    wrong = Line(np.concatenate([plain.ids[:505], text(model, 6, 12)]), line.state)
    step(model, [(wrong, 12)])
    line.state.rewind(507 - 2)
    while line.left:
        step(model, [(line, min(4, line.left))])
    assert differing(plain, line) == []


def test_taking_the_padding_out_is_noticed(model: FlatCausalLM) -> None:
    """The tests above would fail without padding: the same comparison finds differing bits when it is off."""
    multiple = model.row_multiple
    model.row_multiple = 1
    try:
        bare = plain_line(model)
        assert differing(bare, in_company(model, bare)) or differing(
            bare, run(model, bare.ids, [512, 7, 11], 512)
        )
    finally:
        model.row_multiple = multiple
