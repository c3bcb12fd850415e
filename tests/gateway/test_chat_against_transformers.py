"""Chat templates of the shapes that are about, rendered as transformers renders them: the same text, or both refuse."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gateway.chat import ChatTemplate, Message
from sparkrelay.outcomes import Refusal
from sparkrelay.store import ModelFiles
from tests.gateway.test_chat import now

CONVERSATIONS = 150
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

# Written for this test, each in the manner of a family of models.
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message['content'] | trim ~ '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA_3 = """\
{{- bos_token }}
{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else 'unknown' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system, rest = '', messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nYear length: ' ~ (date | length > 0) ~ '\\n' ~ system ~ '<|eot_id|>' }}
{%- for message in rest %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('Only user and assistant, not ' + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}
"""

QWEN_WITH_REASONING = """\
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.last_user < 0 and message.role == 'user' %}{%- set ns.last_user = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last_user %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/...') }}
    {% endif %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

MISTRAL = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}
        {%- continue %}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' }}
        {%- if loop.index0 == 1 and messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
        {{- message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}{% generation %}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

AS_JSON = """\
{{ messages | tojson }}{{ messages | tojson(indent=2) }}
{% for m in messages if m.content %}{{ m.content | upper }}{% endfor %}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama-3": LLAMA_3,
    "qwen": QWEN_WITH_REASONING,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "json": AS_JSON,
}

WORDS = [
    "", "Hi", "  spaces  ", "Zeile\nZeile\r\n", "{{ 7 * 7 }}", "{% raw %}", "<b>&amp;'\"</b>", "naïve 🦊 天地", "\u202eabc\u0000",
    "<think>\nhm\n</think>\n\nSo.", "<|im_end|>", "a\tb", "e\u0301", "[INST]", "\\n", "{#", "'", "x" * 300,
]  # fmt: skip


def conversations(seed: int) -> list[list[Message]]:
    """Most alternate, as templates want it; some do not."""
    rng = random.Random(seed)
    made = []
    for _ in range(CONVERSATIONS):
        roles = ["user", "assistant"] * 4
        roles = roles[: rng.randint(1, 7)]
        if rng.random() < 0.4:
            roles.insert(0, "system")
        if rng.random() < 0.2:
            rng.shuffle(roles)
        if rng.random() < 0.1:
            roles[-1] = "wizard"
        made.append([Message(role, "".join(rng.choices(WORDS, k=rng.randint(0, 3)))) for role in roles])
    return made


@pytest.fixture(scope="module")
def their_tokenizer(demo_model: ModelFiles) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(demo_model.path / "tokenizer.json"), **SPECIAL_TOKENS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers_or_both_refuse(name: str, their_tokenizer: Any) -> None:
    ours = ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS, now)
    rendered = refused = 0
    for messages in conversations(len(name)):
        plain = [{"role": each.role, "content": each.content} for each in messages]
        theirs, complaint = their_text(their_tokenizer, TEMPLATES[name], plain)
        if complaint:
            with pytest.raises(Refusal) as refusal:
                ours(messages)
            assert complaint in refusal.value.message
            refused += 1
        else:
            assert ours(messages) == theirs
            rendered += 1
    assert rendered > CONVERSATIONS / 3
    assert refused > 0 or name in ("chatml", "qwen", "mistral", "json"), "those take any role"


def their_text(tokenizer: Any, template: str, messages: list[dict[str, str]]) -> tuple[str, str]:
    """The text, or (second) why there is none."""
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # noqa: BLE001  whatever a template raises
        return "", str(error)
    return str(text), ""
