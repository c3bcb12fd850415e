"""Response formats on the verifier's side of the wire: compiled once, in time, in a process that may die; or refused."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from sparkrelay.errors import refusal_of
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.response_format import MAX_BYTES, FormatKind, ResponseFormat
from sparkrelay.sampling import Sampling
from sparkrelay.store import ModelFiles
from sparkrelay.v1 import generation_pb2
from sparkrelay.v1 import verifier_service_pb2 as pb2
from tests.verifier_service.servicer_rig import Rig, request, rig, token_ids
from tests.verifier_service.text_toy import OTHER_STOP, STOP, compiler, decode_text, encode, text_toy
from verifier_service.grammar import Grammar
from verifier_service.grammar_compiler import STACK_BYTES
from verifier_service.servicer.formats import COMPILING_LIMIT, KEPT_GRAMMARS, Formats
from verifier_service.servicer.trials import TriedCompiler

DIGITS = generation_pb2.ResponseFormat(regex="[0-9]{3}")


def pattern(number: int) -> ResponseFormat:
    return ResponseFormat(FormatKind.REGEX, f"a{{{number + 1}}}")


class Compiling:
    """A compiler that waits for `go` and counts."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = asyncio.Event()
        self.asked: list[ResponseFormat] = []

    async def compile(self, wanted: ResponseFormat) -> Grammar:
        self.asked.append(wanted)
        self.begun.set()
        await self.go.wait()
        return compiler().compile(wanted)


async def test_one_text_is_compiled_once_however_many_ask() -> None:
    compiling = Compiling()
    formats = Formats(compiling.compile)
    asking = [asyncio.create_task(formats.grammar(pattern(3))) for _ in range(8)]
    await asyncio.sleep(0)
    compiling.go.set()
    grammars = await asyncio.gather(*asking)
    assert len({id(grammar) for grammar in grammars}) == 1
    assert await formats.grammar(pattern(3)) is grammars[0]
    assert compiling.asked == [pattern(3)]


async def test_the_grammar_used_longest_ago_is_forgotten() -> None:
    compiling = Compiling()
    compiling.go.set()
    formats = Formats(compiling.compile)
    for number in range(KEPT_GRAMMARS):
        await formats.grammar(pattern(number))
    await formats.grammar(pattern(0))
    await formats.grammar(pattern(KEPT_GRAMMARS))
    compiled = len(compiling.asked)
    await formats.grammar(pattern(0))
    assert len(compiling.asked) == compiled == KEPT_GRAMMARS + 1
    await formats.grammar(pattern(1))
    assert len(compiling.asked) == compiled + 1


