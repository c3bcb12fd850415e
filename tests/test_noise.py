"""The coupled noise: fixed answers, the same bits in Python, numpy and torch, the right law, exact pruning."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkrelay import noise
from sparkrelay.device import noise as device_noise
from tests.chi_square import chi_square_p
from tests.noise_table import HALF_CELLS, cell_start, table_bytes

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**32 - 1)
HASHES = st.integers(0, 2**32 - 1)
TEMPERATURES = st.floats(0.05, 3.0)

# (seed, position, key, hash of each id of KNOWN_IDS, its Gumbel value in units of 2^-18)
KNOWN_IDS = (0, 1, 2, 49151, 2**31 - 1)
KNOWN_ANSWERS = [
    (
        0, 0, (0x4D197E6F, 0xA706DD2F),
        (0x285B3F6D, 0x510B0347, 0x356ACE6A, 0x9348CF93, 0x16E1667D),
        (462127, 253206, 380714, 40624, 620874),
    ),
    (
        1, 0, (0x7439611E, 0x5E41AB08),
        (0x4DC9F315, 0x1733F511, 0x19E6434B, 0xC46B637F, 0xC3DF8C57),
        (266216, 617026, 586704, -98819, -97172),
    ),
    (
        0, 1, (0xC892B50E, 0x08B4FDA8),
        (0x6FDF80C3, 0x99BEC9FB, 0x02C25548, 0x6872238D, 0x87D9E292),
        (145302, 22511, 1186163, 169296, 73170),
    ),
    (
        7, 41, (0x8FBAF154, 0x0BA3B900),
        (0xDA3611B4, 0xA1F81BEF, 0xD5756FD4, 0xD4FBCB81, 0xE69E07E8),
        (-170069, -408, -153313, -151685, -219606),
    ),
    (
        2**64 - 1, 2**32 - 1, (0x9C66E604, 0xE9567729),
        (0xD65D5001, 0xFA4F56AF, 0xC98A21BF, 0x25536A74, 0x9F1539E4),
        (-156437, -350408, -114498, 484370, 7628),
    ),
]  # fmt: skip
KNOWN_GUMBELS = [
    (0, 5996244), (1, 5708250), (2, 5574340), (255, 4361417), (256, 4360393), (2**31 - 1, 96079), (2**31, 96079),
    (2**32 - 2, -807606), (2**32 - 1, -820509), (0x12345678, 683371), (0xDEADBEEF, -186765),
]  # fmt: skip
# Tokens at positions 0..9 with seed 2026 from the logits (i mod 37) / 8 of 1,000 ids.
KNOWN_TOKENS = [
    (0.7, [738, 369, 998, 360, 921, 591, 69, 428, 573, 690]),
    (1.0, [738, 369, 998, 360, 921, 246, 69, 428, 573, 690]),
    (1.5, [644, 429, 240, 500, 921, 246, 864, 428, 573, 565]),
]


# ------------------------------------------------------------------------------------------------ fixed answers


def test_splitmix64_gives_the_generators_published_first_outputs() -> None:
    assert noise.splitmix64(0) == 0xE220A8397B1DCDAF
    assert noise.splitmix64(1234567) == 6457827717110365317


@pytest.mark.parametrize(("seed", "position", "key", "hashes", "gumbels"), KNOWN_ANSWERS)
def test_the_definition_gives_the_known_answers(
    seed: int, position: int, key: tuple[int, int], hashes: tuple[int, ...], gumbels: tuple[int, ...]
) -> None:
    assert noise.NOISE_VERSION == 1, "a new version keeps these answers and brings its own"
    assert noise.key(seed, position) == key
    assert tuple(noise.hash_id(token_id, *key) for token_id in KNOWN_IDS) == hashes
    assert tuple(noise.gumbel_of(hash_) for hash_ in hashes) == gumbels


@pytest.mark.parametrize(("hash_", "expected"), KNOWN_GUMBELS)
def test_the_gumbel_value_of_a_hash_is_known(hash_: int, expected: int) -> None:
    assert noise.gumbel_of(hash_) == expected


@pytest.mark.parametrize(("temperature", "tokens"), KNOWN_TOKENS)
def test_the_chosen_tokens_are_known(temperature: float, tokens: list[int]) -> None:
    logits = (np.arange(1000) % 37 / 8).astype(np.float32)
    inverse_t = noise.inverse_temperature(temperature)
    assert [noise.choose(logits, inverse_t, 2026, position) for position in range(10)] == tokens


@pytest.mark.parametrize(
    ("seed", "position", "field"), [(-1, 0, "seed"), (2**64, 0, "seed"), (0, 2**32, "position")]
)
def test_a_key_outside_its_range_is_refused_by_name(seed: int, position: int, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        noise.key(seed, position)


def test_no_two_uses_of_noise_share_a_tag() -> None:
    assert len(set(noise.TAGS.values())) == len(noise.TAGS)
    assert all(0 < tag < 2**64 for tag in noise.TAGS.values()), "0 is the choice of tokens itself"


# ------------------------------------------------------------------------------------------------ the table


def test_the_shipped_table_is_what_its_generator_writes() -> None:
    assert Path(noise.__file__).with_name("noise_v1.bin").read_bytes() == table_bytes()


def test_an_altered_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "TABLE_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=r"noise_v1\.bin: its sha256"):
        noise.table.__wrapped__()


def worst_error(pairs: npt.NDArray[np.int32]) -> float:
    """The largest distance of the interpolated table from the Gumbel function, at 3 points of every cell, in nats."""
    starts = np.array([float(cell_start(cell)) for cell in range(HALF_CELLS)])
    widths = np.append(np.diff(starts), 0.0)
    errors = []
    for upper in (0, 1):
        values, steps = pairs[upper * HALF_CELLS : (upper + 1) * HALF_CELLS].T.astype(np.int64)
        for remainder in (0, 16384, 32767):
            cells = slice(1 if remainder else 0, None)  # cell 0 holds t = 0 alone
            share = (starts[cells] + widths[cells] * remainder / 2**15 + 0.5) / 2**32
            exact = -np.log(-np.log(share) if upper else -np.log1p(-share))
            found = (values[cells] + ((steps[cells] * remainder) >> 15)) / noise.GUMBEL_UNIT
            errors.append(np.abs(found - exact).max())
    return float(max(errors))


def test_the_table_is_within_six_millionths_of_the_gumbel_function() -> None:
    assert worst_error(noise.table()) < 6.1e-6


@settings(max_examples=40, deadline=None)
@given(cell=st.integers(0, 2 * HALF_CELLS - 1), units=st.sampled_from([-1000, -5, 5, 1000]))
def test_one_wrong_entry_of_the_table_is_found(cell: int, units: int) -> None:
    altered = noise.table().copy()
    altered[cell, 0] += units
    assert worst_error(altered) > 6.1e-6


def test_the_range_of_the_noise_is_that_of_a_32_bit_uniform() -> None:
    extremes = np.array([noise.gumbel_of(0), noise.gumbel_of(2**32 - 1)]) / noise.GUMBEL_UNIT
    assert extremes == pytest.approx([22.8739, -3.1300], abs=1e-4)


# ------------------------------------------------------------------------------------------------ the same bits everywhere


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, position=POSITIONS, ids=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=60))
def test_hash_and_gumbel_have_the_same_bits_in_python_numpy_and_torch(
    device: str, seed: int, position: int, ids: list[int]
) -> None:
    words = noise.key(seed, position)
    by_definition = [noise.hash_id(token_id, *words) for token_id in ids]
    hashes = noise.hash_ids(np.array(ids), *words)
    hashes_torch = device_noise.hash_ids(
        torch.tensor(ids, device=device), device_noise.keys([seed], [position], device)
    )
    assert hashes.tolist() == by_definition
    assert hashes_torch[0].cpu().numpy().view(np.uint32).tolist() == by_definition
    gumbels = [noise.gumbel_of(hash_) for hash_ in by_definition]
    assert noise.gumbel(hashes).tolist() == gumbels
    assert device_noise.gumbel(hashes_torch)[0].tolist() == gumbels


@pytest.mark.parametrize("device", DEVICES)
def test_gumbel_has_the_same_bits_at_every_edge_of_its_cells(device: str) -> None:
    powers = [2**n for n in range(32)]
    cell_edges = [int(cell_start(cell)) for cell in range(0, HALF_CELLS, 7)]
    near = {edge + offset for edge in (*powers, *cell_edges) for offset in (-1, 0, 1)}
    hashes = np.array(
        sorted({h % 2**32 for h in near} | {2**32 - 1 - h for h in near if h >= 0}), dtype=np.uint32
    )
    by_definition = [noise.gumbel_of(hash_) for hash_ in hashes.tolist()]
    assert noise.gumbel(hashes).tolist() == by_definition
    assert device_noise.gumbel(torch.from_numpy(hashes.view(np.int32)).to(device)).tolist() == by_definition


@pytest.mark.parametrize("device", DEVICES)
def test_torch_chooses_the_tokens_that_numpy_chooses_row_by_row(device: str) -> None:
    rng = np.random.default_rng(1)
    rows = np.stack([row for _, row in rows_of_every_shape(rng, vocab_size=700)])
    temperatures = rng.uniform(0.1, 2.0, len(rows))
    inverse = np.array([noise.inverse_temperature(t) for t in temperatures])
    seeds, positions = rng.integers(0, 2**63, len(rows)).tolist(), rng.integers(0, 2**32, len(rows)).tolist()
    tokens = device_noise.choose(
        torch.from_numpy(rows).to(device),
        torch.from_numpy(inverse).to(device),
        device_noise.keys(seeds, positions, device),
    )
    one_by_one = [noise.choose(*arguments) for arguments in zip(rows, inverse, seeds, positions, strict=True)]
    assert tokens.tolist() == one_by_one
    assert device_noise.greedy(torch.from_numpy(rows).to(device)).tolist() == [
        noise.greedy(row) for row in rows
    ]


# ------------------------------------------------------------------------------------------------ the law


def test_choosing_is_sampling_from_the_softmax() -> None:
    logits = np.array([1.0, 0.0, -1.0, 2.0, 0.5, -2.0, 1.5, -0.5], dtype=np.float32)
    temperature, sample_count = 0.8, 420_000
    seeds = [2**40 + 7919 * (n // 1000) for n in range(sample_count)]  # 420 seeds, 1,000 positions each
    row_keys = device_noise.keys(seeds, [n % 1000 for n in range(sample_count)])
    inverse_t = float(noise.inverse_temperature(temperature))
    tokens = device_noise.choose(
        torch.from_numpy(logits).expand(sample_count, -1), torch.full((sample_count,), inverse_t), row_keys
    )
    weights = np.exp(logits.astype(np.float64) / temperature)
    observed = np.bincount(tokens.numpy(), minlength=logits.size)
    assert chi_square_p(observed, sample_count * weights / weights.sum()) > 1e-4


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_of_the_hash_is_uniform(shift: int) -> None:
    hashes = noise.hash_ids(np.arange(2**20), *noise.key(3, 5))
    observed = np.bincount((hashes >> np.uint32(shift)) & np.uint32(255), minlength=256)
    assert chi_square_p(observed, np.full(256, 2**12)) > 1e-4


def test_neighbouring_tokens_positions_and_seeds_have_unrelated_noise() -> None:
    size = 2**18
    ids = np.arange(size + 3)
    here = noise.gumbel(noise.hash_ids(ids, *noise.key(9, 100))).astype(np.float64)
    others = [here[lag : lag + size] for lag in (1, 2, 3)]
    for seed, position in [(9, 101), (9, 102), (10, 100), (9 ^ noise.TAGS["accept"], 100)]:
        others.append(noise.gumbel(noise.hash_ids(ids[:size], *noise.key(seed, position))).astype(np.float64))
    correlations = [np.corrcoef(here[:size], other)[0, 1] for other in others]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(size)


# ------------------------------------------------------------------------------------------------ the choice


def rows_of_every_shape(
    rng: np.random.Generator, vocab_size: int
) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """Logits like a model's, and those that make pruning hard: flat, peaked, tied, masked, far apart."""

    def normal(scale: float) -> npt.NDArray[np.float32]:
        return rng.normal(scale=scale, size=vocab_size).astype(np.float32)

    steps = np.round(normal(3.0) * 8) / 8  # as coarse as bf16: many ties
    near_ties = normal(1e-6) + np.float32(10.0)
    peaked = normal(1.0)
    peaked[rng.integers(vocab_size)] += 30.0
    few = np.full(vocab_size, -np.inf, dtype=np.float32)
    survivors = rng.choice(vocab_size, size=rng.integers(1, 6), replace=False)
    few[survivors] = rng.normal(size=survivors.size)
    far = normal(1e30)
    return [
        ("model-like", normal(3.0)),
        ("steps", steps.astype(np.float32)),
        ("flat", np.zeros(vocab_size, dtype=np.float32)),
        ("near ties", near_ties),
        ("peaked", peaked),
        ("few left", few),
        ("far apart", far),
    ]


