"""Small random models of many families, saved as checkpoints: what the flat forward must carry, at a size a test can afford."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 131
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _llama() -> PreTrainedConfig:
    return LlamaConfig(**COMMON)


def _llama3_rope() -> PreTrainedConfig:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaConfig(**COMMON, rope_parameters=rope, tie_word_embeddings=True)


def _qwen2() -> PreTrainedConfig:
    return Qwen2Config(**COMMON)


def _qwen3() -> PreTrainedConfig:
    return Qwen3Config(**COMMON, head_dim=16)


def _qwen3_moe() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **COMMON, head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24
    )


def _mistral_sliding() -> PreTrainedConfig:
    return MistralConfig(**COMMON, head_dim=16, sliding_window=8)


def _gemma2() -> PreTrainedConfig:
    return Gemma2Config(
        **COMMON,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        layer_types=SLIDING_AND_FULL,
    )


def _gemma3() -> PreTrainedConfig:
    return Gemma3TextConfig(
        **COMMON, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, layer_types=SLIDING_AND_FULL
    )


def _gpt_oss() -> PreTrainedConfig:
    return GptOssConfig(
        **COMMON,
        head_dim=16,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=SLIDING_AND_FULL,
    )


def _phi3() -> PreTrainedConfig:
    return Phi3Config(**COMMON, sliding_window=8)


def _gemma4() -> PreTrainedConfig:
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        **COMMON,
        head_dim=16,
        global_head_dim=32,
        sliding_window=8,
        num_kv_shared_layers=2,
        layer_types=SLIDING_AND_FULL,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=8,
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "llama3_rope": _llama3_rope,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mistral_sliding": _mistral_sliding,
    "phi3_sliding": _phi3,
    "gemma2_softcap": _gemma2,
    "gemma3": _gemma3,
    "gemma4_shared_kv": _gemma4,
    "gpt_oss_sinks": _gpt_oss,
}


def save_tiny(config: PreTrainedConfig, folder: Path) -> Path:
    """A checkpoint of random weights, large enough that attention and experts matter."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
            elif not torch.isfinite(parameter).all() or parameter.abs().max() > 1e3 or not parameter.any():
                parameter.normal_(0.0, 0.5)  # biases, and sinks that no initialisation has touched
    model.save_pretrained(folder)
    return folder
