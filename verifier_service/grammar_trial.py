"""`python -m verifier_service.grammar_trial TOKENIZER VOCAB_SIZE END_IDS`: tries response formats before the verifier does.

A schema of a few lines can keep the grammar library busy for many seconds, or need more stack or memory than there is, and
nothing in the verifier's own process could stop it. Here it costs this process: `servicer.trials` ends it and starts another.

One JSON object a line comes in ({"kind", "text"}), one goes out: {"message": why it is refused, or "" if it is not}. The first
line out, once the tokenizer is read, is {}. It ends with its input, and by itself where a trial takes more than CPU_LIMIT_S.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from sparkrelay.outcomes import Refusal
from sparkrelay.response_format import FormatKind, ResponseFormat
from verifier_service.grammar_compiler import STACK_BYTES, GrammarCompiler

CPU_LIMIT_S = 10  # far more than the verifier waits: for the case that nobody waits any more
MEMORY_LIMIT_BYTES = 4 * 2**30


def main(argv: Sequence[str]) -> int:
    file, vocab_size, end_ids = argv
    _limit(resource.RLIMIT_AS, MEMORY_LIMIT_BYTES)
    compiler = GrammarCompiler.load(Path(file), int(vocab_size), json.loads(end_ids))
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=serve, args=(compiler, sys.stdin, sys.stdout))
    worker.start()
    worker.join()
    return 0


def serve(compiler: GrammarCompiler, requests: TextIO, answers: TextIO) -> None:
    """Answers line by line until there are no more."""
    _say(answers, {})
    for line in requests:
        used_s = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
        _limit(resource.RLIMIT_CPU, used_s + CPU_LIMIT_S)
        _say(answers, {"message": trial(compiler, line)})


def trial(compiler: GrammarCompiler, line: str) -> str:
    """Why the format of a line is refused, "" if it is not."""
    asked = json.loads(line)
    try:
        compiler.compile(ResponseFormat(FormatKind(asked["kind"]), asked["text"]))
    except Refusal as refusal:
        return refusal.violations[0].message
    return ""


def _say(answers: TextIO, answer: dict[str, str]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _limit(which: int, value: int) -> None:
    """Lowers a limit of this process, where the system has it."""
    hard = resource.getrlimit(which)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(which, (value, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