async def test_a_turn_that_gives_up_or_is_cancelled_leaves_the_others_their_grammar() -> None:
    compiling = Compiling()
    formats = Formats(compiling.compile, limit_s=0.0)
    with pytest.raises(Refusal, match="not compiled after") as refused:
        await formats.grammar(pattern(1))
    assert refused.value.reason is Reason.GRAMMAR_REFUSED
    patient = Formats(compiling.compile)
    first, second = (asyncio.create_task(patient.grammar(pattern(2))) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    compiling.go.set()
    assert (await second).source == pattern(2)
    assert compiling.asked == [pattern(1), pattern(2)]


async def test_too_many_texts_at_once_are_refused_for_now() -> None:
    compiling = Compiling()
    formats = Formats(compiling.compile)
    asking = [asyncio.create_task(formats.grammar(pattern(number))) for number in range(COMPILING_LIMIT)]
    await asyncio.sleep(0)
    with pytest.raises(Refusal) as refused:
        await formats.grammar(pattern(COMPILING_LIMIT))
    assert refused.value.reason is Reason.OVERLOADED and refused.value.retry_after_ms > 0
    compiling.go.set()
    await asyncio.gather(*asking)


# ---- the process that tries ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def tried(make: Callable[[], TriedCompiler]) -> AsyncIterator[TriedCompiler]:
    made = make()
    try:
        yield made
    finally:
        await made.close()


def scripted(tmp_path: Path, answer: str, limit_s: float = 20.0) -> TriedCompiler:
    """With a process that answers each line by the Python expression `answer`, of `asked`."""
    program = tmp_path / "trial.py"
    program.write_text(
        "import json, os, sys, time\n"
        "print('{}', flush=True)\n"
        "for line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        f"    print(json.dumps({{'message': {answer}}}), flush=True)\n"
    )
    return TriedCompiler(
        compiler(), [sys.executable, str(program)], ThreadPoolExecutor(1, "grammar"), limit_s=limit_s
    )


@pytest.mark.parametrize(
    ("answer", "limit_s", "says"),
    [
        ("time.sleep(600)", 0.05, "takes more than"),
        ("os.abort()", 20.0, "more than the grammar compiler can bear"),
    ],
)
async def test_a_text_that_hangs_or_breaks_the_library_costs_only_the_process_beside_us(
    tmp_path: Path, answer: str, limit_s: float, says: str
) -> None:
    harmful = f"{answer} if asked['text'] == 'a{{2}}' else ''"
    async with tried(lambda: scripted(tmp_path, harmful, limit_s)) as trials:
        with pytest.raises(Refusal, match=says) as refused:
            await trials.compile(pattern(1))
        assert refused.value.reason is Reason.GRAMMAR_REFUSED
        trials._limit_s = 20.0  # the next one starts a process, which may take a while on a busy machine
        assert (await trials.compile(pattern(2))).source == pattern(2)
        assert trials.ended_count == 1


async def test_what_the_process_refuses_is_refused_in_its_words(tmp_path: Path) -> None:
    async with tried(lambda: scripted(tmp_path, "'not ' + asked['text']")) as trials:
        with pytest.raises(Refusal, match=r"response_format\.regex: not a\{2\}"):
            await trials.compile(pattern(1))
        assert trials.ended_count == 0


async def test_a_process_that_does_not_start_is_no_silence(tmp_path: Path) -> None:
    async with tried(
        lambda: TriedCompiler(
            compiler(), [sys.executable, "-c", "raise SystemExit(3)"], ThreadPoolExecutor(1)
        )
    ) as trials:
        with pytest.raises(Refusal, match=r"does not start.*3"):
            await trials.compile(pattern(1))


@pytest.fixture
def deep_stacks() -> Iterator[None]:
    """Threads as the verifier's own process has them."""
    before = threading.stack_size(STACK_BYTES)
    yield
    threading.stack_size(before)


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("deep_stacks")
async def test_the_real_process_tries_real_formats(demo_model: ModelFiles) -> None:
    """The slow one took 8 s of a core when it was found; the deep one breaks a thread with the usual 8 MiB of stack."""
    file = demo_model.path / "tokenizer.json"
    slow = ResponseFormat(FormatKind.JSON_SCHEMA, '{"type":"integer","multipleOf":999983}')
    rules = "".join(f"a{number}: a{number + 1}\n" for number in range(4000))
    deep = ResponseFormat(FormatKind.LARK_GRAMMAR, f'start: a0\n{rules}a4000: "a"')
    async with tried(lambda: TriedCompiler.load(file, 49152, [2])) as trials:
        trials._limit_s = 60.0  # what is asked here is not how fast this machine is
        await trials.compile(ResponseFormat(FormatKind.JSON_SCHEMA, '{"type":"object"}'))
        with pytest.raises(Refusal, match="Unsatisfiable"):
            await trials.compile(ResponseFormat(FormatKind.JSON_SCHEMA, '{"enum":[]}'))
        assert (await trials.compile(deep)).source == deep
        assert trials.ended_count == 0
        trials._limit_s = 0.2
        with pytest.raises(Refusal, match=r"takes more than 0\.2 s"):
            await trials.compile(slow)
        assert trials.ended_count == 1


# ---- through a real server -------------------------------------------------------------------------------------------------


def served() -> Formats:
    async def compile_here(wanted: ResponseFormat) -> Grammar:
        return compiler().compile(wanted)

    return Formats(compile_here)


async def refused(verifier: Rig, message: Any) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await verifier.generate(message)
    return refusal_of(caught.value)


def asked(turn: str = "t1", **fields: Any) -> pb2.VerifierServiceGenerateRequest:
    message = request(
        turn, session=turn, ids=encode("n = "), sampling=Sampling(temperature=1.0, seed=4), **fields
    )
    message.stop.stop_token_ids[:] = [STOP, OTHER_STOP]
    return message


async def test_a_turn_keeps_to_its_format_and_ends_by_itself() -> None:
    async with rig(model=text_toy(), formats=served()) as verifier:
        assert (await verifier.stub.Describe(pb2.VerifierServiceDescribeRequest())).has_response_format
        responses = await verifier.generate(asked(response_format=DIGITS, max_tokens=20))
    assert re.fullmatch("[0-9]{3}", decode_text(token_ids(responses)))
    assert responses[-1].finished.finish_reason == generation_pb2.FINISH_REASON_STOP


async def test_a_dead_end_is_an_error_that_carries_the_turn() -> None:
    dead_end = generation_pb2.ResponseFormat(regex="[0-9]ß")
    async with rig(model=text_toy(), formats=served()) as verifier:
        refusal = await refused(verifier, asked("t7", response_format=dead_end, max_tokens=20))
        assert refusal.reason is Reason.GRAMMAR_REFUSED and refusal.turn_id == "t7"
        assert "after 1 tokens" in refusal.message
        assert token_ids(await verifier.generate(asked("t8", max_tokens=3)))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (generation_pb2.ResponseFormat(), "response_format"),
        (generation_pb2.ResponseFormat(regex=" "), "response_format.regex"),
        (
            generation_pb2.ResponseFormat(regex="a" * (MAX_BYTES[FormatKind.REGEX] + 1)),
            "response_format.regex",
        ),
        (
            generation_pb2.ResponseFormat(json_schema=json.dumps({"title": "é" * 32_768})),
            "response_format.json_schema",
        ),
        (
            generation_pb2.ResponseFormat(lark_grammar=" " * MAX_BYTES[FormatKind.LARK_GRAMMAR] + "x"),
            "response_format.lark_grammar",
        ),
    ],
)
async def test_what_is_no_format_or_too_large_is_refused_by_its_field(
    message: generation_pb2.ResponseFormat, field: str
) -> None:
    async with rig(model=text_toy(), formats=served()) as verifier:
        refusal = await refused(verifier, asked(response_format=message))
    assert refusal.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in refusal.violations] == [field]


