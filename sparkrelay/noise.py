"""The coupled noise, version 1: a pure function of (seed, position, token), the same bits on every machine.

The target's token at a position is `argmax_v [logits_v / T + g(seed, position, v)]`, and a drafter that uses
the same g proposes the same token wherever its logits agree well enough. So g must not depend on call order,
batch, device or library. It is made of integers up to the last step:

    key     two 32-bit words from (seed, position), by splitmix64, once per position
    hash    32 bits per token id, keyed
    gumbel  the hash as the quantile of a standard Gumbel variable, read from a table, int32 in units of 2^-18
            (GUMBEL_UNIT)
    score   trunc(max((l_v - l_max) / T, -64) * 2^18) + gumbel, int32; the highest wins, the lowest id among
            equals

The functions on Python ints are the definition, those on numpy arrays the same on whole rows;
`sparkrelay.device.noise` is the torch twin. Changing one bit of any of them is a new NOISE_VERSION, because
journals and other processes hold answers made with this one.
"""

from __future__ import annotations

import hashlib
import math
import struct
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

FloatRow = npt.NDArray[np.float32]
IdRow = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint32]

NOISE_VERSION: Final = 1
GUMBEL_UNIT: Final = 2**18
LOWEST_SCALED_LOGIT: Final = -64.0

# Anything else that is random takes key(seed ^ TAGS[use], position), so that no two uses ever share noise.
TAGS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "accept": 0x6163636570740001,  # the uniform that accepts or rejects a draft token (rejection rule)
        "residual": 0x7265736964750001,  # the draw that follows a rejection
        "draft": 0x6472616674000001,  # a drafter's own draws where it must not share the target's noise
        "tools": 0x746F6F6C73000001,  # benchmarks, data generation
    }
)

TABLE_SHA256: Final = "6cc6ebae715e80cbabb3373932c6c5c6f45065ad0ad4d20ee7cdd389af32d7a2"
HALF_CELLS: Final = 7938  # cells of the table that belong to hashes below 2^31
FIRST_CELL: Final = (127 << 8) - 1  # so that t = 0 has cell 0 and t = 1 has cell 1

_U32: Final = 0xFFFFFFFF
_U64: Final = 0xFFFFFFFFFFFFFFFF
_LARGEST_FLOAT32: Final = float(np.finfo(np.float32).max)
# A token is left out only if even an upper bound of its score is so far below the leader's. The margin covers
# the table's error (6e-6), truncation (4e-6) and the rounding of the bound itself (2e-5).
_PRUNING_MARGIN: Final = np.float32(1e-3)
_BITS_TO_NATS: Final = np.float32(-math.log(2) / 2**23)
_BOUND_AT_ZERO_BITS: Final = np.float32(159 * math.log(2))


class NoCandidate(ValueError):
    """No token can be chosen: every logit is -inf, or some logit is NaN or +inf. Ends the turn, not the engine."""


# ------------------------------------------------------------------ the definition, on Python ints


def splitmix64(value: int) -> int:
    """One step of the splitmix64 generator: 64 bits to 64 bits, one to one."""
    value = (value + 0x9E3779B97F4A7C15) & _U64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _U64
    return value ^ (value >> 31)


def key(seed: int, position: int) -> tuple[int, int]:
    """The two 32-bit words that key the hash at a position (the token's index in the session's list).

    Raises ValueError where the seed is not of 64 bits or the position not of 32.
    """
    if not 0 <= seed <= _U64:
        raise ValueError(f"seed: is {seed}; send an integer from 0 to 2^64-1")
    if not 0 <= position <= _U32:
        raise ValueError(f"position: is {position}; send an integer from 0 to 2^32-1")
    word = splitmix64(splitmix64(seed) ^ position)
    return word & _U32, word >> 32


def hash_id(token_id: int, k0: int, k1: int) -> int:
    """32 bits that look random, from a token id and a position's key."""
    x = (token_id * 0x9E3779B9 + k0) & _U32
    x ^= x >> 16
    x = (x * 0x21F0AAAD) & _U32
    x ^= x >> 15
    x = (x * 0x735A2D97) & _U32
    x ^= x >> 15
    x = (x + k1) & _U32
    x ^= x >> 16
    x = (x * 0x7FEB352D) & _U32
    x ^= x >> 15
    x = (x * 0x846CA68B) & _U32
    return x ^ (x >> 16)


