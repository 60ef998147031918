"""Read and write config.json: the shape of a model in Hugging Face's format.

An absent key has the value of transformers' `LlamaConfig`. Every other key of the file has no
effect on the outputs; or it changes them, and must have the value at which it does not; or it is
unknown. An unknown key that is named like a part of a network is refused, any other is listed
(`list_remarks`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llama2 import json_files
from llama2.errors import UserError
from llama2.formats.hf_directory import CONFIG, PADDING
from llama2.formats.hf_rope import SECTIONS, UNFIT, make_rope_json, read_rope
from llama2.formats.settings import build_config, changes_nothing, covers_context
from llama2.model.config import LlamaConfig
from llama2.terminal_text import show_value
from llama2.tokenizer import chat_settings

LLAMA, MISTRAL, QWEN = "llama", "mistral", "qwen2"
LANGUAGE_MODEL, SEQUENCE_SCORER = "ForCausalLM", "ForSequenceClassification"

_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# transformers' values, for keys that are absent: null, and what a kind of model has of its own
_NULL: Mapping[str, Any] = {"num_key_value_heads": None, "tie_word_embeddings": False}
_OWN: Mapping[str, Mapping[str, Any]] = {
    LLAMA: {},
    MISTRAL: {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    QWEN: {"num_key_value_heads": 32, "max_position_embeddings": 32768, "bos_token_id": None},
}
_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "tie_word_embeddings": False,
}
_LAYERS = "layer_types"
_SLIDING = ("use_sliding_window", "sliding_window", "max_window_layers")
_READ = {
    *_SHAPE,
    *_DEFAULTS,
    *SECTIONS,
    "rope_theta",
    "head_dim",
    "attention_bias",
    "eos_token_id",
    "model_type",
    "architectures",
    "quantization_config",
}

_SAYS_NOTHING = """
    torch_dtype dtype use_bfloat16 transformers_version transformers.js_config name_or_path
    auto_map model_max_length tokenizer_class license language tags base_model finetuning_task
    task_specific_params problem_type custom_pipelines use_cache return_dict
    return_dict_in_generate torchscript tf_legacy_loss keys_to_ignore_at_inference
    output_attentions output_hidden_states output_scores output_router_logits use_return_dict
    attn_implementation attention_implementation use_flash_attn use_flash_attention
    use_flash_attention_2 flash_attention use_memory_efficient_attention use_sdpa use_xformers
    use_fused_rms_norm fused_mlp use_triton initializer_range initializer_factor initializer_std
    init_std attention_dropout attn_dropout attn_pdrop dropout hidden_dropout
    hidden_dropout_prob embd_pdrop embed_dropout resid_pdrop residual_dropout ffn_dropout
    classifier_dropout attention_probs_dropout_prob label_smoothing z_loss router_aux_loss_coef
    neftune_noise_alpha gradient_checkpointing use_gradient_checkpointing
    gradient_checkpointing_kwargs pretraining_tp tensor_parallel_size tensor_parallel_degree
    pipeline_parallel_size sequence_parallel sequence_length seq_length pad_token_id
    unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id pad_token
    bos_token eos_token unk_token end_token_id forced_bos_token_id forced_eos_token_id prefix
    suppress_tokens begin_suppress_tokens max_length min_length max_new_tokens min_new_tokens
    max_sequence_length max_seq_len max_seq_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p min_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences exponential_decay_length_penalty remove_invalid_values
    renormalize_logits num_labels id2label label2id is_decoder is_encoder_decoder
    original_max_position_embeddings multiple_of ffn_dim_multiplier unsloth_version
    unsloth_fixed is_llama_config group_size_ratio num_logits_to_keep
