"""config.json: the shape of a model as Hugging Face's files say it, and the keys that must not
change what it computes.

A key that is absent has the value that transformers' `LlamaConfig` gives it. Every other key of the
file is one of these: known to have no effect on the outputs; known to change them, and then it must
have the value at which it does not; or unknown. An unknown key that is named like a part of a
network is refused, any other is said (`remarks`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llama2.errors import UserError, did_you_mean
from llama2.formats.hf_directory import CONFIG, PADDING, read_json
from llama2.model.llama import LlamaConfig
from llama2.terminal_text import shown
from llama2.tokenizer import chat_settings

LANGUAGE_MODEL, SEQUENCE_SCORER = "LlamaForCausalLM", "LlamaForSequenceClassification"
UNFIT = "this model cannot be loaded"

_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
_NUMBERS: Mapping[str, tuple[tuple[type, ...], Any]] = {
    **dict.fromkeys(_REQUIRED, ((int,), None)),
    "num_key_value_heads": ((int,), None),
    "max_position_embeddings": ((int,), 2048),
    "rms_norm_eps": ((int, float), 1e-6),
    "bos_token_id": ((int,), 1),
    "tie_word_embeddings": ((bool,), False),
}
"""what a number may be, and transformers' value where there is none"""
_EXPECTED: Mapping[tuple[type, ...], str] = {
    (int,): "a whole number was expected",
    (int, float): "a number was expected",
    (bool,): "true or false was expected",
}
_MAY_BE_NULL = {"num_key_value_heads", "bos_token_id", "tie_word_embeddings"}
_SECTIONS = ("rope_parameters", "rope_scaling")
_LAYERS = "layer_types"
_READ = {
    *_NUMBERS,
    *_SECTIONS,
    "rope_theta",
    "eos_token_id",
    "model_type",
    "architectures",
    "quantization_config",
}

# which change nothing inside the context by a factor of 1
_IDENTITIES = ("linear", "dynamic", "llama3")
_ROPE_WITHOUT_EFFECT = {
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "finetuned",
}  # of kinds and factors that are refused
_ROPE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "factor": (1,),
    "partial_rotary_factor": (1,),
    "attention_factor": (1,),
}

_SAYS_NOTHING = """
    torch_dtype dtype use_bfloat16 transformers_version transformers.js_config name_or_path auto_map model_max_length
    tokenizer_class license language tags base_model finetuning_task task_specific_params problem_type custom_pipelines
    use_cache return_dict return_dict_in_generate torchscript tf_legacy_loss keys_to_ignore_at_inference
    output_attentions output_hidden_states output_scores output_router_logits use_return_dict
    attn_implementation attention_implementation use_flash_attn use_flash_attention use_flash_attention_2
    flash_attention use_memory_efficient_attention use_sdpa use_xformers use_fused_rms_norm fused_mlp use_triton
    initializer_range initializer_factor initializer_std init_std attention_dropout attn_dropout attn_pdrop dropout
    hidden_dropout hidden_dropout_prob embd_pdrop embed_dropout resid_pdrop residual_dropout ffn_dropout
    classifier_dropout attention_probs_dropout_prob label_smoothing z_loss router_aux_loss_coef neftune_noise_alpha
    gradient_checkpointing use_gradient_checkpointing gradient_checkpointing_kwargs pretraining_tp tensor_parallel_size
    tensor_parallel_degree pipeline_parallel_size sequence_parallel sequence_length seq_length
    pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id pad_token bos_token
    eos_token unk_token end_token_id forced_bos_token_id forced_eos_token_id prefix suppress_tokens
    begin_suppress_tokens max_length min_length max_new_tokens min_new_tokens max_sequence_length
    max_seq_len max_seq_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p min_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences exponential_decay_length_penalty remove_invalid_values renormalize_logits
    num_labels id2label label2id is_decoder is_encoder_decoder original_max_position_embeddings multiple_of
    ffn_dim_multiplier unsloth_version unsloth_fixed is_llama_config group_size_ratio num_logits_to_keep
"""
"""dtypes, provenance, speed, training, sampling, labels and what describes the sizes once more"""
_WITHOUT_EFFECT = frozenset(_SAYS_NOTHING.split())
_NETWORK = re.compile(
    r"(^|[_.])(activation|adapter|alibi|attn|attention|audio|bias|block|causal|chunk|clip|compress|conv|cross|dense|depth"
    r"|embed|epsilon|expert|gating|group|head|hidden|image|intermediate|latent|layer|linear|logit|lora|mamba|mask"
    r"|mixture|multi|nonlinear|norm|parallel|partial|position|prun|quant|query|relative|resid|rope|rotary|router|scal"
    r"|share|skip|slid|softcap|soft_cap|sparse|theta|tower|vision|width|window|xpos"
    r"|(act|cap|capping|dim|embd|eps|ffn|gate|inv|kv|ln|mla|mlp|mm|moe|mtp|mup|nope|q|qk|qkv|res|rms|ssm|tie)"
    r"($|[_.\d]))|scal(e|ed|ing)$|multiplier|norm$|bias$|window$|residual|softcap",
    re.IGNORECASE,
)
"""names of parts of a network"""