def gumbel_of(hash_: int) -> int:
    """The Gumbel value of one hash, in units of 2^-18, from -820,509 to 5,996,244."""
    t = min(hash_, _U32 - hash_)
    bits = struct.unpack("<I", struct.pack("<f", t))[0]  # nearest float32: the exponent is the octave
    cell = max((bits >> 15) - FIRST_CELL, 0) + HALF_CELLS * (hash_ >> 31)
    value, step = table()[cell].tolist()
    return int(value + ((step * (bits & 0x7FFF)) >> 15))


@lru_cache(maxsize=1)
def table() -> npt.NDArray[np.int32]:
    """[15876, 2] int32: value at the start of each cell, step to the next. RuntimeError if the file was altered."""
    data = Path(__file__).with_name("noise_v1.bin").read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != TABLE_SHA256:
        raise RuntimeError(f"noise_v1.bin: its sha256 is {found}, not {TABLE_SHA256}; reinstall sparkrelay")
    pairs = np.frombuffer(data, dtype="<i4").astype(np.int32).reshape(-1, 2)
    pairs.flags.writeable = False
    return pairs


# ------------------------------------------------------------------ the same on rows


def hash_ids(ids: npt.NDArray[Any], k0: int, k1: int) -> Hashes:
    """The hash of each token id, same shape as `ids` (any integer type, values below 2^32)."""
    x = ids.astype(np.uint32)
    np.multiply(x, np.uint32(0x9E3779B9), out=x)
    return _finish_hash(x, np.empty_like(x), k0, k1)


def _finish_hash(x: Hashes, scratch: Hashes, k0: int, k1: int) -> Hashes:
    """The hash from `id * 0x9E3779B9` on, in place in x."""
    np.add(x, np.uint32(k0), out=x)
    _xor_shift(x, scratch, 16)
    np.multiply(x, np.uint32(0x21F0AAAD), out=x)
    _xor_shift(x, scratch, 15)
    np.multiply(x, np.uint32(0x735A2D97), out=x)
    _xor_shift(x, scratch, 15)
    np.add(x, np.uint32(k1), out=x)
    _xor_shift(x, scratch, 16)
    np.multiply(x, np.uint32(0x7FEB352D), out=x)
    _xor_shift(x, scratch, 15)
    np.multiply(x, np.uint32(0x846CA68B), out=x)
    _xor_shift(x, scratch, 16)
    return x


def _xor_shift(x: Hashes, scratch: Hashes, bits: int) -> None:
    np.right_shift(x, np.uint32(bits), out=scratch)
    np.bitwise_xor(x, scratch, out=x)


def gumbel(hashes: Hashes) -> npt.NDArray[np.int32]:
    """The Gumbel value of each hash, int32 in units of 2^-18."""
    pairs = table()
    bits = np.minimum(hashes, ~hashes).astype(np.float32).view(np.int32)
    cells = np.maximum((bits >> 15) - FIRST_CELL, 0)
    cells += HALF_CELLS * (hashes >> np.uint32(31)).astype(np.int32)
    values: npt.NDArray[np.int32] = pairs[cells, 0] + ((pairs[cells, 1] * (bits & 0x7FFF)) >> 15)
    return values


def inverse_temperature(temperature: float) -> np.float32:
    """1/T as every device multiplies by it; a T so small that 1/T overflows counts as the smallest that does not."""
    if not temperature > 0.0:
        raise ValueError(f"temperature: is {temperature}; greedy decoding (0) takes no noise, call greedy()")
    return np.float32(min(1.0 / max(temperature, 1.0 / _LARGEST_FLOAT32), _LARGEST_FLOAT32))


def scaled_logits(logits: FloatRow, l_max: np.float32, inverse_t: np.float32) -> npt.NDArray[np.int32]:
    """(l - l_max) / T, not below -64, truncated to int32 in units of 2^-18."""
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, which the lowest value then replaces
        scaled: FloatRow = (logits - l_max) * inverse_t
    units = np.maximum(scaled, np.float32(LOWEST_SCALED_LOGIT)) * np.float32(GUMBEL_UNIT)
    return units.astype(np.int32)


# ------------------------------------------------------------------ the choice of a token


def greedy(logits: FloatRow) -> int:
    """The index of the highest logit, the lowest among equals. Raises NoCandidate."""
    best = int(logits.argmax())  # numpy: the first of equals, and the first NaN if there is one
    require_candidate(logits[best])
    return best


