"""DSpark written down a second time, slowly: numpy in float64, one block, one slot, one head at a time, from the tensors' names.

It shares no line with the product. Configurations are the released config.json as a dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float64]
Tensors = Mapping[str, Rows]

HEAD_NORMS = {"qwen3", "gemma3_text", "gemma4_text"}
SANDWICH = {"gemma3_text", "gemma4_text"}


def block(config: dict[str, Any], tensors: Tensors, taps: Rows, anchor_id: int) -> Rows:
    """Final hidden states [gamma, hidden] of the block whose anchor stands behind `taps` [context, taps * hidden]."""
    context = norm(config, tensors["hidden_norm.weight"], taps @ tensors["fc.weight"].T)
    gamma = config["block_size"]
    masks = gamma - 1 if config["sample_from_anchor"] else gamma
    embedding = tensors["embed_tokens.weight"]
    hidden = np.array([embedding[anchor_id]] + [embedding[config["mask_token_id"]]] * masks)
    if config["model_type"] in SANDWICH:
        hidden = hidden * np.sqrt(config["hidden_size"])
    for number in range(config["num_hidden_layers"]):
        own = {
            name.split(".", 2)[2]: t for name, t in tensors.items() if name.startswith(f"layers.{number}.")
        }
        hidden = decoder_layer(config, own, context, hidden)
    hidden = norm(config, tensors["norm.weight"], hidden)
    return hidden if config["sample_from_anchor"] else hidden[1:]


def decoder_layer(config: dict[str, Any], own: Tensors, context: Rows, hidden: Rows) -> Rows:
    family = config["model_type"]
    normed = norm(config, own["input_layernorm.weight"], hidden)
    seen = attention(config, own, context, normed) @ own["self_attn.o_proj.weight"].T
    if family not in SANDWICH:
        hidden = hidden + seen
        return hidden + mlp(family, own, norm(config, own["post_attention_layernorm.weight"], hidden))
    hidden = hidden + norm(config, own["post_attention_layernorm.weight"], seen)
    thought = mlp(family, own, norm(config, own["pre_feedforward_layernorm.weight"], hidden))
    hidden = hidden + norm(config, own["post_feedforward_layernorm.weight"], thought)
    return hidden * own["layer_scalar"] if family == "gemma4_text" else hidden


def attention(config: dict[str, Any], own: Tensors, context: Rows, block_rows: Rows) -> Rows:
    """Every slot sees the whole context and the whole block: [slots, heads * head_dim]."""
    family, size = config["model_type"], config["head_dim"]
    sources = np.concatenate([context, block_rows])
    output = np.zeros((len(block_rows), config["num_attention_heads"] * size))
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    for head in range(config["num_attention_heads"]):
        shared = slice(head // group * size, (head // group + 1) * size)
        mine = slice(head * size, (head + 1) * size)
        keys = sources @ own["self_attn.k_proj.weight"][shared].T
        values = sources @ own["self_attn.v_proj.weight"][shared].T
        queries = block_rows @ own["self_attn.q_proj.weight"][mine].T
        if family in HEAD_NORMS:
            keys = norm(config, own["self_attn.k_norm.weight"], keys)
            queries = norm(config, own["self_attn.q_norm.weight"], queries)
        if family == "gemma4_text":
            values = values / np.sqrt((values**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
        scale = 1.0 if family == "gemma4_text" else size**-0.5
        if config.get("query_pre_attn_scalar"):
            scale = config["query_pre_attn_scalar"] ** -0.5
        for slot, query in enumerate(queries):
            turned = rope(config, query, len(context) + slot)
            logits = np.array([turned @ rope(config, key, at) for at, key in enumerate(keys)]) * scale
            weights = np.exp(logits - logits.max())
            output[slot, mine] = weights / weights.sum() @ values
    return output


def rope(config: dict[str, Any], vector: Rows, position: int) -> Rows:
    half = len(vector) // 2
    turned = vector.copy()
    for pair in range(half):
        angle = position * config["rope_theta"] ** (-2 * pair / len(vector))
        a, b = vector[pair], vector[pair + half]
        turned[pair] = a * np.cos(angle) - b * np.sin(angle)
        turned[pair + half] = b * np.cos(angle) + a * np.sin(angle)
    return turned


def mlp(family: str, own: Tensors, rows: Rows) -> Rows:
    gate = rows @ own["mlp.gate_proj.weight"].T
    if family in SANDWICH:
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    else:
        gate = gate * sigmoid(gate)
    return (gate * (rows @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T


def norm(config: dict[str, Any], weight: Rows, rows: Rows) -> Rows:
    if config["model_type"] == "gemma3_text":
        weight = 1 + weight
    return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight


def block_logits(config: dict[str, Any], tensors: Tensors, hidden: Rows, before: list[int]) -> Rows:
    """Logits [gamma, vocab] with the sequential head, given the token before each slot (the anchor before the first)."""
    logits = hidden @ tensors["lm_head.weight"].T
    rank, kind = config["markov_rank"], config["markov_head_type"]
    state = np.zeros(rank)
    for k, token_id in enumerate(before):
        if not rank:
            break
        vector = tensors["markov_head.markov_w1.weight"][token_id]
        if kind == "gated":
            joined = np.concatenate([hidden[k], vector])
            gate = tensors["markov_head.gate_proj.weight"] @ joined + tensors["markov_head.gate_proj.bias"]
            vector = sigmoid(gate) * vector
        if kind == "rnn":
            joined = np.concatenate([state, vector, hidden[k]])
            z = tensors["markov_head.joint_proj.weight"] @ joined + tensors["markov_head.joint_proj.bias"]
            keep = sigmoid(z[:rank])
            state = keep * state + (1 - keep) * np.tanh(z[rank : 2 * rank])
            vector = np.tanh(z[2 * rank :])
        logits[k] += tensors["markov_head.markov_w2.weight"] @ vector
    return logits


def confidences(config: dict[str, Any], tensors: Tensors, hidden: Rows, before: list[int]) -> Rows:
    """[gamma]"""
    rows = hidden
    if config["confidence_head_with_markov"]:
        rows = np.concatenate([hidden, tensors["markov_head.markov_w1.weight"][before]], axis=1)
    return sigmoid(rows @ tensors["confidence_head.proj.weight"][0] + tensors["confidence_head.proj.bias"])


def sigmoid(x: Rows) -> Rows:
    return 1 / (1 + np.exp(-x))