def tokens_changed_by_pruning(rows: list[npt.NDArray[np.float32]], rng: np.random.Generator) -> int:
    """For how many of the rows, each at a temperature and position of its own, the pruned rule errs."""
    changed = 0
    for row in rows:
        inverse_t = noise.inverse_temperature(float(np.exp(rng.uniform(np.log(0.02), np.log(20.0)))))
        seed, position = int(rng.integers(2**63)), int(rng.integers(2**32))
        whole = noise.choose_by_whole_vocabulary(row, inverse_t, seed, position)
        changed += noise.choose(row, inverse_t, seed, position) != whole
    return changed


def many_rows(rng: np.random.Generator, sets: int, vocab_size: int) -> list[npt.NDArray[np.float32]]:
    sizes = rng.integers(1, vocab_size, size=sets).tolist()
    return [row for size in sizes for _, row in rows_of_every_shape(rng, size)]


def test_pruning_never_changes_a_token() -> None:
    rng = np.random.default_rng(2)
    assert tokens_changed_by_pruning(many_rows(rng, sets=1000, vocab_size=3000), rng) == 0
    assert tokens_changed_by_pruning(many_rows(rng, sets=20, vocab_size=100_000), rng) == 0


def test_a_bound_that_is_too_low_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true_bounds = noise._bound_scores

    def too_low_except_for_the_leader(logits, *rest):  # type: ignore[no-untyped-def]
        bounds = true_bounds(logits, *rest) - np.float32(0.5)
        bounds[logits.argmax()] = np.inf
        return bounds

    monkeypatch.setattr(noise, "_bound_scores", too_low_except_for_the_leader)
    rng = np.random.default_rng(2)
    assert tokens_changed_by_pruning(many_rows(rng, sets=100, vocab_size=3000), rng) > 0


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-np.inf, -70.0, -1.0, -1e-6, 0.0, 1e-6, 1.0]), min_size=1, max_size=30),
    temperature=TEMPERATURES, seed=SEEDS, position=POSITIONS,
)  # fmt: skip
def test_choosing_among_ids_is_choosing_with_all_others_masked(
    logits: list[float], temperature: float, seed: int, position: int
) -> None:
    few = np.array([*logits, 0.5], dtype=np.float32)
    ids = np.arange(few.size, dtype=np.int64) * 31 + 5
    everyone = np.full(1000, -np.inf, dtype=np.float32)
    everyone[ids] = few
    inverse_t = noise.inverse_temperature(temperature)
    token_id = noise.choose(few, inverse_t, seed, position, ids)
    assert token_id == noise.choose(everyone, inverse_t, seed, position)
    assert token_id == noise.choose_by_whole_vocabulary(few, inverse_t, seed, position, ids)
    assert np.isfinite(everyone[token_id]), "a masked token is never chosen"