"""
# dtypes, provenance, speed, training, sampling, labels, and sizes that repeat others
_WITHOUT_EFFECT = frozenset(_SAYS_NOTHING.split())
# names of parts of a network
_NETWORK = re.compile(
    r"(^|[_.])(activation|adapter|alibi|attn|attention|audio|bias|block|causal|chunk|clip"
    r"|compress|conv|cross|dense|depth|embed|epsilon|expert|gating|group|head|hidden|image"
    r"|intermediate|latent|layer|linear|logit|lora|mamba|mask|mixture|multi|nonlinear|norm"
    r"|parallel|partial|position|prun|quant|query|relative|resid|rope|rotary|router|scal"
    r"|share|skip|slid|softcap|soft_cap|sparse|theta|tower|vision|width|window|xpos|(act|cap"
    r"|capping|dim|embd|eps|ffn|gate|inv|kv|ln|mla|mlp|mm|moe|mtp|mup|nope|q|qk|qkv|res|rms"
    r"|ssm|tie)($|[_.\d]))|scal(e|ed|ing)$|multiplier|norm$|bias$|window$|residual|softcap",
    re.IGNORECASE,
)


def read_config(directory: Path) -> tuple[LlamaConfig, bool]:
    """Return the shape of the model in a directory, and whether it is a scorer.

    UserError names the key that does not fit.
    """
    path, values = _read_values(directory)
    family = _read_family(path, values)
    if quantization := chat_settings.read_section(path, values, "quantization_config"):
        method = quantization.get("quant_method", "unknown")
        raise UserError(
            f"{path}: the weights are quantized (quant_method '{method}')",
            "take the original weights",
        )

    rope = read_rope(path, values)
    given = _read_shape(path, values)
    given |= {"rope_theta": rope.theta, "rope_scaling": rope.scaling}
    if rope.scaling is not None and rope.scaling.rope_type == "dynamic":
        given["max_position_embeddings"] = rope.scaling.extended

    size = given["vocab_size"] if type(given["vocab_size"]) is int else None
    given["eos_token_id"] = chat_settings.read_stop_ids(directory, size) or LlamaConfig.eos_token_id
    given |= _read_biases(path, values, family)

    config = build_config(path, given, {"rope_theta": rope.base}, values)
    _refuse_relatives(path, values, config)
    return config, _is_scorer(path, values, family)


def _read_shape(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are fields of the shape under the same name."""
    given = {name: values.get(name) for name in _SHAPE}
    given |= {name: values.get(name, default) for name, default in _DEFAULTS.items()}
    for name, default in _NULL.items():
        if given[name] is None:
            given[name] = default

    given["num_key_value_heads"] = given["num_key_value_heads"] or given["num_attention_heads"]
    if (size := values.get("head_dim")) is not None:
        if changes_nothing(size, (0,)):
            raise UserError(
                f"{path}: head_dim is {size}", "leave it out, or say the size of a head"
            )

        given["head_dim"] = size

    return given


def _read_biases(path: Path, values: Mapping[str, Any], family: str) -> dict[str, bool]:
    """Return which projections of attention add a bias: of a Llama all or none, of a Qwen 2 those
    before it, whatever the file says, and of a Mistral none."""
    biased = values.get("attention_bias")
    if biased is not None and not isinstance(biased, bool):
        raise UserError(
            f"{path}: attention_bias is {show_value(biased)}", "true or false is expected"
        )
    if biased and family == MISTRAL:
        raise UserError(f"{path}: attention_bias is True, a Mistral has False", UNFIT)

    behind = bool(biased) and family == LLAMA
    return {"attention_bias": behind or family == QWEN, "attention_output_bias": behind}


def list_remarks(directory: Path, config: LlamaConfig) -> tuple[str, ...]:
    """List, in sentences for the user, the unknown keys in the file that `config` was read from."""
    path, values = _read_values(directory)
    names = sorted(set(_list_unknown(values)) - _list_neutral(config).keys() - {_LAYERS})
    return (f"{path}: unknown and left out: {', '.join(names)}",) if names else ()