def read_config(directory: Path) -> tuple[LlamaConfig, bool]:
    """The shape of the model in a directory, and whether it is a scorer. UserError names the key
    that does not fit."""
    path, values = _values(directory)
    if values.get("model_type") != "llama":
        raise UserError(
            f"{path}: model_type is {shown(values.get('model_type'))}, not 'llama'",
            "only models of the Llama 2 family can be loaded",
        )

    if values.get("quantization_config"):
        method = _section(path, values, "quantization_config").get("quant_method", "unknown")
        raise UserError(
            f"{path}: the weights are quantized (quant_method '{method}')",
            "take the original weights",
        )

    for name in _REQUIRED:
        if values.get(name) is None:
            raise UserError(f"{path}: the key '{name}' is missing", did_you_mean(name, values))

    known = {name: _number(path, values, name) for name in _NUMBERS}
    known["num_key_value_heads"] = known["num_key_value_heads"] or known["num_attention_heads"]
    known["rope_theta"] = _rope_theta(path, values)
    known["eos_token_id"] = (
        chat_settings.read_stop_ids(directory, known["vocab_size"]) or LlamaConfig.eos_token_id
    )

    try:
        config = LlamaConfig(**known)
    except UserError as error:
        raise UserError(f"{path}: {error.cause}", error.cure) from None

    _refuse_relatives(path, values, config)
    return config, _is_scorer(path, values)


def remarks(directory: Path, config: LlamaConfig) -> tuple[str, ...]:
    """In sentences for the user, what stands in the file of a `config` that was read, and is
    unknown."""
    path, values = _values(directory)
    names = sorted(set(_unknown(values)) - _neutral(config).keys() - {_LAYERS})
    return (f"{path}: unknown and left out: {', '.join(names)}",) if names else ()


def _values(directory: Path) -> tuple[Path, dict[str, Any]]:
    path = directory / CONFIG
    if not directory.is_dir():
        raise UserError(f"{directory}: no such checkpoint directory", "check the path")
    if not path.exists():
        raise UserError(
            f"{path}: missing", f"a checkpoint directory has a {CONFIG} beside its weights"
        )

    return path, read_json(path)


def _number(path: Path, values: Mapping[str, Any], name: str) -> Any:
    kinds, default = _NUMBERS[name]
    if name not in values or (values[name] is None and name in _MAY_BE_NULL):
        return default

    return _checked(path, name, values[name], kinds)


def _checked(path: Path, name: str, value: Any, kinds: tuple[type, ...]) -> Any:
    if (
        not isinstance(value, kinds)
        or (isinstance(value, bool) and bool not in kinds)
        or value != value
    ):
        raise UserError(f"{path}: {name} is {shown(value)}", _EXPECTED[kinds])

    return value


def _section(path: Path, values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, Mapping):
        raise UserError(f"{path}: {name} is {shown(section)}", "a JSON object was expected")

    return section