def test_the_lowest_id_wins_among_equal_scores() -> None:
    gumbels = noise.gumbel(noise.hash_ids(np.arange(50_000), *noise.key(4, 6)))
    order = np.argsort(gumbels, kind="stable")
    repeats = np.flatnonzero(np.diff(gumbels[order]) == 0)[:10]
    assert repeats.size == 10
    inverse_t = noise.inverse_temperature(1.0)
    for index in repeats:
        pair = np.sort(order[index : index + 2])
        row = np.full(50_000, -np.inf, dtype=np.float32)
        row[pair] = 2.5
        assert noise.choose(row, inverse_t, 4, 6) == pair[0]
        assert noise.choose_by_whole_vocabulary(row, inverse_t, 4, 6) == pair[0]
        chosen = device_noise.choose(torch.from_numpy(row)[None], torch.ones(1), device_noise.keys([4], [6]))
        assert chosen.tolist() == [pair[0]]


def test_greedy_takes_the_lowest_id_among_the_best() -> None:
    assert noise.greedy(np.array([0.0, 3.0, 1.0, 3.0], dtype=np.float32)) == 1


@pytest.mark.parametrize(
    "bad", [[-np.inf, -np.inf], [0.0, np.nan], [np.inf, 0.0]], ids=["all masked", "NaN", "+inf"]
)
def test_a_row_without_a_candidate_is_refused(bad: list[float]) -> None:
    row = np.array(bad, dtype=np.float32)
    inverse_t = noise.inverse_temperature(1.0)
    with pytest.raises(noise.NoCandidate, match="finite best logit"):
        noise.greedy(row)
    with pytest.raises(noise.NoCandidate):
        noise.choose(row, inverse_t, 0, 0)
    with pytest.raises(noise.NoCandidate):
        noise.choose_by_whole_vocabulary(row, inverse_t, 0, 0)
    good = torch.tensor([[0.0, 1.0]])
    rows = torch.cat([good, torch.from_numpy(row)[None]])
    assert device_noise.greedy(rows).tolist() == [1, device_noise.NO_CANDIDATE]
    row_keys = device_noise.keys([0, 0], [0, 0])
    assert device_noise.choose(rows, torch.ones(2), row_keys).tolist()[1] == device_noise.NO_CANDIDATE


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_without_noise_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        noise.inverse_temperature(temperature)


def test_the_tiniest_temperature_is_as_good_as_greedy() -> None:
    row = np.random.default_rng(5).normal(size=5000).astype(np.float32)
    inverse_t = noise.inverse_temperature(5e-324)
    assert {noise.choose(row, inverse_t, 1, position) for position in range(50)} == {noise.greedy(row)}


def test_threads_choose_without_disturbing_each_other() -> None:
    rng = np.random.default_rng(6)
    jobs = [
        (rng.normal(size=size).astype(np.float32), noise.inverse_temperature(1.0), 11, position)
        for position in range(100) for size in (9000, 20_000)
    ]  # fmt: skip
    alone = [noise.choose(*job) for job in jobs]
    with ThreadPoolExecutor(max_workers=4) as pool:
        assert list(pool.map(lambda job: noise.choose(*job), jobs)) == alone
