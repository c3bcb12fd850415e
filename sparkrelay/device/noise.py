"""The coupled noise on torch tensors: the twin of `sparkrelay.noise`, bit for bit, CPU and GPU, many rows at once.

torch has no unsigned 32-bit arithmetic on every device, so a word is an int32 of the same bits: sums and
products wrap alike, and a logical shift is an arithmetic one with the copied sign bits masked away. A row's
token depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sparkrelay import noise

NO_CANDIDATE = -1


def keys(seeds: Sequence[int], positions: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """[R, 2] int32: the key words of each row's (seed, position), made on the host."""
    words = [noise.key(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    return torch.from_numpy(np.array(words, dtype=np.uint32).reshape(-1, 2).view(np.int32)).to(device)


def hash_ids(ids: Tensor, row_keys: Tensor) -> Tensor:
    """[R, n] int32 bits of the hash. ids: [n] or [R, n], any integer type; row_keys: [R, 2], of `keys`."""
    x = ids.to(torch.int32) * _word(0x9E3779B9) + row_keys[:, 0:1]
    x = _xor_shift(x, 16) * _word(0x21F0AAAD)
    x = _xor_shift(x, 15) * _word(0x735A2D97)
    x = _xor_shift(x, 15) + row_keys[:, 1:2]
    x = _xor_shift(x, 16) * _word(0x7FEB352D)
    x = _xor_shift(x, 15) * _word(0x846CA68B)
    return _xor_shift(x, 16)


def gumbel(hashes: Tensor) -> Tensor:
    """The Gumbel value of each hash, int32 in units of 2^-18, same shape."""
    values, steps = _table(hashes.device)
    upper_half = hashes >> 31  # 0, or -1 where the hash is 2^31 or more
    bits = (hashes ^ upper_half).to(torch.float32).view(torch.int32)  # of min(x, ~x), to the nearest float32
    cells = ((bits >> 15) - noise.FIRST_CELL).clamp_(min=0) - noise.HALF_CELLS * upper_half
    return values[cells] + ((steps[cells] * (bits & 0x7FFF)) >> 15)


def scaled_logits(logits: Tensor, l_max: Tensor, inverse_temperatures: Tensor) -> Tensor:
    """[R, n] int32: (l - l_max) / T, not below -64, truncated, units of 2^-18. The other two: [R, 1] float32."""
    scaled = (logits - l_max) * inverse_temperatures
    return (scaled.clamp_(min=noise.LOWEST_SCALED_LOGIT) * float(noise.GUMBEL_UNIT)).to(torch.int32)


def choose(logits: Tensor, inverse_temperatures: Tensor, row_keys: Tensor) -> Tensor:
    """[R] int64: each row's token, as `sparkrelay.noise.choose` gives it.

    logits                [R, vocab] float32, filtered; -inf is never chosen
    inverse_temperatures  [R] float32, of `sparkrelay.noise.inverse_temperature`
    row_keys              [R, 2] int32, of `keys`

    A row without a candidate (all -inf, or a NaN or +inf) gives NO_CANDIDATE: raising would make the host
    wait for the device.
    """
    l_max = logits.amax(dim=-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    scores = scaled_logits(logits, l_max, inverse_temperatures[:, None]) + gumbel(hash_ids(ids, row_keys))
    return _lowest_of_the_best(scores, l_max)


def greedy(logits: Tensor) -> Tensor:
    """[R] int64: the lowest id among each row's highest logits, or NO_CANDIDATE."""
    return _lowest_of_the_best(logits, logits.amax(dim=-1, keepdim=True))


def _lowest_of_the_best(scores: Tensor, l_max: Tensor) -> Tensor:
    """[R] int64. Spelt out because argmax promises no order among equals on every device."""
    ids = torch.arange(scores.shape[-1], device=scores.device)
    best = scores == scores.amax(dim=-1, keepdim=True)
    winners = torch.where(best, ids, scores.shape[-1]).amin(dim=-1)
    return torch.where(l_max.isfinite().squeeze(-1), winners, NO_CANDIDATE)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    return x ^ ((x >> bits) & ((1 << (32 - bits)) - 1))


def _word(value: int) -> int:
    """The int32 with the bits of an unsigned 32-bit constant."""
    return value - 2**32 if value >= 2**31 else value


@lru_cache(maxsize=16)
def _table(device: torch.device) -> tuple[Tensor, Tensor]:
    """Values and steps of the table's cells, [15876] int32 each, on a device."""
    pairs = torch.from_numpy(noise.table().copy()).to(device)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
