"""Read a model's configuration from the metadata of a GGUF file, and write it there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama2.errors import UserError
from llama2.formats import gguf_rope
from llama2.formats.binary import FETCH_AGAIN
from llama2.formats.gguf_header import Header
from llama2.formats.gguf_rope import UNREADABLE
from llama2.formats.settings import build_config, changes_nothing, covers_context
from llama2.model.config import LlamaConfig
from llama2.terminal_text import show_value

Precision = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
# each ends an answer in llama.cpp
ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
LLAMA, QWEN = "llama", "qwen2"
_UNKNOWN = "a key that Llama 2 does not have"
_BOS, _TOKENIZER = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.model"
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
_QUANTIZATION_VERSION = 2
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_HEAD = ("attention.key_length", "attention.value_length", "rope.dimension_count")
# keys that repeat a size, belong to kinds that are refused, or describe the file
_WITHOUT_EFFECT = {
    "vocab_size",
    "attention.layer_norm_epsilon",
    "rope.scaling.finetuned",
    "pooling_type",
    "tensor_data_layout",
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
        add(f"{LLAMA}.{key}", value)

    writer.add_rope_dimension_count(config.head_dim)
    if config.query_size != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)

    gguf_rope.describe_scaling(writer, config, LLAMA)


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
    kind = find_architecture(path, metadata)
    if metadata.get("split.count", 1) not in (0, 1):  # 0 where llama.cpp has joined the parts
        raise UserError(
            f"{path}: one of {metadata['split.count']} parts of a model",
            "join them with llama.cpp's llama-gguf-split --merge",
        )

    embeddings = tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise UserError(f"{path}: tensor 'token_embd.weight' is missing or no matrix", FETCH_AGAIN)

    names = {field: f"{kind}.{key}" for field, key in _KEYS.items()} | {"bos_token_id": _BOS}
    known = {
        names["num_key_value_heads"]: metadata.get(names["num_attention_heads"]),
        names["rope_theta"]: LlamaConfig.rope_theta,
        **metadata,
    }
    values = {field: _restore(known.get(key)) for field, key in names.items()}
    if values["bos_token_id"] is None and metadata.get(_TOKENIZER) != "gpt2":
        values["bos_token_id"] = LlamaConfig.bos_token_id

    values["vocab_size"] = embeddings.shape[0]
    values["eos_token_id"] = (
        tuple(metadata[key] for key in ENDS if key in metadata) or LlamaConfig.eos_token_id
    )
    values["tie_word_embeddings"] = "output.weight" not in tensors
    values["attention_bias"] = "blk.0.attn_q.bias" in tensors
    values["attention_output_bias"] = "blk.0.attn_output.bias" in tensors
    if (size := metadata.get(f"{kind}.{_HEAD[0]}")) is not None:
        values["head_dim"] = size

    restored = {key: _restore(value) for key, value in metadata.items()}
    context = values["max_position_embeddings"]
    values["rope_scaling"] = gguf_rope.read_scaling(path, restored, kind, context)

    config = build_config(path, values, names | {"head_dim": f"{kind}.{_HEAD[0]}"}, metadata)
    _refuse_variants(path, metadata, config, kind)
    return config


def find_architecture(path: Path, metadata: Mapping[str, Any]) -> str:
    """Return which of llama.cpp's architectures a file has; UserError for any but Llama's own and
    that of Qwen 2, which differs by biases and the order of rotary pairs."""
    kind = metadata.get("general.architecture")
    if kind not in (LLAMA, QWEN):
        raise UserError(
            f"{path}: the architecture is {kind!r}, not {LLAMA!r}",
            "only models of the Llama 2 family can be read",
        )

    return str(kind)


def find_original(path: Path, metadata: Mapping[str, Any]) -> Any:
    """Return the context of pretraining, where a file says it."""
    return metadata.get(f"{find_architecture(path, metadata)}.{gguf_rope.ORIGINAL}")


def _restore(value: Any) -> Any:
    """Return 1e-05 for the fp32 number nearest to it; other values as they are."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _refuse_variants(
    path: Path, metadata: Mapping[str, Any], config: LlamaConfig, kind: str
) -> None:
    """UserError for settings of later members of the architecture.

    0 switches a factor off in llama.cpp.
    """
    head, off = (config.head_dim,), (1, 0)
    neutral: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(_HEAD, head),
        "rope.scaling.yarn_attn_factor": off,
        "rope.scaling.yarn_ext_factor": (0, -1),
        "rope.scaling.yarn_log_multiplier": (0,),
        "attention.causal": (True,),
        "attention.scale": (config.head_dim**-0.5, 0),
        "logit_scale": off,
        "residual_scale": off,
        "embedding_scale": off,
        "expert_count": (0,),
        "expert_used_count": (0, 1),
    }
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "yarn":
        neutral["rope.scaling.yarn_ext_factor"] = (1, -1)

    read = {*_KEYS.values(), *_WITHOUT_EFFECT, *gguf_rope.KEYS}
    for key, value in metadata.items():
        name = key.removeprefix(f"{kind}.")
        if name == key or name in read:
            continue
        if name == "attention.sliding_window" and covers_context(value, config):
            continue
        if changes_nothing(value, neutral.get(name, (False, 0, ""))):
            continue

        wanted = f"Llama 2 has {neutral[name][0]!r}" if name in neutral else _UNKNOWN
        raise UserError(f"{path}: {key} is {show_value(_restore(value))}, {wanted}", UNREADABLE)
