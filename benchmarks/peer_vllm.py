"""vLLM as a peer, run under the Python of its own environment: `PYTHON -m benchmarks.peer_vllm OPTIONS_JSON`.

Options: {"model": folder, "dtype": name, "max_users": N, "engine": {...}}; `engine` goes to vLLM's LLM as it is
(speculative_config and the like). The engine runs in this process: nothing of a server stands between it and the clock, which
favours it over ours. Nothing is remembered between runs, and text is not made, only ids.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.child import Answered, Marks, RunPrompts, serve

CONTEXT = 2048


def start() -> tuple[RunPrompts, dict[str, Any]]:
    options = json.loads(sys.argv[1])
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, plenty for 32 short answers
    import vllm  # type: ignore[import-not-found]

    llm = vllm.LLM(
        model=options["model"],
        dtype=options["dtype"],
        max_model_len=CONTEXT,
        max_num_seqs=options["max_users"],
        enable_prefix_caching=False,
        **options["engine"],
    )
    run_number = 0

    def run_prompts(prompts: Sequence[Sequence[int]], token_count: int, _mode: dict[str, Any]) -> Answered:
        nonlocal run_number
        run_number += 1
        return Answered(_run(llm.llm_engine, prompts, token_count, f"run{run_number}", vllm.SamplingParams))

    return run_prompts, {"version": vllm.__version__, "engine": options["engine"], "pid": os.getpid()}


def _run(
    engine: Any, prompts: Sequence[Sequence[int]], token_count: int, run_id: str, sampling: Any
) -> list[tuple[list[int], Marks]]:
    """All prompts at once, step by step, greedy; the marks are taken when a step has returned."""
    params = sampling(temperature=0.0, max_tokens=token_count, ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    numbers = {}
    for number, ids in enumerate(prompts):
        numbers[f"{run_id}-{number}"] = number
        engine.add_request(f"{run_id}-{number}", {"prompt_token_ids": list(ids)}, params)
    ids_of: list[list[int]] = [[] for _ in prompts]
    marks_of: list[Marks] = [[] for _ in prompts]
    while engine.has_unfinished_requests():
        for output in engine.step():
            number = numbers[output.request_id]
            ids = list(output.outputs[0].token_ids)
            if len(ids) > len(ids_of[number]):
                ids_of[number] = ids
                marks_of[number].append((time.perf_counter() - begun, len(ids)))
    return list(zip(ids_of, marks_of, strict=True))


if __name__ == "__main__":
    serve(start)
