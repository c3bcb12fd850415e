"""Chat templates: rendered as their authors meant them, and refused by name where they or the messages do not fit."""

from __future__ import annotations

import datetime
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway import chat
from gateway.chat import ChatTemplate, Message, load_chat
from sparkrelay.outcomes import Reason, Refusal
from sparkrelay.store import ModelFiles


def now() -> datetime.datetime:
    return datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)


def render(source: str, *messages: tuple[str, str], **special_tokens: str) -> str:
    return ChatTemplate(source, special_tokens, now)([Message(*message) for message in messages])


def test_the_demo_models_template_writes_its_default_system_prompt_and_asks_for_an_answer(
    demo_model: ModelFiles,
) -> None:
    encoder = load_chat(demo_model.path, now)
    assert encoder is not None
    assert encoder([Message("user", "Hi")]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encoder([Message("system", "Be brief."), Message("user", "Hi")]).startswith(
        "<|im_start|>system\nBe brief."
    )


def test_templates_find_the_names_they_are_written_for() -> None:
    source = (
        "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }}\n"
        "{% for message in messages %}\n"
        "    {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ message | tojson }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{% if tools is none and add_generation_prompt %}go{% endif %}"
    )
    rendered = render(source, ("user", "<é>"), ("assistant", "b"), ("user", "never"), bos_token="<s>")
    assert rendered == (
        '<s>2026-11-23\n{"role": "user", "content": "<é>"}{"role": "assistant", "content": "b"}go'
    )


def test_a_role_that_the_template_refuses_is_an_invalid_field() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('Unknown role ' + messages[0].role) }}{% endif %}"
    with pytest.raises(Refusal, match="Unknown role wizard") as refused:
        render(source, ("wizard", "hello"))
    assert refused.value.reason is Reason.INVALID_FIELD
    assert refused.value.violations[0].field == "chat.messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content.upper() }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_whatever_a_template_does_wrong_is_a_refusal(source: str) -> None:
    with pytest.raises(Refusal):
        render(source, ("user", "hello"))


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "steps",
        ),
        ("{% for i in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}", "characters"),
        ("{{ 'x' * 10**12 }}", "elements"),
        ("{{ [0] * 10**12 }}", "elements"),
        ("{{ 10**12 * 'x' }}", "elements"),
        ("{{ 9 ** 999999999 }}", "exponent"),
    ],
)
def test_a_template_without_end_is_ended(source: str, what: str) -> None:
    with pytest.raises(Refusal, match=what) as refused:
        render(source, ("user", "hello"))
    assert refused.value.violations[0].field == "chat.messages"
    assert "plain text" in refused.value.message


def test_a_template_cannot_stop_the_counting() -> None:
    for attempt in ("{% set tick = 0 %}", "{% set environment = none %}", "{% macro tick() %}{% endmacro %}"):
        with pytest.raises(Refusal, match="steps"):
            render(
                attempt + "{% for i in range(99999) %}{% for j in range(99) %}{% endfor %}{% endfor %}",
                ("user", ""),
            )


def test_two_renderings_at_once_count_for_themselves() -> None:
    source = (
        "{% for i in range(10000) %}{% for j in range(9) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    )
    template = ChatTemplate(source, {}, now)
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda index: template([Message("user", str(index))]), range(4)))
    assert texts == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "source",
    ["{% for", "{{ a b }}", "{% if 1 %}" * 200 + "{% endif %}" * 200, "x" * 2_000_000, "{{ " + "(" * 5000],
)
def test_whatever_cannot_be_compiled_is_a_value_error_that_says_so(source: str) -> None:
    with pytest.raises(ValueError, match="its chat template"):
        ChatTemplate(source, {}, now)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": ["odd"], "x": 1'),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}'),
        ("chat_template.jinja", "{% endfor %}"),
    ],
)
def test_files_that_are_broken_are_a_value_error(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"\w"):
        load_chat(tmp_path, now)


def test_a_model_type_that_is_no_text_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ["odd"]}')
    assert load_chat(tmp_path, now) is None


def test_a_template_that_does_not_compile_names_its_line() -> None:
    with pytest.raises(ValueError, match="line 2"):
        ChatTemplate("one\n{% if %}", {}, now)


def test_templates_are_found_in_their_own_file_or_in_the_tokenizers_config(tmp_path: Path) -> None:
    assert load_chat(tmp_path, now) is None
    config = {
        "eos_token": {"content": "</s>"},
        "chat_template": [{"name": "default", "template": "config{{ eos_token }}"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    from_config = load_chat(tmp_path, now)
    assert from_config is not None
    assert from_config([Message("user", "x")]) == "config</s>"
    (tmp_path / "chat_template.jinja").write_text("file")
    from_file = load_chat(tmp_path, now)
    assert from_file is not None
    assert from_file([Message("user", "x")]) == "file"


def test_a_model_type_with_an_encoder_needs_no_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        chat.ENCODERS, "odd", lambda messages: "|".join(message.content for message in messages)
    )
    (tmp_path / "config.json").write_text('{"model_type": "odd"}')
    encoder = load_chat(tmp_path, now)
    assert encoder is not None
    assert encoder([Message("user", "a"), Message("assistant", "b")]) == "a|b"
