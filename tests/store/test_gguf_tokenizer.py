"""The tokenizer that a GGUF describes, and the one that the demo model really has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from sparkrelay.store import ModelFiles, UnsupportedFile
from sparkrelay.store.gguf_to_hf import convert
from sparkrelay.store.gguf_tokenizer import TokenizerData, tokenizer_config, tokenizer_json
from tests.store.tiny_gguf import CHAT_TEMPLATE, MERGES, SPECIAL_TOKENS, tokens, write_gguf

DATA = TokenizerData(
    pre="smollm",
    tokens=tokens(),
    token_types=[3] * len(SPECIAL_TOKENS) + [1] * (len(tokens()) - len(SPECIAL_TOKENS)),
    merges=MERGES,
    bos_id=1,
    eos_id=2,
    unknown_id=0,
    padding_id=2,
    chat_template=CHAT_TEMPLATE,
    context_length=256,
)
TINY = Tokenizer.from_str(json.dumps(tokenizer_json(DATA)))


@given(st.text())
@settings(deadline=None)
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    for special in SPECIAL_TOKENS:
        text = text.replace(special, "")
    assert TINY.decode(TINY.encode(text).ids) == text


def test_special_tokens_are_one_id_inside_text_and_hidden_by_decode() -> None:
    ids = TINY.encode("<|im_start|>hello<|im_end|>").ids
    assert ids == [1, tokens().index("hello"), 2]
    assert TINY.decode(ids) == "hello"
    assert TINY.decode(ids, skip_special_tokens=False) == "<|im_start|>hello<|im_end|>"


def test_every_digit_is_a_token_of_its_own_although_a_merge_exists() -> None:
    assert "1 2" in MERGES
    assert TINY.encode("1212").tokens == ["1", "2", "1", "2"]


def test_gpt2s_splitter_joins_digits() -> None:
    plain = Tokenizer.from_str(json.dumps(tokenizer_json(dataclasses.replace(DATA, pre="gpt-2"))))
    assert plain.encode("1212").tokens == ["12", "12"]


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(our tokenizer, transformers' own conversion) of one GGUF file."""
    folder = tmp_path_factory.mktemp("tokenizer")
    gguf_file = write_gguf(folder / "tiny.gguf")
    converted = folder / "converted"
    converted.mkdir()
    convert(gguf_file, converted, lambda done, total: None)
    return AutoTokenizer.from_pretrained(converted), AutoTokenizer.from_pretrained(
        folder, gguf_file="tiny.gguf"
    )


# transformers' conversion does not know the digit splitter, so the judge is asked about text without digits.
@given(text=st.text(st.characters(exclude_categories=["N", "Cs"])))
@settings(deadline=None)
def test_without_digits_the_ids_are_those_of_transformers_own_conversion(
    judges: tuple[Any, Any], text: str
) -> None:
    ours, theirs = judges
    assert ours(text).input_ids == theirs(text).input_ids


def test_the_chat_template_and_the_named_tokens_are_kept() -> None:
    config = tokenizer_config(DATA)
    assert config["chat_template"] == CHAT_TEMPLATE
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert "chat_template" not in tokenizer_config(dataclasses.replace(DATA, chat_template=None))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pre": "llama-bpe"}, "text splitter is 'llama-bpe'"),
        ({"token_types": [1]}, "token types"),
        ({"token_types": [6] * len(tokens())}, r"token types \[6\]"),
        ({"tokens": ["a"] * len(tokens())}, "same text"),
        ({"eos_id": len(tokens())}, "eos_id"),
    ],
)
def test_what_cannot_be_converted_faithfully_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedFile, match=complaint):
        dataclasses.replace(DATA, **change).check()


@pytest.mark.parametrize("merge", ["ab", " b", "a ", "a b c"])
def test_a_merge_that_is_not_two_tokens_is_refused(merge: str) -> None:
    with pytest.raises(UnsupportedFile, match="merge"):
        tokenizer_json(dataclasses.replace(DATA, merges=[merge]))


def test_the_demo_models_ids_are_the_published_tokenizers(demo_model: ModelFiles) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model.path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("hello world  it's 12 345").ids == [
        28120,
        905,
        216,
        357,
        506,
        216,
        33,
        34,
        216,
        35,
        36,
        37,
    ]
    assert tokenizer.encode("<|im_start|>user\n").ids == [1, 4093, 198]
    assert (
        tokenizer.decode([1, 520, 9531, 198, 2], skip_special_tokens=False)
        == "<|im_start|>assistant\n<|im_end|>"
    )


def test_the_demo_models_chat_template_opens_an_answer(demo_model: ModelFiles) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model.path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_the_demo_model_knows_the_capital_of_france(demo_model: ModelFiles) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo_model.path)
    model = AutoModelForCausalLM.from_pretrained(demo_model.path)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_the_demo_models_files_are_read_from_a_folder_with_no_network(demo_model: ModelFiles) -> None:
    assert {file.name for file in Path(demo_model.path).iterdir()} == {
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
