"""What a response format costs on the host: compiling it, and masking one token after another, on one thread.

    python -m benchmarks.response_format [--model NAME] [--json FILE]

Each text is written token by token in the model's own tokenizer: the mask before each token, the token into the grammar's
state, and a greedy choice among random logits with the mask and without. No forward is computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sparkrelay.device.choice import Chooser
from sparkrelay.response_format import FormatKind, ResponseFormat
from sparkrelay.sampling import Sampling
from sparkrelay.store import resolve
from verifier_service.grammar import Grammar
from verifier_service.grammar_compiler import GrammarCompiler

STOP_ID = 2
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 30}},
        "address": {"$ref": "#/$defs/address"},
    },
    "required": ["name", "age", "tags", "address"],
    "$defs": {
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
        }
    },
}
WIDE = {"type": "object", "properties": {f"field_{i}": {"type": "integer"} for i in range(300)}}
ADDRESS = {"street": "St James's Square 12", "zip": "10001"}
ADA = {"name": "Ada Lovelace", "age": 36, "tags": ["mathematics", "poetry of science"], "address": ADDRESS}
SENTENCE = "The quick brown fox jumps over the lazy dog and the other dogs."
CASES = {
    "a person's schema": (FormatKind.JSON_SCHEMA, json.dumps(PERSON), json.dumps(ADA)),
    "any JSON": (FormatKind.JSON_SCHEMA, "{}", json.dumps(ADA)),
    "300 optional fields": (
        FormatKind.JSON_SCHEMA,
        json.dumps(WIDE),
        json.dumps({"field_7": 1, "field_299": 2}),
    ),
    "words (regex)": (FormatKind.REGEX, r"[A-Z][a-z]+( [a-z]+){2,20}\.", SENTENCE),
    "any text (regex)": (FormatKind.REGEX, r"(?s:.*)", SENTENCE),
    "sums (Lark)": (
        FormatKind.LARK_GRAMMAR,
        'start: N ("+" N)*\nN: /[0-9]+/',
        "+".join(map(str, range(90, 130))),
    ),
}


def milliseconds(started_ns: int) -> float:
    return (time.perf_counter_ns() - started_ns) / 1e6


def walk(grammar: Grammar, ids: list[int], vocab_size: int) -> tuple[list[float], list[float]]:
    """Per token, in microseconds: mask and step together, and the whole of a masked greedy choice."""
    state = grammar.begin((), {STOP_ID})
    chooser = Chooser(Sampling(), {STOP_ID}, [1], 1, grammar.begin((), {STOP_ID}))
    row = np.random.default_rng(0).normal(size=vocab_size).astype(np.float32)
    masking, choosing = [], []
    for token_id in ids:
        started = time.perf_counter_ns()
        allowed = state.allowed()
        state.append(token_id)
        masking.append(milliseconds(started) * 1000)
        assert allowed[token_id], "the text does not meet its format"
        started = time.perf_counter_ns()
        chooser.choose(row)
        chooser.append(token_id)
        choosing.append(milliseconds(started) * 1000)
    return masking, choosing


def measured(
    compiler: GrammarCompiler, vocab_size: int, wanted: ResponseFormat, ids: list[int]
) -> dict[str, float]:
    started = time.perf_counter_ns()
    grammar = compiler.compile(wanted)
    compile_ms = milliseconds(started)
    cold, _ = walk(grammar, ids, vocab_size)
    walks = [walk(grammar, ids, vocab_size) for _ in range(5)]
    return {
        "compile_ms": round(compile_ms, 2),
        "first_text_mean_us": round(statistics.mean(cold), 1),
        "mean_us": round(statistics.mean(us for masking, _ in walks for us in masking), 1),
        "p99_us": round(float(np.percentile([us for masking, _ in walks for us in masking], 99)), 1),
        "choice_mean_us": round(statistics.mean(us for _, choosing in walks for us in choosing), 1),
        "token_count": len(ids),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help="whose tokenizer: a name of the catalogue or a folder"
    )
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    arguments = parser.parse_args()
    file = resolve(arguments.model).path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    vocab_size = tokenizer.get_vocab_size()
    started = time.perf_counter_ns()
    compiler = GrammarCompiler.load(file, vocab_size, [STOP_ID])
    print(f"{vocab_size:,} tokens, read in {milliseconds(started):.0f} ms, one thread")
    print(f"{'':<22}{'compile':>9}{'first text':>12}{'mask':>8}{'p99':>8}{'choice':>9}   ms, then us a token")
    result = {}
    for name, (kind, text, output) in CASES.items():
        found = measured(compiler, vocab_size, ResponseFormat(kind, text), tokenizer.encode(output).ids)
        result[name] = found
        print(
            f"{name:<22}{found['compile_ms']:>9.1f}{found['first_text_mean_us']:>12.0f}{found['mean_us']:>8.0f}"
            f"{found['p99_us']:>8.0f}{found['choice_mean_us']:>9.0f}",
            flush=True,
        )
    line = json.dumps({"vocab_size": vocab_size, "formats": result})
    if arguments.json:
        arguments.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
