"""Read a model's configuration from the metadata of a GGUF file, and write it there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama2.errors import UserError
from llama2.formats.binary import FETCH_AGAIN
from llama2.formats.gguf_header import Header
from llama2.formats.settings import build_config, changes_nothing, covers_context
from llama2.model.llama import LlamaConfig
from llama2.terminal_text import show_value

Precision = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
# each ends an answer in llama.cpp
ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
UNREADABLE = "this model cannot be read"
_UNKNOWN = "a key that Llama 2 does not have"
_BOS = "tokenizer.ggml.bos_token_id"
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
_QUANTIZATION_VERSION = 2
_KEYS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}
# keys that repeat a size, belong to kinds that are refused, or describe the file
_WITHOUT_EFFECT = {
    "llama.vocab_size",
    "llama.attention.layer_norm_epsilon",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.finetuned",
    "llama.rope.scaling.yarn_beta_fast",
    "llama.rope.scaling.yarn_beta_slow",
    "llama.pooling_type",
    "llama.tensor_data_layout",
}


# --- writing ---
def describe_config(
    writer: Any, config: LlamaConfig, precision: Precision, name: str | None
) -> None:
    """Give a `GGUFWriter` the shape of a model; `name` is shown by programs that list models."""
    writer.add_type("model")
    if name:
        writer.add_name(name)

    writer.add_file_type(_FILE_TYPES[precision])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_vocab_size(config.vocab_size)

    for field, key in _KEYS.items():
        value = getattr(config, field)
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(key, value)

    writer.add_rope_dimension_count(config.head_dim)


def describe_losses(config: LlamaConfig) -> list[str]:
    """List, in sentences for the user, the settings that GGUF has no place for."""
    more = config.stops[len(ENDS) :]
    if not more:
        return []

    return [
        f"answers end at {len(config.stops)} ids, and GGUF has places for {len(ENDS)}: "
        f"{', '.join(map(str, more))} left out"
    ]


# --- reading ---
def read_config(path: Path, header: Header) -> LlamaConfig:
    """Return the configuration of the model in a file.

    UserError for another architecture, a part of a model, and settings unlike Llama 2's.
    """
    metadata, tensors = header.metadata, header.tensors
    if metadata.get("general.architecture") != "llama":
        raise UserError(
            f"{path}: the architecture is {metadata.get('general.architecture')!r}, not 'llama'",
            "only models of the Llama 2 family can be read",
        )
    if metadata.get("split.count", 1) not in (0, 1):  # 0 where llama.cpp has joined the parts
        raise UserError(
            f"{path}: one of {metadata['split.count']} parts of a model",
            "join them with llama.cpp's llama-gguf-split --merge",
        )

    embeddings = tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise UserError(f"{path}: tensor 'token_embd.weight' is missing or no matrix", FETCH_AGAIN)

    known = {
        _KEYS["num_key_value_heads"]: metadata.get(_KEYS["num_attention_heads"]),
        _KEYS["rope_theta"]: LlamaConfig.rope_theta,
        _BOS: LlamaConfig.bos_token_id,
        **metadata,
    }
    names = _KEYS | {"bos_token_id": _BOS}
    values = {field: _restore(known.get(key)) for field, key in names.items()}
    values["vocab_size"] = embeddings.shape[0]
    values["eos_token_id"] = (
        tuple(metadata[key] for key in ENDS if key in metadata) or LlamaConfig.eos_token_id
    )
    values["tie_word_embeddings"] = "output.weight" not in tensors

    config = build_config(path, values, names, metadata)
    _refuse_variants(path, metadata, config)
    return config


def _restore(value: Any) -> Any:
    """Return 1e-05 for the fp32 number nearest to it; other values as they are."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _refuse_variants(path: Path, metadata: Mapping[str, Any], config: LlamaConfig) -> None:
    """UserError for settings of later members of the architecture.

    0 switches a factor off in llama.cpp.
    """
    head, off = (config.head_dim,), (1, 0)
    neutral: dict[str, tuple[Any, ...]] = {
        "llama.rope.dimension_count": head,
        "llama.attention.key_length": head,
        "llama.attention.value_length": head,
        "llama.rope.scaling.type": ("none", "linear"),
        "llama.rope.scaling.factor": off,
        "llama.rope.scale_linear": off,
        "llama.rope.scaling.attn_factor": off,
        "llama.rope.scaling.yarn_attn_factor": off,
        "llama.rope.scaling.yarn_ext_factor": (0, -1),
        "llama.rope.scaling.yarn_log_multiplier": (0,),
        "llama.attention.causal": (True,),
        "llama.attention.scale": (config.head_dim**-0.5, 0),
        "llama.logit_scale": off,
        "llama.residual_scale": off,
        "llama.embedding_scale": off,
        "llama.expert_count": (0,),
        "llama.expert_used_count": (0, 1),
    }
    known = {*_KEYS.values(), *_WITHOUT_EFFECT}

    for key, value in metadata.items():
        if key in known or not key.startswith("llama."):
            continue
        if key == "llama.attention.sliding_window" and covers_context(value, config):
            continue
        if changes_nothing(value, neutral.get(key, (False, 0, ""))):
            continue

        wanted = f"Llama 2 has {neutral[key][0]!r}" if key in neutral else _UNKNOWN
        raise UserError(f"{path}: {key} is {show_value(_restore(value))}, {wanted}", UNREADABLE)
