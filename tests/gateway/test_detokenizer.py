"""The incremental detokenisers give, piece by piece, exactly the text of all ids at once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.detokenizer import gpt2_byte_of_char
from gateway.tokenizer import Tokenizer
from sparkrelay.store import ModelFiles

SCRIPTS = "The quick brown fox. Съешь ещё этих булок. 天地玄黃 宇宙洪荒。 あいうえお क्षत्रिय 🦊👩‍👩‍👧‍👦🇨🇭 naïve\u0301\n\t  x=1"
TEXTS = st.text(st.sampled_from(SCRIPTS), max_size=60)


@pytest.fixture(scope="module")
def demo_tokenizer(demo_model: ModelFiles) -> Tokenizer:
    return Tokenizer.from_folder(demo_model.path)


@pytest.fixture(scope="module")
def byte_fallback_tokenizer() -> Tokenizer:
    """As sentencepiece models have it: a space is ▁, unknown characters are runs of byte tokens, the first space is dropped."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ["▁", "▁a", "a", "b", "▁the", "the", "é", "▁▁", ".", "▁日", ""]:
        vocab[token] = len(vocab)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, name in enumerate(["<unk>", "<s>", "</s>"])
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    return Tokenizer(json.dumps(content).encode())


def deltas(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.add(token_id) for token_id in ids), detokenizer.finish()]


@settings(max_examples=300)
@given(data=st.data())
def test_deltas_of_any_ids_are_the_text_of_all_ids(demo_tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 49151), max_size=40))
    assert "".join(deltas(demo_tokenizer, ids)) == demo_tokenizer.decode(ids)


@settings(max_examples=300)
@given(text=TEXTS)
def test_deltas_of_a_text_are_the_text_and_never_hold_half_a_character(
    demo_tokenizer: Tokenizer, text: str
) -> None:
    ids = list(demo_tokenizer.encode(text, add_special_tokens=False))
    parts = deltas(demo_tokenizer, ids)
    assert "".join(parts) == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)
    assert parts[-1] == "", "whole characters are never held back to the end"


@settings(max_examples=300)
@given(data=st.data())
def test_bytes_that_are_no_characters_become_the_same_replacements(
    demo_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    letters = {byte: char for char, byte in gpt2_byte_of_char().items()}
    id_of = {byte: demo_tokenizer._tokenizer.token_to_id(letters[byte]) for byte in range(256)}
    usable = [byte for byte, token_id in id_of.items() if token_id is not None]
    assert len(usable) > 200
    ids = [id_of[byte] for byte in data.draw(st.lists(st.sampled_from(usable), max_size=24))]
    assert "".join(deltas(demo_tokenizer, ids)) == demo_tokenizer.decode(ids)


@settings(max_examples=500)
@given(data=st.data())
def test_deltas_with_byte_fallback_are_the_text_of_all_ids(
    byte_fallback_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    size = byte_fallback_tokenizer.vocab_size
    plain = st.integers(0, size - 1) | st.integers(3 + 256, size - 1)
    runs = st.text(min_size=1, max_size=3).map(lambda text: [3 + byte for byte in text.encode()])
    groups = data.draw(st.lists(plain.map(lambda token_id: [token_id]) | runs, max_size=16))
    ids = [token_id for group in groups for token_id in group]
    assert "".join(deltas(byte_fallback_tokenizer, ids)) == byte_fallback_tokenizer.decode(ids)


def test_special_tokens_are_not_shown(demo_tokenizer: Tokenizer) -> None:
    ids = list(demo_tokenizer.encode("<|im_start|>hello<|im_end|>", add_special_tokens=False))
    assert len(ids) > 2
    assert "".join(deltas(demo_tokenizer, ids)) == "hello"


def test_what_is_no_tokenizer_is_refused_with_a_value_error() -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        Tokenizer(b"{}")
