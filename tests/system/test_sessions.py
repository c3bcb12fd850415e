"""Sessions through real processes: forks go on as fresh sessions would, and what was read once is not read again."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path

import pytest

from sparkrelay.cli.stack import Stack
from sparkrelay.cli.stack_plan import StackOptions
from sparkrelay.client.blocking import Client, connect
from sparkrelay.store import ModelFiles
from tests.system.conftest import RunDrafter, StartStack, wait_until

pytestmark = pytest.mark.system

PROMPT = [1 + i * i % 61 for i in range(80)]


def test_a_forks_turn_is_a_fresh_sessions_turn_and_its_source_goes_on(
    toy_stack: Stack, run_drafter: RunDrafter
) -> None:
    drafted = 0
    with run_drafter(toy_stack, "ngram"), connect(toy_stack.gateway) as client:
        for turn in ({}, {"temperature": 0.9, "seed": 3}):
            session = client.create_session()
            first = session.generate(token_ids=PROMPT, max_tokens=30, ignore_default_stop_ids=True)
            told = [*PROMPT, *first.token_ids]
            asked = {"max_tokens": 60, "ignore_default_stop_ids": True, "speculation": "fixed:5", **turn}
            fork = session.fork(100)
            branch = fork.generate(token_ids=[*told[:100], 7], **asked)
            main = session.generate(token_ids=[*told, 9], **asked)
            assert branch.usage.cached == 99 and main.usage.cached == 109
            assert branch.token_ids == client.generate(token_ids=[*told[:100], 7], **asked).token_ids
            assert main.token_ids == client.generate(token_ids=[*told, 9], **asked).token_ids
            drafted += branch.totals.verified + main.totals.verified
            fork.end()
            session.end()
    assert drafted > 0


def session_count(client: Client) -> int:
    """Of the one verifier, as it last reported."""
    (worker,) = client.workers()
    return worker.session_count


@pytest.mark.slow
@pytest.mark.timeout(600)  # three readings of 1,024 tokens on one thread, on however busy a machine
def test_a_second_request_that_shares_1024_tokens_reads_the_rest_and_says_the_same(demo_stack: Stack) -> None:
    shared = [(i * i * 31 + 7 * i) % 40_000 + 100 for i in range(1024)]
    asked = {"max_tokens": 12, "speculation": "off", "ignore_default_stop_ids": True}
    with connect(demo_stack.gateway, timeout=300) as client:
        wait_until(lambda: session_count(client) == 0)
        with client.create_session() as first:
            assert first.generate(token_ids=[*shared, 504, 505, 506], **asked).usage.cached == 0
            wait_until(lambda: session_count(client) == 1)
            borrowed = client.generate(token_ids=[*shared, 1200, 1201], **asked)
        assert 1008 <= borrowed.usage.cached <= 1025
        wait_until(lambda: session_count(client) == 0)
        alone = client.generate(token_ids=[*shared, 1200, 1201], **asked)
        assert alone.usage.cached == 0, "nothing was left to borrow"
    assert len(alone.token_ids) == 12 and borrowed.token_ids == alone.token_ids


REASONING_TEMPLATE = """{%- for message in messages -%}
{%- set content = message.content -%}
{%- if message.role == "assistant" -%}{%- set content = content.split("</think>")[-1] -%}{%- endif -%}
<|im_start|>{{ message.role }}
{{ content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
<think>
{% endif -%}"""


def thinking_model(demo: ModelFiles, folder: Path) -> Path:
    """A tiny model with a real tokenizer, whose template drops the reasoning of earlier answers."""
    from transformers import LlamaConfig

    from tests.device.tiny_models import COMMON, save_tiny

    vocab_size = json.loads((demo.path / "config.json").read_text())["vocab_size"]
    save_tiny(LlamaConfig(**{**COMMON, "vocab_size": vocab_size, "tie_word_embeddings": True}), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.path / name, folder / name)
    (folder / "chat_template.jinja").write_text(REASONING_TEMPLATE)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("one_thread")
def test_three_turns_under_a_template_that_drops_reasoning_equal_the_one_shot_prompts_of_the_same_ids(
    demo_model: ModelFiles, own_stack: StartStack, tmp_path: Path
) -> None:
    from gateway.chat import Message, load_chat
    from gateway.tokenizer import Tokenizer
    from tests.verifier_service.driver import Driver, turn
    from verifier_service.events import EndSession
    from verifier_service.models.huggingface import HuggingFaceModel

    folder = thinking_model(demo_model, tmp_path / "thinking")
    tokenizer = Tokenizer.from_folder(folder)
    render = load_chat(folder, lambda: datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
    assert render is not None
    model = HuggingFaceModel.load(folder, model_id="thinking", dtype="float32")
    flags = {"verifier": ("--threads", "1")}
    stack = own_stack(StackOptions(str(folder), "none", dtype="float32", drain_ms=500, flags=flags))
    alone = Driver(model, block_count=4, leftover_percent=0)  # reads each prompt in one piece
    messages = [{"role": "user", "content": "Why is the sky blue, and is it everywhere?"}]
    dropped, answers = 0, set()
    with connect(stack.gateway) as client, client.create_session() as session:
        for number in range(3):
            held = session.info().token_count
            answer = session.generate(messages=messages, max_tokens=24, ignore_default_stop_ids=True)
            text = render([Message(**each) for each in messages])
            ids = tokenizer.encode(text, add_special_tokens=False)
            alone.run(turn("s", f"t{number}", ids, max_tokens=24))
            alone.step(EndSession("s"))
            assert answer.usage.prompt == len(ids) and answer.usage.output == 24
            assert list(answer.token_ids) == alone.output(f"t{number}")
            assert (answer.usage.cached > 0) == (number > 0)
            answers.add(answer.token_ids)
            dropped += held - answer.usage.cached if number else 0
            messages.append(
                {"role": "assistant", "content": f"<think>\n{answer.text}</think>It is light {number}."}
            )
            messages.append({"role": "user", "content": "And at night?"})
    assert dropped > 24, "reasoning that the session held was rewound"
    assert len(answers) == 3, "what was kept mattered"
