"""transformers as a peer: `python -m benchmarks.peer_transformers OPTIONS_JSON`.

Options: {"model": folder, "threads": N}. A run's mode says how: {"dtype": "bfloat16" or "float32", "attention": "sdpa" or
"eager", "cache": "dynamic" or "static", "lookup": null or {"tokens": K, "ngram": N}}. `lookup` is prompt lookup, transformers'
assisted generation without a second model; it serves one user. Many users are one batch, padded on the left.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from benchmarks.child import Answered, Marks, RunPrompts, serve

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Stopwatch(transformers.StoppingCriteria):  # type: ignore[misc]
    """Asked after every forward whether to stop: it never does, but notes the time and how many tokens there are."""

    def __init__(self, prompt_length: int) -> None:
        self.begun = time.perf_counter()
        self.marks: Marks = []
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        count = input_ids.shape[1] - self._prompt_length
        self.marks.append((time.perf_counter() - self.begun, count))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Models:
    """The checkpoint, loaded once a dtype."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._loaded: dict[str, Any] = {}

    def get(self, dtype: str, attention: str) -> Any:
        if dtype not in self._loaded:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                self._folder, dtype=DTYPES[dtype], local_files_only=True
            ).eval()
            for tensor in [*loaded.parameters(), *loaded.buffers()]:
                tensor.data = tensor.data.clone()  # out of the file's memory map, as ours are
            self._loaded[dtype] = loaded
        model = self._loaded[dtype]
        model.set_attn_implementation(attention)
        return model


def start() -> tuple[RunPrompts, dict[str, Any]]:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    transformers.utils.logging.set_verbosity_error()
    models = Models(options["model"])

    def run_prompts(prompts: Sequence[Sequence[int]], token_count: int, mode: dict[str, Any]) -> Answered:
        return Answered(run(models.get(mode["dtype"], mode["attention"]), prompts, token_count, mode))

    versions = {"version": transformers.__version__, "torch": torch.__version__}
    return run_prompts, {**versions, "threads": options["threads"], "pid": os.getpid()}


@torch.inference_mode()
def run(
    model: Any, prompts: Sequence[Sequence[int]], token_count: int, mode: dict[str, Any]
) -> list[tuple[list[int], Marks]]:
    """One call of generate, greedy, exactly `token_count` tokens each."""
    longest = max(len(ids) for ids in prompts)
    rows = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    watch = Stopwatch(longest)
    output = model.generate(
        input_ids=rows,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=token_count,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([watch]),
        **_how(mode),
    )
    ids_of = output[:, longest : longest + token_count].tolist()
    marks = [(at, min(count, token_count)) for at, count in watch.marks]
    return [(ids, list(marks)) for ids in ids_of]


def _how(mode: dict[str, Any]) -> dict[str, Any]:
    how: dict[str, Any] = {}
    if mode["cache"] == "static":
        how["cache_implementation"] = "static"
    if mode["lookup"] is not None:
        how["prompt_lookup_num_tokens"] = mode["lookup"]["tokens"]
        how["max_matching_ngram_size"] = mode["lookup"]["ngram"]
    return how


if __name__ == "__main__":
    serve(start)
