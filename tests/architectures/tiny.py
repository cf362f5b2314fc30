"""Tiny models of every architecture that transformers has: default configurations are shrunk field by field, by rule.

`build("llama")` gives a model of some ten thousand parameters in evaluation mode, with random weights, norms and biases
included. What rules cannot know stands in `overrides.py`.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.architectures.overrides import OVERRIDES

VOCABULARY = 128
# Token ids that stand for images or sound lie from here upwards; ordinary text stays below.
FIRST_SPECIAL = 100
LARGEST_MODEL = 3_000_000

# Each auto class whose models are language models, and transformers' list of its model types.
_LISTS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}

# From a field's name to the largest value that it keeps; the first pattern that matches the whole name decides.
_RULES = [
    (r"(pad|bos|eos|decoder_start|forced_eos|forced_bos)_token_id|type_vocab_size|.*(cycles|stride)", None),
    (r"chunk_size_feed_forward", None),
    (
        r".*vocab_size(_per_layer_input|_base)?|vocab_offset|num_embeddings|codebook_size|.*_vocab|.*num_buckets",
        VOCABULARY,
    ),
    (r".*(top_?k|experts_per_tok(en)?|moe_k)|n_group|num_expert_group", 2),
    (
        r".*(num_key_value|kv|kv_n)_heads|num_query_groups|multi_query_group_num|linear_num_key_heads|num_query_tokens",
        2,
    ),
    (r"topk_group|first_k_dense_replace|num_dense_layers", 1),
    (r"(num_nextn_predict|num_mtp|mtp_num).*", 0),
    (r".*heads?", 4),
    (r".*(experts|expert_num)", 8),
    (r".*(head_dim|head_size|d_kv|d_head|dim_head|kv_channels|headdim|rotary_dim)", 8),
    (r".*(intermediate|ffn|feed_forward|mlp|dff|d_ff|d_inner|ff_dim|dim_ff).*", 64),
    (r".*(_rank|lowrank)", 8),
    (r".*(layers|layer|depth|blocks)", 2),
    (r"(max_|n_|num_|.*_max_).*(positions?|length|len|embeddings|seq.*|tokens)|n_ctx|.*(context|seq)_length", 64),
    (r"max_(img|image)_size|latent_query_num", 64),
    (r".*(hidden_size|d_model|n_embd|dim|dims|embedding_size|_width|d_state|state_size|channels?|num_filters)", 32),
    (r".*(hidden|size_global|output_size|proj_size|input_size|feature_size|lru_width)", 32),
    (r".*(window|window_size|window_len|window_pattern|local_attention)", 4),
    (r".*chunk_(size|length)", 4),
]
RULES = [(re.compile(pattern), largest) for pattern, largest in _RULES]
_SPECIAL = re.compile(r".*(_token_id|_token_index|_patch_id|im_.*_id)")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer")
_LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")
# Fields that a default configuration leaves open although its model cannot be built without them.
_FILLED = {
    "head_dim": 8,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "top_k_experts": 2,
}


def model_types() -> list[tuple[str, str]]:
    """Every model type with its auto class; where two auto classes share a class of models, the first one counts."""
    found: dict[tuple[str, str], str] = {}
    for auto_class, names in _LISTS.items():
        for model_type, model_class in getattr(modeling_auto, names, {}).items():
            found.setdefault((model_type, str(model_class)), auto_class)
    return [(model_type, auto_class) for (model_type, _), auto_class in found.items()]


def build(
    model_type: str,
    auto_class: str = "AutoModelForCausalLM",
    *,
    dtype: torch.dtype = torch.float32,
    **overrides: object,
) -> PreTrainedModel:
    """A tiny model in evaluation mode, with the same random weights every time.

    Raises:
        ValueError: The configuration is not tiny, for lack of a rule or of an override.
    """
    auto: Any = getattr(transformers, auto_class)
    config = tiny_config(model_type, auto_class, **overrides)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > LARGEST_MODEL:
        raise ValueError(f"{model_type}: {size} parameters, which is not tiny")
    torch.manual_seed(7)
    model: PreTrainedModel = auto.from_config(config).to(dtype).eval()
    randomize(model)
    return model


def randomize(model: PreTrainedModel) -> None:
    """Draws weights, and moves norms off one and biases off zero; what is not learned (sinusoids) stays."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)


