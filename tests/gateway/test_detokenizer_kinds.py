"""Tokenizers of other kinds, small ones trained here: what is streamed is the text of all ids at once, never half a character."""

from __future__ import annotations

from random import Random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gateway.tokenizer import Tokenizer

SEQUENCES = 1_000
SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog.  Two spaces, then a tab:\t and a line\nbreak.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "天地玄黃 宇宙洪荒 日月盈昃 辰宿列張。いろはにほへと ちりぬるを",
    "صِف خَلقَ خَودِ כָּל הָאָדָם क्षत्रिय नमस्ते ก็ได้",
    "🦊👩‍👩‍👧‍👦🇨🇭 naïve e\u0301 x=1; if (a && b) { return [1, 2]; }",
] * 4


def trained(
    model: models.Model,
    trainer: trainers.Trainer,
    pre: pre_tokenizers.PreTokenizer,
    decoder: decoders.Decoder,
) -> Tokenizer:
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre, decoder
    made.train_from_iterator(CORPUS, trainer)
    return Tokenizer(made.to_str().encode())


def metaspace(scheme: str) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    pre, decoder = pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace(prepend_scheme=scheme)
    return trained(models.Unigram(), trainer, pre, decoder)


def byte_fallback() -> Tokenizer:
    """Half of the characters have no token and are written in bytes."""
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    model = models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return trained(model, trainer, pre_tokenizers.Metaspace(), decoder)


def byte_level() -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return trained(
        models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    )


KINDS = {
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
    "byte fallback": byte_fallback,
    "byte level": byte_level,
}


def sequences(tokenizer: Tokenizer, seed: int) -> list[list[int]]:
    """Half are any ids at all, half are those of texts cut anywhere."""
    rng, size = Random(seed), tokenizer.vocab_size
    made = []
    for index in range(SEQUENCES):
        if index % 2:
            made.append([rng.randrange(size) for _ in range(rng.randint(0, 24))])
            continue
        text = "".join(rng.choice(CORPUS)[rng.randrange(60) :][:12] for _ in range(3))
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        made.append(ids[rng.randint(0, len(ids)) :] if index % 4 else ids)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_of_a_thousand_sequences_are_their_text_at_once(kind: str) -> None:
    tokenizer = KINDS[kind]()
    pieces = longest = 0
    for ids in sequences(tokenizer, len(kind)):
        detokenizer = tokenizer.detokenizer()
        deltas = [detokenizer.add(token_id) for token_id in ids]
        deltas.append(detokenizer.finish())
        whole = tokenizer.decode(ids)
        assert "".join(deltas) == whole, ids
        # U+FFFD is half a character unless the whole text has it there, which equality of all pieces together shows.
        assert whole.count("\ufffd") == sum(delta.count("\ufffd") for delta in deltas)
        pieces += sum(bool(delta) for delta in deltas)
        longest = max(longest, len(whole))
    assert pieces > 5 * SEQUENCES, "it was streamed, not kept to the end"
    assert longest > 20
