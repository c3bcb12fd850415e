"""What a draft checkpoint's config.json says: the target's own configuration, and what the draft adds to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final, Literal, cast, get_args

HeadType = Literal["vanilla", "gated", "rnn"]
Json = Mapping[str, Any]


class UnusableCheckpoint(ValueError):
    """A draft checkpoint that cannot be used. The message names the field or tensor, what it is, and what would do."""


@dataclass(frozen=True, slots=True)
class Family:
    """How a target family's decoder layer differs from Llama's.

    name               as in `architectures`: <name>DSparkModel
    head_norms         queries and keys are normed by head
    value_norm         values too, without a weight
    sandwich_norms     the outputs of attention and MLP are normed as well, before they are added
    norm_offset        norms multiply by weight + offset
    gelu               the MLP's gate goes through GELU (tanh form) instead of SiLU
    scaled_embedding   embeddings are multiplied by sqrt(hidden size)
    layer_scalar       a layer's output is multiplied by a number of its own
    """

    name: str
    head_norms: bool = False
    value_norm: bool = False
    sandwich_norms: bool = False
    norm_offset: float = 0.0
    gelu: bool = False
    scaled_embedding: bool = False
    layer_scalar: bool = False


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "llama": Family("Llama"),
        "qwen3": Family("Qwen3", head_norms=True),
        "gemma3_text": Family(
            "Gemma3", head_norms=True, sandwich_norms=True, norm_offset=1.0, gelu=True, scaled_embedding=True
        ),
        "gemma4_text": Family(
            "Gemma4",
            head_norms=True,
            value_norm=True,
            sandwich_norms=True,
            gelu=True,
            scaled_embedding=True,
            layer_scalar=True,
        ),
    }
)
"""By the target's `model_type`."""