def tiny_config(model_type: str, auto_class: str = "AutoModelForCausalLM", **overrides: object) -> PretrainedConfig:
    """The shrunk configuration of a model type."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    arguments = shrunk(default, iter(range(FIRST_SPECIAL, VOCABULARY)))
    # BERT and its kind attend in both directions unless they are told that they decode.
    if auto_class == "AutoModelForCausalLM" and hasattr(default, "is_decoder"):
        arguments["is_decoder"] = True
    if getattr(default, "is_encoder_decoder", False):
        arguments["decoder_start_token_id"] = 1
    return config_class(**merged(merged(arguments, OVERRIDES.get(model_type, {})), overrides))


def shrunk(config: PretrainedConfig, special: Iterator[int]) -> dict[str, Any]:
    """The arguments that make a tiny configuration of the same class."""
    fields, declared = vars(config), declared_defaults(type(config))
    arguments: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            arguments[name] = shrunk(value, special) | {"model_type": value.model_type}
        elif name in declared:
            small = _small(name, value, declared, special)
            if small != value:
                arguments[name] = small
    return arguments | _attention(fields, arguments) | _layers(fields, arguments) | _tokens(fields) | _geometry(config)


def _small(name: str, value: object, declared: Mapping[str, object], special: Iterator[int]) -> object:
    if value is None:
        return _FILLED.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if _SPECIAL.fullmatch(name):
        return next(special) if value >= FIRST_SPECIAL else value
    if declared[name] is None:
        return value  # Computed from other fields, and again from the smaller ones.
    return next((min(value, most) for rule, most in RULES if most is not None and rule.fullmatch(name)), value)


def declared_defaults(config_class: type) -> dict[str, object]:
    """The fields that a configuration's constructor takes, and their defaults."""
    if dataclasses.is_dataclass(config_class):
        return {field.name: field.default for field in dataclasses.fields(config_class)}
    classes = [cls for cls in config_class.__mro__ if "__init__" in vars(cls)]
    return {name: p.default for cls in classes for name, p in inspect.signature(cls.__init__).parameters.items()}


def _attention(fields: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """As many key and value heads as query heads where the default has it so, or where a latent stands for them."""
    heads, key_value_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if not isinstance(heads, int) or not isinstance(key_value_heads, int):
        return {}
    small = arguments.get("num_attention_heads", heads)
    shared = key_value_heads != heads and "kv_lora_rank" not in fields
    return {"num_key_value_heads": min(2, key_value_heads) if shared else small}


def _layers(fields: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of each kind that the default has, in the order of their first appearance."""
    count = next((arguments.get(name, fields[name]) for name in _LAYER_COUNTS if isinstance(fields.get(name), int)), 0)
    kinds = {name: fields[name] for name in _LAYER_LISTS if isinstance(fields.get(name), list | tuple) and fields[name]}
    if not kinds or not count:
        return {}
    rows = list(dict.fromkeys(zip(*kinds.values(), strict=False)))
    rows = (rows * count)[: max(count, len(rows))]
    lists = dict(zip(kinds, map(list, zip(*rows, strict=True)), strict=True))
    return {**lists, "num_hidden_layers": len(rows)}


def _tokens(fields: Mapping[str, Any]) -> dict[str, Any]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {name: token for name, token in ids.items() if name in fields}


def _geometry(config: PretrainedConfig) -> dict[str, Any]:
    """Images of two by two patches; multimodal rotary positions that fill a head of eight dimensions."""
    found: dict[str, Any] = {}
    image_size, patch_size = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(image_size, int) and isinstance(patch_size, int):
        found["image_size"] = 2 * patch_size
    rope = getattr(config, "rope_parameters", None)
    ignored = getattr(config, "ignore_keys_at_rope_validation", None) or ()
    if isinstance(rope, dict) and "rope_theta" in rope and ("mrope_section" in ignored or "mrope_section" in rope):
        found["rope_parameters"] = rope | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    return found


def merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `extra` laid over it, level by level."""
    nested = {
        name: merged(base[name], value)
        for name, value in extra.items()
        if isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
    }
    return {**base, **extra, **nested}