def _read_values(directory: Path) -> tuple[Path, dict[str, Any]]:
    path = directory / CONFIG
    if not directory.is_dir():
        raise UserError(f"{directory}: no such checkpoint directory", "check the path")
    if not path.exists():
        raise UserError(f"{path}: missing", _suggest_instead(directory))

    values = json_files.read_object(path)
    family = values.get("model_type")
    defaults = _OWN.get(family, {}) if isinstance(family, str) else {}
    if family == QWEN and not values.get("use_sliding_window"):
        # which are read with it alone
        values = {name: value for name, value in values.items() if name not in _SLIDING}

    return path, {**defaults, **values}


def _read_family(path: Path, values: Mapping[str, Any]) -> str:
    """Return the kind of model; UserError for one that is no relative of Llama 2."""
    family = values.get("model_type")
    if not isinstance(family, str) or family not in _OWN:
        raise UserError(
            f"{path}: model_type is {show_value(family)}, not {LLAMA!r}",
            f"only models of the Llama 2 family can be loaded ({', '.join(_OWN)})",
        )

    return family


def _suggest_instead(directory: Path) -> str:
    """Say what to do with a directory that has weights of another kind, or none."""
    if files := sorted(directory.glob("*.gguf")):
        return f"give the file itself: {files[0]}"
    if any((directory / name).exists() for name in ("params.json", "adapter_config.json")):
        return f"llama2 import {directory} --out DIRECTORY makes a checkpoint of it"

    return f"a checkpoint directory has a {CONFIG} beside its weights"


# --- everything else ---
_UNIT, _OFF, _WINDOWS = (1,), (False, 0), (0, -1)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "is_causal": (True,),
    "causal": (True,),
    "use_rope": (True,),
    "use_swiglu": (True,),
    "use_rms_norm": (True,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": _UNIT,
    "rotary_pct": _UNIT,
    "rope_percentage": _UNIT,
    "rotary_percent": _UNIT,
    "rope_scale": _UNIT,
    "rope_scaling_factor": _UNIT,
    "embedding_multiplier": _UNIT,
    "residual_multiplier": _UNIT,
    "logits_scaling": _UNIT,
    "logit_scale": _UNIT,
    "final_logit_softcapping": _OFF,
    "attn_logit_softcapping": _OFF,
    "logits_soft_cap": _OFF,
    "clip_qkv": _OFF,
    "sliding_window": _WINDOWS,
    "attention_window": _WINDOWS,
    "chunk_size_feed_forward": _OFF,
    "attention_chunk_size": _OFF,
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": _OFF,
    "num_experts_per_tok": (0, 1),
    "n_shared_experts": _OFF,
    "num_nextn_predict_layers": _OFF,
    "norm_type": ("rms_norm", "rmsnorm", "RMSNorm"),
    "position_embedding_type": ("rope", "rotary"),
}
"""keys of related models, and the values at which they change nothing"""


def _list_neutral(config: LlamaConfig) -> Mapping[str, tuple[Any, ...]]:
    """Return `_NEUTRAL`, and keys that say again what the shape says."""
    return {
        **_NEUTRAL,
        "rotary_dim": (config.head_dim,),
        "attention_multiplier": (config.head_dim**-0.5,),
        "query_pre_attn_scalar": (config.head_dim,),
        "block_size": (config.max_position_embeddings,),
        "n_positions": (config.max_position_embeddings,),
        "n_ctx": (config.max_position_embeddings,),
        "norm_eps": (config.rms_norm_eps,),
        "layer_norm_eps": (config.rms_norm_eps,),
        "layer_norm_epsilon": (config.rms_norm_eps,),
        "rotary_emb_base": (config.rope_theta,),
        "rope_base": (config.rope_theta,),
        "rotary_base": (config.rope_theta,),
        "n_layer": (config.num_hidden_layers,),
        "n_layers": (config.num_hidden_layers,),
        "num_layers": (config.num_hidden_layers,),
        "n_head": (config.num_attention_heads,),
        "n_heads": (config.num_attention_heads,),
        "n_kv_heads": (config.num_key_value_heads,),
        "n_embd": (config.hidden_size,),
        "dim": (config.hidden_size,),
        "n_inner": (config.intermediate_size,),
        "padded_vocab_size": (config.vocab_size,),
    }