# ---- rotary positions
# -----------------------------------------------------------------------------------------------
def _rope_theta(path: Path, values: Mapping[str, Any]) -> float:
    """The base, which transformers 4 writes at the top and transformers 5 in a section; UserError
    for two of them."""
    found = {"rope_theta": values.get("rope_theta")}
    for name in _SECTIONS:
        section = _section(path, values, name)
        _refuse_scaling(path, name, section)
        found[f"{name}.rope_theta"] = section.get("rope_theta")

    bases = {
        name: _checked(path, name, base, (int, float))
        for name, base in found.items()
        if base is not None
    }
    _agree(path, bases, "keep the one with which the model was trained")
    theta: float = next(iter(bases.values()), LlamaConfig.rope_theta)

    return theta


def _refuse_scaling(path: Path, name: str, section: Mapping[str, Any]) -> None:
    """UserError for positions that are not Llama 2's: scaled, partly rotated, or of a kind that is
    unknown."""
    kinds = {
        f"{name}.{key}": section[key]
        for key in ("rope_type", "type")
        if section.get(key) is not None
    }
    _agree(path, kinds, "keep the one with which the model was trained")
    implied = "default" if section.get("factor") is None else "linear"
    place, kind = next(iter(kinds.items()), (f"{name}.rope_type", implied))
    factor = section.get("factor")

    if kind != "default" and not (kind in _IDENTITIES and factor is not None and _same(factor, 1)):
        by = "" if factor is None else f" with the factor {shown(factor)}"
        raise UserError(f"{path}: {place} is {shown(kind)}{by}, Llama 2 has 'default'", UNFIT)

    for key, value in section.items():
        if (
            key in ("rope_type", "type", "rope_theta")
            or key in _ROPE_WITHOUT_EFFECT
            or value is None
        ):
            continue
        if not any(_same(value, neutral) for neutral in _ROPE_NEUTRAL.get(key, ())):
            raise UserError(
                f"{path}: {name}.{key} is {shown(value)}, which Llama 2 does not have", UNFIT
            )


def _agree(path: Path, found: Mapping[str, Any], cure: str) -> None:
    """UserError that names the first two keys which say one thing in two ways."""
    first, *others = found or {"": None}
    for other in others:
        if found[other] != found[first]:
            raise UserError(
                f"{path}: {first} is {shown(found[first])} and {other} is {shown(found[other])}",
                cure,
            )


