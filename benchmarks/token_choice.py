"""What choosing one token costs on the host: noise and filters, one row at a time, on one thread.

    python -m benchmarks.token_choice [--rows LOGITS.npy] [--json FILE]

Without --rows the logits are random with a spread like a small model's; a file holds [rows, vocab] float32 of a real
one. The choice without pruning and a full sort of the vocabulary, which the product avoids, stand beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparkrelay import noise
from sparkrelay.device.choice import Chooser
from sparkrelay.device.logprobs import logprobs_row
from sparkrelay.sampling import Sampling

Rows = npt.NDArray[np.float32]
PROMPT = tuple(range(200))
SAMPLINGS = {
    "greedy": Sampling(),
    "T=0.7": Sampling(temperature=0.7),
    "T=1": Sampling(temperature=1.0),
    "T=1.5": Sampling(temperature=1.5),
    "T=1 top_k=50": Sampling(temperature=1.0, top_k=50),
    "T=1 top_p=0.95": Sampling(temperature=1.0, top_p=0.95),
    "T=1 min_p=0.05": Sampling(temperature=1.0, min_p=0.05),
    "T=0.7 top_k=50 top_p=0.95": Sampling(temperature=0.7, top_k=50, top_p=0.95),
    "T=1 all penalties": Sampling(1.0, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.2),
}


def random_rows(row_count: int, vocab_size: int) -> Rows:
    return np.random.default_rng(0).normal(scale=2.5, size=(row_count, vocab_size)).astype(np.float32)


def choosing(sampling: Sampling) -> Callable[[npt.NDArray[np.float32]], object]:
    return Chooser(sampling, (), PROMPT, len(PROMPT)).choose


def cases() -> dict[str, Callable[[npt.NDArray[np.float32]], object]]:
    one = noise.inverse_temperature(1.0)
    return {
        **{name: choosing(sampling) for name, sampling in SAMPLINGS.items()},
        "5 logprobs": lambda row: logprobs_row(row, 0, 5),
        "(T=1 without pruning)": lambda row: noise.choose_by_whole_vocabulary(row, one, 0, 200),
        "(a full argsort)": lambda row: row.argsort(),
    }


def median_us(call: Callable[[npt.NDArray[np.float32]], object], rows: Rows, repeats: int) -> float:
    """The median over rows of the best of some repeats, in microseconds: what the machine does when nothing else runs."""

    def once(row: npt.NDArray[np.float32]) -> float:
        started = time.perf_counter_ns()
        call(row)
        return (time.perf_counter_ns() - started) / 1000

    return statistics.median(min(once(row) for _ in range(repeats)) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, help="a .npy file, [rows, vocab] float32")
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows: Rows = np.load(arguments.rows).astype(np.float32) if arguments.rows else random_rows(128, 49_152)
    print(f"{len(rows)} rows of {rows.shape[1]:,} logits, one thread")
    result = {}
    for name, call in cases().items():
        result[name] = round(median_us(call, rows, arguments.repeats), 1)
        print(f"{name:<28}{result[name]:>9.1f} us", flush=True)
    line = json.dumps({"vocab_size": rows.shape[1], "median_us": result})
    if arguments.json:
        arguments.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