ROPE_TYPES: Final = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """A decoder layer's shape, in the target's own field names.

    attention_scale  logits of attention are multiplied by it
    rope             `rope_theta`, `rope_type` and what the type needs
    final_softcap    base logits are softcap * tanh(logits / softcap); 0 is off
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    num_target_layers: int
    attention_scale: float
    rope: Json
    final_softcap: float = 0.0

    def __post_init__(self) -> None:
        """UnusableCheckpoint for a shape that no layer can have."""
        for field in fields(self):
            count = getattr(self, field.name)
            if field.name in _COUNTS and count < 1:
                raise UnusableCheckpoint(f"{field.name}: is {count}; it must be at least 1")
        if self.model_type not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise UnusableCheckpoint(f"model_type: is {self.model_type!r}; known families are {known}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnusableCheckpoint(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide {self.num_attention_heads} query heads"
            )

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def embedding_scale(self) -> float:
        return math.sqrt(self.hidden_size) if self.family.scaled_embedding else 1.0


_COUNTS: Final = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_target_layers",
        "num_hidden_layers",
        "block_size",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig(LayerShape):
    """A DSpark or DFlash draft, in the field names of the released checkpoints.

    num_hidden_layers           of the draft
    target_layer_ids            the taps: i is what leaves the target's block i; -1 is its embedding output
    block_size                  gamma: tokens that one pass predicts
    markov_rank                 of the sequential head; 0 is none (DFlash)
    confidence_head_with_markov the confidence reads the previous token's vector beside the hidden state
    sample_from_anchor          the anchor's own slot predicts the first token (gamma - 1 masks follow it); if not, it predicts
                                nothing and gamma masks follow (the "fill-in" layout)
    """

    num_hidden_layers: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    block_size: int
    markov_rank: int = 0
    markov_head_type: HeadType = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = True
    sample_from_anchor: bool = True

    def __post_init__(self) -> None:
        """UnusableCheckpoint for a shape that no network can have."""
        LayerShape.__post_init__(self)
        if self.markov_head_type not in get_args(HeadType):
            raise UnusableCheckpoint(
                f"markov_head_type: is {self.markov_head_type!r}; known are {', '.join(get_args(HeadType))}"
            )
        if not self.target_layer_ids:
            raise UnusableCheckpoint("target_layer_ids: is empty; a draft reads at least one layer")
        for layer in self.target_layer_ids:
            if not -1 <= layer < self.num_target_layers - 1:
                raise UnusableCheckpoint(
                    f"target_layer_ids: {layer} cannot be read; -1 to {self.num_target_layers - 2} can"
                )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise UnusableCheckpoint(
                f"mask_token_id: is {self.mask_token_id}; the vocabulary has {self.vocab_size} ids"
            )
        if self.enable_confidence_head and self.confidence_head_with_markov and not self.markov_rank:
            raise UnusableCheckpoint("confidence_head_with_markov: needs a markov_rank above 0")

    @property
    def slot_count(self) -> int:
        """Rows of the network for one block."""
        return self.block_size + (not self.sample_from_anchor)


_REQUIRED: Final = (
    "num_hidden_layers",
    "num_target_layers",
    "target_layer_ids",
    "mask_token_id",
    "block_size",
)
_OWN_FIELDS: Final = (
    *_REQUIRED,
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
)
"""What a draft's config.json has beside its target's."""


def draft_of(target: Json, **draft: Any) -> DraftConfig:
    """The configuration of a new draft for a target with this config.json; `draft` sets or overrides fields."""
    return DraftConfig(**{**shape_of(target), **draft})


def from_json(config: Json) -> DraftConfig:
    """The configuration of a released draft, or of one saved here. UnusableCheckpoint says what is missing or unknown."""
    for name in _REQUIRED:
        needed(config, name)
    own = {name: config[name] for name in _OWN_FIELDS if name in config}
    own["target_layer_ids"] = tuple(int(layer) for layer in own["target_layer_ids"])
    own["sample_from_anchor"] = _samples_from_anchor(config)
    return DraftConfig(**{**shape_of(config), **own})


def to_json(config: DraftConfig) -> dict[str, Any]:
    """What `from_json` reads, in the released layout."""
    kind = "DSparkModel" if config.markov_rank else "DFlashModel"
    return {
        "architectures": [config.family.name + kind],
        **shape_to_json(config),
        "target_layer_ids": list(config.target_layer_ids),
        "layer_types": ["full_attention"] * config.num_hidden_layers,
    }


def shape_to_json(shape: LayerShape) -> dict[str, Any]:
    """All fields, those that a config.json spells otherwise in its spelling."""
    record = {field.name: getattr(shape, field.name) for field in fields(shape)}
    rope = dict(record.pop("rope"))
    scale, softcap = record.pop("attention_scale"), record.pop("final_softcap")
    return {
        **record,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "query_pre_attn_scalar": scale**-2,
        "final_logit_softcapping": softcap or None,
        "tie_word_embeddings": False,
    }


def shape_of(config: Json) -> dict[str, Any]:
    """The fields of a LayerShape, from the config.json of a target or of a draft."""
    config = config.get("text_config") or config
    heads = int(needed(config, "num_attention_heads"))
    hidden = int(needed(config, "hidden_size"))
    head_dim = int(config.get("head_dim") or hidden // heads)
    model_type = str(needed(config, "model_type"))
    names = "vocab_size hidden_size intermediate_size rms_norm_eps max_position_embeddings"
    return {
        **{name: needed(config, name) for name in names.split()},
        "model_type": model_type,
        "num_target_layers": int(config.get("num_target_layers") or needed(config, "num_hidden_layers")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "attention_scale": _attention_scale(config, model_type, head_dim),
        "rope": _rope(config),
        "final_softcap": float(config.get("final_logit_softcapping") or 0.0),
    }


def _attention_scale(config: Json, model_type: str, head_dim: int) -> float:
    given = config.get("query_pre_attn_scalar")
    if given is not None:
        return 1.0 / math.sqrt(float(given))
    return 1.0 if model_type == "gemma4_text" else 1.0 / math.sqrt(head_dim)


def _rope(config: Json) -> Json:
    """One set of RoPE parameters, whatever generation of configuration it is from. A draft's layers all have full attention."""
    given: Json = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested: Json = given.get("full_attention") or given
    rope = {**nested, "rope_theta": nested.get("rope_theta", config.get("rope_theta", 10000.0))}
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    if rope["rope_type"] not in ROPE_TYPES:
        raise UnusableCheckpoint(f"rope_type: is {rope['rope_type']!r}; known are {', '.join(ROPE_TYPES)}")
    return rope


def _samples_from_anchor(config: Json) -> bool:
    """From the key, else from an architecture whose layout is known. A wrong guess would cost all acceptance, silently."""
    if "sample_from_anchor" in config:
        return bool(config["sample_from_anchor"])
    architectures = [str(name) for name in config.get("architectures") or []]
    if any(name.endswith("DSparkModel") for name in architectures):
        return True
    raise UnusableCheckpoint(
        "sample_from_anchor: config.json does not say whether the anchor's slot predicts a token (true: DeepSpec's layout) or "
        f"masks alone do (false: z-lab's DFlash), and the architecture {architectures} does not tell. Add the key"
    )


def needed(config: Json, name: str) -> Any:
    """A field that must be there."""
    if config.get(name) is None:
        raise UnusableCheckpoint(f"{name}: is missing in config.json")
    return cast(Any, config[name])