# ---- everything else
# ------------------------------------------------------------------------------------------------
def _neutral(config: LlamaConfig) -> Mapping[str, tuple[Any, ...]]:
    """Keys of relatives, and the values (Llama 2's, or other words for it) at which they change
    nothing."""
    one: tuple[Any, ...] = (1,)
    off: tuple[Any, ...] = (False, 0)
    windows: tuple[Any, ...] = (0, -1)

    return {
        "hidden_act": ("silu", "swish"),
        "head_dim": (config.head_dim,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "is_causal": (True,),
        "causal": (True,),
        "use_rope": (True,),
        "use_swiglu": (True,),
        "use_rms_norm": (True,),
        "use_bidirectional_attention": (False,),
        "partial_rotary_factor": one,
        "rotary_pct": one,
        "rope_percentage": one,
        "rotary_percent": one,
        "rotary_dim": (config.head_dim,),
        "rope_scale": one,
        "rope_scaling_factor": one,
        "attention_multiplier": (config.head_dim**-0.5,),
        "query_pre_attn_scalar": (config.head_dim,),
        "embedding_multiplier": one,
        "residual_multiplier": one,
        "logits_scaling": one,
        "logit_scale": one,
        "final_logit_softcapping": off,
        "attn_logit_softcapping": off,
        "logits_soft_cap": off,
        "clip_qkv": off,
        "sliding_window": windows,
        "attention_window": windows,
        "chunk_size_feed_forward": off,
        "attention_chunk_size": off,
        "num_experts": (0, 1),
        "num_local_experts": (0, 1),
        "n_routed_experts": off,
        "num_experts_per_tok": (0, 1),
        "n_shared_experts": off,
        "num_nextn_predict_layers": off,
        "norm_type": ("rms_norm", "rmsnorm", "RMSNorm"),
        "position_embedding_type": ("rope", "rotary"),
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
    """UserError for what Llama 2 has not, or has otherwise: the weights might load and say
    nonsense."""
    neutral = _neutral(config)
    for name, value in values.items():
        if (
            name in neutral
            and value is not None
            and not any(_same(value, each) for each in neutral[name])
        ):
            if name in ("sliding_window", "attention_window") and _reaches(value, config):
                continue

            raise UserError(
                f"{path}: {name} is {shown(value)}, Llama 2 has {shown(neutral[name][0])}", UNFIT
            )

    layers = values.get(_LAYERS)
    if layers and (not isinstance(layers, list) or {*map(str, layers)} != {"full_attention"}):
        raise UserError(
            f"{path}: {_LAYERS} is {shown(layers)}, Llama 2 has 'full_attention' alone", UNFIT
        )

    for name in _unknown(values):
        if _NETWORK.search(name) and name not in neutral and name != _LAYERS:
            raise UserError(
                f"{path}: {name} is {shown(values[name])}, a key that Llama 2 does not have",
                "take it out if the model does not need it, else it cannot be loaded",
            )


def _reaches(value: Any, config: LlamaConfig) -> bool:
    """Whether a window of attention is no window, because the context is not longer."""
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and value >= config.max_position_embeddings
    )


def _unknown(values: Mapping[str, Any]) -> Iterator[str]:
    """Keys that are neither read nor known to be without effect, and that say something: no null,
    nothing empty."""
    for name, value in values.items():
        known = name in _READ or name in _WITHOUT_EFFECT or name.startswith("_")
        if not known and value is not None and value is not False and value not in ("", [], {}):
            yield name


def _same(found: Any, neutral: Any) -> bool:
    """Equality in which true is no number; numbers may be rounded to six digits."""
    if isinstance(found, bool) != isinstance(neutral, bool):
        return False
    if isinstance(found, float) and isinstance(neutral, int | float):
        return abs(found - neutral) <= 1e-6 * abs(neutral)

    return bool(found == neutral)


def _is_scorer(path: Path, values: Mapping[str, Any]) -> bool:
    listed = values.get("architectures") or [LANGUAGE_MODEL]
    # early conversions wrote LLaMA
    known = {name.lower(): name for name in (LANGUAGE_MODEL, SEQUENCE_SCORER)}
    names = [known.get(str(name).lower()) for name in listed] if isinstance(listed, list) else []

    if not names or None in names:
        raise UserError(
            f"{path}: architectures is {shown(listed)}",
            f"{LANGUAGE_MODEL} or {SEQUENCE_SCORER} was expected",
        )

    return SEQUENCE_SCORER in names


# ---- writing
# --------------------------------------------------------------------------------------------------------
def config_json(
    config: LlamaConfig, *, scorer: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """config.json, complete for transformers 4 and 5 (which renamed `torch_dtype` and
    `rope_theta`)."""
    precision = str(dtype).removeprefix("torch.")
    values: dict[str, Any] = {
        "architectures": [SEQUENCE_SCORER if scorer else LANGUAGE_MODEL],
        "model_type": "llama",
        **{name: getattr(config, name) for name in LlamaConfig.__dataclass_fields__},
        **_ends(config),
        "head_dim": config.head_dim,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": precision,
        "dtype": precision,
    }
    if scorer:
        values |= {
            "num_labels": 1,
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "pad_token_id": PADDING,
        }

    return values


def generation_json(config: LlamaConfig) -> dict[str, Any]:
    """generation_config.json: by it transformers and vLLM know every id that ends an answer."""
    return {"bos_token_id": config.bos_token_id, **_ends(config)}


def _ends(config: LlamaConfig) -> dict[str, Any]:
    return {"eos_token_id": config.stops[0] if len(config.stops) == 1 else list(config.stops)}
