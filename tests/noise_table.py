"""Computes the table of the coupled noise, version 1, in decimal arithmetic: the same bytes on every machine.

    python tests/noise_table.py sparkrelay/noise_v1.bin

The product ships the bytes and pins their hash; this file shows where they come from. For x of 32 bits the
noise is the standard Gumbel value at the middle of x's interval, -ln(-ln(1 - (x + 1/2) / 2^32)), in units of
2^-18. It is tabulated over t = min(x, 2^32 - 1 - x), the distance to the nearer end of the range, 256 cells
to an octave, because the value changes with ln t at both ends. A cell stores its value at the start and the
step to the next cell; `sparkrelay.noise.gumbel` interpolates between.
"""

from __future__ import annotations

import struct
import sys
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from itertools import pairwise
from pathlib import Path

CELLS_PER_OCTAVE = 256
OCTAVES = 31
HALF_CELLS = OCTAVES * CELLS_PER_OCTAVE + 2  # one cell for t = 0 before the octaves, one for t = 2^31 after
UNIT = 2**18
RANGE = 2**32


def cell_start(cell: int) -> Decimal:
    """The t at which a cell begins: 0 for cell 0, then 2^octave * (1 + step/256)."""
    if cell == 0:
        return Decimal(0)
    octave, step = divmod(cell - 1, CELLS_PER_OCTAVE)
    return Decimal(2**octave * (CELLS_PER_OCTAVE + step)) / CELLS_PER_OCTAVE


def gumbel(quantile: Decimal) -> Decimal:
    """The standard Gumbel value below which the share `quantile` of all values lies."""
    return -((-(quantile.ln())).ln())


def gumbel_at(t: Decimal, upper_half: bool) -> Decimal:
    """The noise of x = t (lower half) or x = 2^32 - 1 - t (upper half), as a real number."""
    share = (t + Decimal("0.5")) / RANGE
    return gumbel(share if upper_half else 1 - share)


def half_table(upper_half: bool) -> list[tuple[int, int]]:
    """(value at the start, step to the next cell) of each cell, in units of 2^-18."""
    values = [
        int((gumbel_at(cell_start(cell), upper_half) * UNIT).to_integral_value(ROUND_HALF_EVEN))
        for cell in range(HALF_CELLS)
    ]
    steps = [after - before for before, after in pairwise(values)]
    return list(zip(values, [*steps, 0], strict=True))  # nothing lies beyond the start of the last cell


def table_bytes() -> bytes:
    """15,876 pairs of little-endian int32: the lower half's cells, then the upper half's."""
    with localcontext() as context:
        context.prec = 40
        pairs = half_table(upper_half=False) + half_table(upper_half=True)
    return b"".join(struct.pack("<ii", value, step) for value, step in pairs)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(table_bytes())