def choose(
    logits: FloatRow,
    inverse_t: np.float32,
    seed: int,
    position: int,
    ids: IdRow | None = None,
) -> int:
    """The token id with the highest score at a position; the lowest id among equals. Raises NoCandidate.

    logits     [n] float32, filtered, not yet divided by the temperature; -inf is never chosen
    inverse_t  of `inverse_temperature`
    ids        [n] the ids that the logits belong to, ascending; None: 0 .. n-1 (the whole vocabulary)

    The same token as `choose_by_whole_vocabulary`, at a fraction of its cost: a bound that needs no logarithm
    (see `_bound_scores`) leaves out all but a few tokens, and only for those the noise itself is computed.
    """
    leader = int(logits.argmax())
    l_max = logits[leader]
    require_candidate(l_max)
    k0, k1 = key(seed, position)
    scratch = _scratch_of(logits.size)
    hashes = scratch.hashes
    if ids is None:
        np.copyto(hashes, _spread_ids(logits.size))
    else:
        np.multiply(ids.astype(np.uint32), np.uint32(0x9E3779B9), out=hashes)
    _finish_hash(hashes, scratch.shifted, k0, k1)
    floor = np.float32(gumbel(hashes[leader : leader + 1])[0] / GUMBEL_UNIT) - _PRUNING_MARGIN
    near = np.flatnonzero(_bound_scores(logits, l_max, inverse_t, scratch) >= floor)
    scores = scaled_logits(logits[near], l_max, inverse_t) + gumbel(hashes[near])
    winner = int(near[scores.argmax()])
    return winner if ids is None else int(ids[winner])


def choose_by_whole_vocabulary(
    logits: FloatRow,
    inverse_t: np.float32,
    seed: int,
    position: int,
    ids: IdRow | None = None,
) -> int:
    """`choose` by its definition: the score of every token. What the pruning is tested against."""
    l_max = logits.max()
    require_candidate(l_max)
    candidates = np.arange(logits.size, dtype=np.int64) if ids is None else ids
    scores = scaled_logits(logits, l_max, inverse_t) + gumbel(hash_ids(candidates, *key(seed, position)))
    return int(candidates[scores.argmax()])


def require_candidate(best: np.float32) -> None:
    """Raises NoCandidate unless `best`, a row's highest logit (NaN if any is), is finite."""
    if not math.isfinite(best):
        raise NoCandidate(f"logits: the best one is {best}; a row needs a finite best logit and no NaN")


class _Scratch:
    """Buffers for one row of a given length: allocating them costs more than filling them."""

    def __init__(self, size: int) -> None:
        self.hashes = np.empty(size, np.uint32)
        self.shifted = np.empty(size, np.uint32)
        self.bounds = np.empty(size, np.float32)


_local = threading.local()


def _scratch_of(size: int) -> _Scratch:
    """This thread's buffers for rows of the vocabulary's length; small supports, which vary, get fresh ones."""
    if size < 8192:
        return _Scratch(size)
    scratch: _Scratch | None = getattr(_local, "scratch", None)
    if scratch is None or scratch.hashes.size != size:
        scratch = _local.scratch = _Scratch(size)
    return scratch


@lru_cache(maxsize=4)
def _spread_ids(vocab_size: int) -> Hashes:
    """id * 0x9E3779B9 mod 2^32 for the whole vocabulary: where the hash begins at every position."""
    spread = np.arange(vocab_size, dtype=np.uint32) * np.uint32(0x9E3779B9)
    spread.flags.writeable = False
    return spread


def _bound_scores(logits: FloatRow, l_max: np.float32, inverse_t: np.float32, scratch: _Scratch) -> FloatRow:
    """An upper bound of each token's score, in nats.

    The Gumbel value of hash x is at most -ln(x / 2^32), since -ln(1-u) >= u. And the bits of float32(x), read
    as an integer, are at most 2^23 * (127 + log2 x), since the mantissa is linear where the logarithm is
    concave. Together: g <= ln 2 * (159 - bits / 2^23).
    """
    bounds = scratch.bounds
    hashes_as_float = scratch.shifted.view(np.float32)
    np.copyto(hashes_as_float, scratch.hashes, casting="unsafe")
    np.copyto(bounds, hashes_as_float.view(np.int32), casting="unsafe")
    np.multiply(bounds, _BITS_TO_NATS, out=bounds)
    np.add(bounds, _BOUND_AT_ZERO_BITS, out=bounds)
    with np.errstate(over="ignore"):
        scaled = np.subtract(logits, l_max, out=hashes_as_float)
        np.multiply(scaled, inverse_t, out=scaled)
    return np.add(bounds, scaled, out=bounds)
