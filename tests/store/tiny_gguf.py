"""A Llama model of some hundred kilobytes as a GGUF file, and as a wheel: what the store's tests convert."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization

from sparkrelay.store.catalogue import CatalogueEntry

LAYERS, HEADS, KV_HEADS, HIDDEN, INTERMEDIATE = 2, 4, 2, 64, 96
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ġ Ġ", "1 2", "' s"]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
MEMBER = "tiny/tiny.gguf"


def byte_alphabet() -> list[str]:
    """The 256 characters by which byte-level BPE writes bytes (GPT-2's table), in byte order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tokens() -> list[str]:
    return [*SPECIAL_TOKENS, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def write_gguf(file: Path, seed: int = 0, architecture: str = "llama", pre: str = "smollm") -> Path:
    """Writes the model: quantised projections (Q4_1 where rows allow, else Q8_0), norms in float32, tied embeddings."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(file, architecture)
    write_metadata(writer, pre)
    vocab = tokens()
    add_matrix(writer, rng, "token_embd.weight", len(vocab), HIDDEN, Quantization.Q8_0)
    add_norm(writer, rng, "output_norm.weight")
    kv_width = HIDDEN * KV_HEADS // HEADS
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            add_norm(writer, rng, f"{prefix}{norm}.weight")
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", kv_width, HIDDEN),
            ("attn_v", kv_width, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INTERMEDIATE, HIDDEN),
            ("ffn_up", INTERMEDIATE, HIDDEN),
            ("ffn_down", HIDDEN, INTERMEDIATE),
        ):
            add_matrix(writer, rng, f"{prefix}{name}.weight", rows, columns, Quantization.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_metadata(writer: gguf.GGUFWriter, pre: str) -> None:
    vocab = tokens()
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocab))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3] * len(SPECIAL_TOKENS) + [1] * (len(vocab) - len(SPECIAL_TOKENS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def add_matrix(
    writer: gguf.GGUFWriter, rng: np.random.Generator, name: str, rows: int, columns: int, kind: Quantization
) -> None:
    values = rng.normal(0.0, 0.2, (rows, columns)).astype(np.float32)
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def add_norm(writer: gguf.GGUFWriter, rng: np.random.Generator, name: str) -> None:
    writer.add_tensor(name, rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32))


def write_wheel(folder: Path) -> Path:
    """A wheel with the model inside."""
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    model = write_gguf(folder / "tiny.gguf")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo(MEMBER), model.read_bytes())
    model.unlink()
    return wheel


def tiny_entry(wheel: Path) -> CatalogueEntry:
    """The catalogue entry that pins this wheel."""
    return CatalogueEntry(
        name="tiny",
        summary="for tests",
        license="Apache-2.0",
        distribution="tiny-model",
        version="1.0",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        download_bytes=wheel.stat().st_size,
        disk_bytes=300_000,
    )