async def test_a_format_without_an_id_that_could_end_it_is_refused() -> None:
    message = asked(response_format=DIGITS)
    del message.stop.stop_token_ids[:]
    async with rig(model=text_toy(), formats=served()) as verifier:
        refusal = await refused(verifier, message)
    assert refusal.reason is Reason.INVALID_FIELD and "stop_token_ids" in refusal.message


async def test_a_model_without_text_keeps_to_no_format_and_says_so() -> None:
    async with rig() as verifier:
        assert not (await verifier.stub.Describe(pb2.VerifierServiceDescribeRequest())).has_response_format
        message = request(response_format=DIGITS)
        message.stop.stop_token_ids[:] = [5]
        refusal = await refused(verifier, message)
    assert refusal.reason is Reason.INVALID_FIELD and "no text" in refusal.message


async def test_other_turns_go_on_while_a_format_is_compiled() -> None:
    compiling = Compiling()
    async with rig(model=text_toy(), formats=Formats(compiling.compile)) as verifier:
        waiting = asyncio.create_task(verifier.generate(asked(response_format=DIGITS, max_tokens=20)))
        await compiling.begun.wait()
        assert len(token_ids(await verifier.generate(asked("t2", max_tokens=12)))) >= 1
        assert not waiting.done()
        compiling.go.set()
        assert re.fullmatch("[0-9]{3}", decode_text(token_ids(await waiting)))


async def test_a_turn_cancelled_while_its_format_is_compiled_leaves_nothing() -> None:
    compiling = Compiling()
    async with rig(model=text_toy(), formats=Formats(compiling.compile)) as verifier:
        call = verifier.stub.Generate(asked(response_format=DIGITS))
        await compiling.begun.wait()
        call.cancel()
        compiling.go.set()
        assert token_ids(await verifier.generate(asked("t2", max_tokens=3)))
        assert verifier.engine.load().active_turn_count == 0