def _refuse_relatives(path: Path, values: Mapping[str, Any], config: LlamaConfig) -> None:
    """UserError for a setting of other models: the weights might load and give nonsense."""
    neutral = _list_neutral(config)
    for name, value in values.items():
        if value is None or changes_nothing(value, neutral.get(name, [value])):
            continue
        if name in ("sliding_window", "attention_window") and covers_context(value, config):
            continue

        raise UserError(
            f"{path}: {name} is {show_value(value)}, Llama 2 has {show_value(neutral[name][0])}",
            UNFIT,
        )

    layers = values.get(_LAYERS)
    if layers and (not isinstance(layers, list) or {*map(str, layers)} != {"full_attention"}):
        raise UserError(
            f"{path}: {_LAYERS} is {show_value(layers)}, Llama 2 has 'full_attention' alone", UNFIT
        )

    for name in _list_unknown(values):
        if _NETWORK.search(name) and name not in neutral and name != _LAYERS:
            raise UserError(
                f"{path}: {name} is {show_value(values[name])}, a key that Llama 2 does not have",
                "take it out if the model does not need it, else it cannot be loaded",
            )


def _list_unknown(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield unknown keys that say something: their value is neither null nor empty."""
    for name, value in values.items():
        known = name in _READ or name in _WITHOUT_EFFECT or name.startswith("_")
        if not known and value is not None and value is not False and value not in ("", [], {}):
            yield name


def _is_scorer(path: Path, values: Mapping[str, Any], family: str) -> bool:
    kinds = (f"{family}{kind}".lower() for kind in (LANGUAGE_MODEL, SEQUENCE_SCORER))
    language_model, scorer = kinds
    listed = values.get("architectures") or [language_model]
    names = [str(name).lower() for name in listed] if isinstance(listed, list) else []

    # early conversions wrote LLaMA
    if not names or not {language_model, scorer}.issuperset(names):
        raise UserError(
            f"{path}: architectures is {show_value(listed)}",
            f"{_name_class(family, LANGUAGE_MODEL)} or {_name_class(family, SEQUENCE_SCORER)} was "
            "expected",
        )

    return scorer in names


def _name_class(family: str, kind: str) -> str:
    return f"{family.capitalize()}{kind}"


# --- writing ---
_APART = ("head_dim", "rope_scaling", "attention_bias", "attention_output_bias")
_WRITTEN = [name for name in LlamaConfig.__dataclass_fields__ if name not in _APART]


def make_config_json(
    config: LlamaConfig, *, scorer: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return config.json, complete for transformers 4 and 5.

    Version 5 renamed `torch_dtype` and `rope_theta`.
    """
    precision = str(dtype).removeprefix("torch.")
    # of a Llama with a bias before attention, but none behind it, there is no class
    qwen = config.attention_bias and not config.attention_output_bias
    family, scaling = QWEN if qwen else LLAMA, config.rope_scaling
    shape = {name: getattr(config, name) for name in _WRITTEN}
    if scaling is not None and scaling.rope_type == "dynamic":
        shape["max_position_embeddings"] = scaling.original  # from which transformers extends

    values: dict[str, Any] = {
        "architectures": [_name_class(family, SEQUENCE_SCORER if scorer else LANGUAGE_MODEL)],
        "model_type": family,
        **shape,
        "head_dim": config.head_dim,
        **make_rope_json(config),
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": precision,
        "dtype": precision,
    }
    if qwen:
        values["use_sliding_window"] = False

    if scorer:
        values |= {
            "num_labels": 1,
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "pad_token_id": PADDING,
        }

    return values


def make_generation_json(config: LlamaConfig) -> dict[str, Any]:
    """Return generation_config.json: it tells transformers and vLLM every id that ends an "
    "answer."""
    return {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
