"""Turns a GGUF file of a Llama-shaped model into a folder that `transformers` loads: bfloat16 weights, config, tokenizer.

Quantised tensors are dequantised with the `gguf` package's own functions and then rounded to bfloat16, so the folder holds the
quantised model's values, not the original ones. GGUF interleaves the two halves of each rotary dimension in the query and key
projections (the order its own kernels read); here they go back into the order of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkrelay.store.errors import MissingPackage, UnsupportedFile
from sparkrelay.store.gguf_tokenizer import Json, TokenizerData, tokenizer_config, tokenizer_json
from sparkrelay.store.safetensors_writer import TensorPlan, header_bytes, write_tensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from gguf import GGUFReader, ReaderTensor

# done, total: bytes of bfloat16 written so far and in all.
WeightProgress = Callable[[int, int], None]

WEIGHTS_FILE = "model.safetensors"

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def convert(gguf_file: Path, folder: Path, progress: WeightProgress) -> None:
    """Writes config.json, generation_config.json, tokenizer files and model.safetensors into an existing folder.

    Raises UnsupportedFile for another architecture or tokenizer, MissingPackage without the packages `gguf` and `numpy`.
    """
    reader = _open(gguf_file)
    config = model_config(reader)
    tokenizer = read_tokenizer(reader)
    tokenizer.check()
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config(tokenizer))
    _write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))
    write_weights(reader, config, folder / WEIGHTS_FILE, progress)


def model_config(reader: GGUFReader) -> Json:
    """config.json of a Llama model from the GGUF's metadata."""
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise UnsupportedFile(
            f"This GGUF holds a {architecture!r} model; only 'llama' is converted.",
            "Use the model's original files.",
        )
    for key in ("llama.rope.scaling.type", "llama.expert_count"):
        if key in reader.fields:
            raise UnsupportedFile(
                f"This GGUF uses {key}, which is not converted.", "Use the model's original files."
            )
    heads = int(_field(reader, "llama.attention.head_count"))
    hidden = int(_field(reader, "llama.embedding_length"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": int(_field(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(_field(reader, "llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_field(reader, "llama.attention.head_count_kv")),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": int(_field(reader, "llama.context_length")),
        "rms_norm_eps": _shortest(_field(reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(_field(reader, "llama.rope.freq_base")),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": int(_field(reader, "tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(_field(reader, "tokenizer.ggml.eos_token_id")),
        "pad_token_id": int(_field(reader, "tokenizer.ggml.padding_token_id")),
        "dtype": "bfloat16",
    }


def generation_config(tokenizer: TokenizerData) -> Json:
    """generation_config.json: the ids that end an answer and pad a batch."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.padding_id,
    }


def read_tokenizer(reader: GGUFReader) -> TokenizerData:
    """The tokenizer's data of a GGUF with a byte-level BPE ("gpt2") tokenizer."""
    kind = _field(reader, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedFile(
            f"This GGUF's tokenizer is of kind {kind!r}; only 'gpt2' is converted.",
            "Use the model's original files.",
        )
    template = reader.get_field("tokenizer.chat_template")
    return TokenizerData(
        pre=_field(reader, "tokenizer.ggml.pre"),
        tokens=_field(reader, "tokenizer.ggml.tokens"),
        token_types=_field(reader, "tokenizer.ggml.token_type"),
        merges=_field(reader, "tokenizer.ggml.merges"),
        bos_id=int(_field(reader, "tokenizer.ggml.bos_token_id")),
        eos_id=int(_field(reader, "tokenizer.ggml.eos_token_id")),
        unknown_id=int(_field(reader, "tokenizer.ggml.unknown_token_id")),
        padding_id=int(_field(reader, "tokenizer.ggml.padding_token_id")),
        chat_template=None if template is None else str(template.contents()),
        context_length=int(_field(reader, "llama.context_length")),
    )


def write_weights(reader: GGUFReader, config: Json, file: Path, progress: WeightProgress) -> None:
    """Streams every tensor, one at a time, into one safetensors file."""
    tensors = [(tensor, TensorPlan(hf_name(tensor.name), _shape(tensor))) for tensor in reader.tensors]
    total = sum(plan.byte_count for _, plan in tensors)
    done = 0
    with file.open("wb") as output:
        output.write(header_bytes(plan for _, plan in tensors))
        progress(done, total)
        for tensor, plan in tensors:
            write_tensor(output, plan, _values(tensor, config))
            done += plan.byte_count
            progress(done, total)


def hf_name(gguf_name: str) -> str:
    """The parameter's name in transformers. Raises UnsupportedFile for a tensor that a Llama model does not have."""
    if gguf_name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[gguf_name]
    prefix, _, rest = gguf_name.partition(".")
    layer, _, part = rest.partition(".")
    if prefix == "blk" and layer.isdecimal() and part in _LAYER_NAMES:
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}"
    raise UnsupportedFile(
        f"This GGUF has a tensor {gguf_name!r} that is not known.", "Use the model's original files."
    )


def undo_rope_interleave(weight: npt.NDArray[np.float32], head_count: int) -> npt.NDArray[np.float32]:
    """[head_count * head_dim, in]: in each head, rows 0 2 4 … 1 3 5 … instead of GGUF's 0 1 2 3 …"""
    rows, columns = weight.shape
    half = rows // head_count // 2
    return weight.reshape(head_count, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _values(tensor: ReaderTensor, config: Json) -> npt.NDArray[np.float32]:
    from gguf import dequantize

    values: npt.NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type).reshape(_shape(tensor))
    if tensor.name.endswith("attn_q.weight"):
        return undo_rope_interleave(values, config["num_attention_heads"])
    if tensor.name.endswith("attn_k.weight"):
        return undo_rope_interleave(values, config["num_key_value_heads"])
    return values


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    # GGUF lists the fastest-changing extent first.
    return tuple(int(extent) for extent in reversed(tensor.shape.tolist()))


def _open(gguf_file: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as missing:
        raise MissingPackage(
            f"Converting a model needs the package {missing.name!r}.",
            "Install it: pip install 'sparkrelay[verifier]'",
        ) from missing
    return GGUFReader(gguf_file)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise UnsupportedFile(f"This GGUF has no field {key!r}.", "Use the model's original files.")
    return field.contents()


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 rather than 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _write_json(file: Path, content: Json) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
