"""config.json: what strangers' files say, what they leave out, and what they contradict."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama2.errors import UserError
from llama2.formats.hf_config import (
    list_remarks,
    make_config_json,
    make_generation_json,
    read_config,
)
from llama2.model.config import LlamaConfig
from llama2.model.rope import RopeScaling

LEAST = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHAPE = LlamaConfig(40, 16, 24, 2, 4, 4, max_position_embeddings=2048, rms_norm_eps=1e-6)


def written(directory: Path, generation: dict[str, Any] | None = None, /, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LEAST | changes))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))

    return directory


def read(
    directory: Path, generation: dict[str, Any] | None = None, /, **changes: Any
) -> LlamaConfig:
    return read_config(written(directory, generation, **changes))[0]


def test_absent_keys_have_the_values_of_transformers(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert found == SHAPE
    assert (found.rms_norm_eps, found.max_position_embeddings, found.rope_theta) == (
        1e-6,
        2048,
        10000.0,
    )
    assert (found.tie_word_embeddings, found.bos_token_id, found.stops) == (False, 1, (2,))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": {"rope_theta": 5e5}},
        {"rope_theta": 500000, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None},
        {
            "rope_theta": None,
            "rope_parameters": {"rope_theta": 5e5, "type": "default", "factor": None},
        },
    ],
)
def test_the_base_of_positions_may_stand_in_three_places(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert read(tmp_path, **changes).rope_theta == 5e5


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1}},
        {
            "rope_parameters": {
                "rope_type": "linear",
                "type": "linear",
                "factor": 1.0,
                "rope_theta": 1e4,
            }
        },
        {"rope_scaling": {"factor": 1.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 1.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        {"hidden_act": "swish"},
        {"head_dim": 4},
        {"head_dim": None},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 1.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"attention_bias": False, "mlp_bias": False},
        {"sliding_window": None},
        {"sliding_window": 4096},
        {"use_sliding_window": False},
        {"num_experts": 0},
        {"num_local_experts": 1},
        {"attention_multiplier": 0.5},
        {"embedding_multiplier": 1.0, "residual_multiplier": 1, "logits_scaling": 1.0},
        {"query_pre_attn_scalar": 4},
        {"layer_types": ["full_attention"] * 2},
        {"final_logit_softcapping": None, "attn_logit_softcapping": None},
        {
            "attention_dropout": 0.1,
            "hidden_dropout_prob": 0.1,
            "initializer_range": 0.1,
            "pretraining_tp": 8,
        },
        {"torch_dtype": "float16", "dtype": "bfloat16"},
        {"_anything": {"a": 1}},
        {"max_sequence_length": 4096},
        {
            "pad_token_id": -1,
            "num_key_value_heads": None,
            "eos_token_id": None,
        },
        {
            "num_labels": 2,
            "id2label": {"0": "a", "1": "b"},
            "auto_map": {"AutoModel": "x.Y"},
            "unsloth_version": "2025.1",
        },
    ],
)
def test_what_changes_nothing_is_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert read(tmp_path, **changes) == SHAPE
    assert list_remarks(tmp_path, SHAPE) == ()


SCALED: list[tuple[dict[str, Any], RopeScaling]] = [
    ({"type": "linear", "factor": 4}, RopeScaling("linear", 4.0)),
    ({"rope_type": "dynamic", "factor": 2.0}, RopeScaling("dynamic", 2.0, 2048)),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        RopeScaling("llama3", 8.0, 8192),
    ),
    ({"rope_type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, 2048)),
    (
        {"rope_type": "yarn", "original_max_position_embeddings": 512, "beta_fast": 0},
        RopeScaling("yarn", 4.0, 512),
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        RopeScaling("yarn", 4.0, 2048, attention_factor=1.0),
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "attention_factor": 1.1},
        RopeScaling("yarn", 4.0, 2048, attention_factor=1.1),
    ),
    (
        {"rope_type": "yarn", "factor": 2.0, "truncate": False, "finetuned": True},
        RopeScaling("yarn", 2.0, 2048, truncate=False),
    ),
]


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("section", "scaling"), SCALED)
def test_scaled_positions_are_read_under_either_key_and_written_under_both(
    tmp_path: Path, key: str, section: dict[str, Any], scaling: RopeScaling
) -> None:
    found = read(tmp_path, **{key: section})
    context = 4096 if scaling.rope_type == "dynamic" else 2048
    assert found == replace(SHAPE, rope_scaling=scaling, max_position_embeddings=context)

    values = make_config_json(found)
    parameters = values["rope_scaling"] | {"rope_theta": 10000.0}
    assert values["rope_parameters"] == parameters
    assert values["max_position_embeddings"] == 2048
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path) == (found, False)
    assert list_remarks(tmp_path, found) == ()


def test_the_context_of_pretraining_may_stand_outside(tmp_path: Path) -> None:
    section = {"rope_type": "yarn", "factor": 4.0}
    found = read(tmp_path, rope_scaling=section, original_max_position_embeddings=512)
    assert found.rope_scaling == RopeScaling("yarn", 4.0, 512)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_dim": 8}, {"head_dim": 8}),
        ({"bos_token_id": None}, {"bos_token_id": None}),
        (
            {"attention_bias": True},
            {"attention_bias": True, "attention_output_bias": True},
        ),
        (
            {"model_type": "mistral", "sliding_window": 131072, "num_key_value_heads": 2},
            {"num_key_value_heads": 2, "max_position_embeddings": 131072},
        ),
        (
            {
                "model_type": "mistral",
                "sliding_window": 4096,
                "num_key_value_heads": None,
                "max_position_embeddings": 4096,
                "architectures": ["MistralForCausalLM"],
            },
            {"max_position_embeddings": 4096},
        ),
        (
            {
                "model_type": "qwen2",
                "num_key_value_heads": 2,
                "max_window_layers": 1,
                "sliding_window": 64,
                "use_sliding_window": False,
                "architectures": ["Qwen2ForCausalLM"],
            },
            {
                "num_key_value_heads": 2,
                "max_position_embeddings": 32768,
                "attention_bias": True,
                "bos_token_id": None,
            },
        ),
    ],
)
def test_relatives_are_read_and_written(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = read(tmp_path, **changes)
    assert found == replace(SHAPE, **expected)
    assert list_remarks(tmp_path, found) == ()
    (tmp_path / "config.json").write_text(json.dumps(make_config_json(found, scorer=True)))
    assert read_config(tmp_path) == (found, True)


def test_the_config_of_a_plain_shape_is_what_it_was_to_the_byte() -> None:
    """The fingerprints of finished runs hold it."""
    shape = LlamaConfig(40, 16, 24, 2, 4, 2, 99, 1e-5, 5e5, True, 3, (2, 5))
    content = json.dumps(make_config_json(shape, scorer=True), indent=2).encode()
    digest = "6985dbb34fbde006697fd2866c698da7f62299b670ed1af8077294664d3a5fa3"
    assert hashlib.sha256(content).hexdigest() == digest


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        r"rope_theta is 10000\.0 and rope_parameters\.rope_theta is 1000000\.0",
    ),
    (
        {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_theta": 1e6}},
        r"rope_parameters\.rope_theta is 10000\.0 and rope_scaling\.rope_theta is 1000000\.0",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "type": "linear", "factor": 4.0}},
        r"rope_parameters\.rope_type is 'default' and rope_parameters\.type is 'linear'",
    ),
    ({"rope_scaling": {"rope_type": "linear"}}, r"the key 'rope_scaling\.factor' is missing"),
    ({"rope_parameters": {"type": "dynamic"}}, r"the key 'rope_parameters\.factor' is missing"),
    (
        {"rope_scaling": {"factor": 4.0}},
        r"rope_scaling\.factor is 4\.0, which the rope type 'default' does not have",
    ),
    (
        {
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        },
        r"rope_parameters\.factor is 2\.0 and rope_scaling\.factor is 4\.0",
    ),
    (
        {
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        r"rope_parameters\.rope_type is 'default' and rope_scaling\.rope_type is 'linear'",
    ),
    (
        {
            "rope_scaling": {
                "rope_type": "dynamic",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
            }
        },
        r"original_max_position_embeddings is 64 and max_position_embeddings is 2048",
    ),
    (
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
            },
            "original_max_position_embeddings": 128,
        },
        r"embeddings is 64 and original_max_position_embeddings is 128",
    ),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": "4"}},
        r"rope_scaling\.factor is '4'; a number was expected",
    ),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, r"factor of .*'linear' is 0\.5"),
    ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, r"factor is inf"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 0.5}},
        r"low_freq_factor 1 is not less than high_freq_factor 0\.5",
    ),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 0.5}},
        r"beta_slow 1 is more than beta_fast 0\.5",
    ),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "mscale": "1"}},
        r"rope_scaling\.mscale is '1'; a number is expected",
    ),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": -1.0}},
        r"attention_factor of the rope type 'yarn' is -1\.0",
    ),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "attention_factor": 1.5}},
        r"rope_scaling\.attention_factor is 1\.5, which the rope type 'llama3' does not have",
    ),
    (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2},
        r"head_dim is 2; the rope type 'dynamic' needs at least 4",
    ),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1.0},
        r"rope_theta is 1; the rope type 'yarn' needs a larger one",
    ),
    *(
        (
            {"rope_scaling": {"rope_type": kind, "factor": 4.0, "long_factor": [1.0, 1.0]}},
            rf"rope_scaling\.rope_type is '{kind}', which is not known",
        )
        for kind in ("longrope", "su", "proportional", "mrope", "ntk")
    ),
    ({"rope_scaling": {"type": ["linear"], "factor": 4.0}}, r"rope_scaling\.type is \['linear'\]"),
    ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, r"rope_scaling\.factor is 4\.0"),
    (
        {"rope_scaling": {"rope_type": "swirl", "factor": 1.0}},
        r"rope_scaling\.rope_type is 'swirl'",
    ),
    (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        r"rope_parameters\.partial_rotary_factor is 0\.5",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        r"rope_parameters\.full_attention is",
    ),
    ({"rope_theta": "10000"}, "rope_theta is '10000'; a number was expected"),
    ({"rms_norm_eps": None}, "the key 'rms_norm_eps' is missing"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
    ({"head_dim": 7}, "head_dim is 7, an odd number"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"head_dim": "8"}, "head_dim is '8'; a whole number was expected"),
    ({"hidden_size": 18, "head_dim": 4}, "hidden_size 18 does not divide into 4 heads"),
    ({"attention_bias": "yes"}, "attention_bias is 'yes'; true or false is expected"),
    ({"mlp_bias": True}, "mlp_bias is True, Llama 2 has False"),
    ({"model_type": "mistral", "num_key_value_heads": 2}, "sliding_window is 4096"),
    (
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 1024},
        "sliding_window is 1024",
    ),
    (
        {"model_type": "mistral", "sliding_window": None, "attention_bias": True},
        "attention_bias is True, a Mistral has False",
    ),
    (
        {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True},
        "use_sliding_window is True",
    ),
    ({"model_type": "qwen3", "head_dim": 4}, "model_type is 'qwen3', not 'llama'"),
    (
        {
            "model_type": "mistral",
            "num_key_value_heads": 4,
            "sliding_window": None,
            "architectures": ["LlamaForCausalLM"],
        },
        "architectures is",
    ),
    ({"sliding_window": 256}, "sliding_window is 256"),
    ({"attention_multiplier": 0.0078125}, r"attention_multiplier is 0\.0078125, Llama 2 has 0\.5"),
    ({"embedding_multiplier": 12.0}, r"embedding_multiplier is 12\.0"),
    ({"residual_multiplier": 0.22}, r"residual_multiplier is 0\.22"),
    ({"logits_scaling": 8.0}, r"logits_scaling is 8\.0"),
    ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256"),
    ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0"),
    ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0"),
    ({"num_experts": 8}, "num_experts is 8"),
    ({"is_causal": False}, "is_causal is False"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    ({"qk_layernorm": True}, "qk_layernorm is True, a key that Llama 2 does not have"),
    ({"use_qk_norm": True}, "use_qk_norm is True"),
    ({"no_rope_layers": [1, 0]}, "no_rope_layers is"),
    ({"scale_depth": 1.4}, r"scale_depth is 1\.4"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "quantization is"),
    ({"alibi": True}, "alibi is True"),
    ({"norm_eps": 1e-5}, r"norm_eps is 1e-05, Llama 2 has 1e-06"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    REFUSED,
    ids=[next(iter(each)) + str(place) for place, (each, _) in enumerate(REFUSED)],
)
def test_what_contradicts_or_changes_the_outputs_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path, **changes)

    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert raised.value.cure
    assert "\n" not in str(raised.value)


def test_what_nobody_knows_and_no_network_is_called_is_said(tmp_path: Path) -> None:
    found = read(tmp_path, my_note="from Bob", run_id=7, empty="", off=False)
    assert list_remarks(tmp_path, found) == (
        f"{tmp_path / 'config.json'}: unknown and left out: my_note, run_id",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"rope_theta": value}, "rope_theta is")
            for value in (0, -1, 1e-320, 0.5, float("inf"), 1e300, 10**400)
        ),
        *(
            ({"rms_norm_eps": value}, "rms_norm_eps is")
            for value in (0, -1, 1e-320, 2.0, float("inf"), 10**400)
        ),
        *(({"bos_token_id": value}, "bos_token_id is") for value in (-5, 40, 10**9)),
        *(
            ({"eos_token_id": value}, "eos_token_id is")
            for value in (-5, 40, 10**9, [2, 40], [], [2, "x"], True, 2.0)
        ),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings is"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ],
)
def test_numbers_outside_of_their_range_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path, **changes)

    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_the_edges_of_the_ranges_are_inside(tmp_path: Path) -> None:
    """A base of 2.8e9 is that of a published model with a context of a million."""
    found = read(
        tmp_path, rope_theta=2804339835.0, rms_norm_eps=1e-12, bos_token_id=0, eos_token_id=39
    )
    assert (found.rope_theta, found.rms_norm_eps, found.bos_token_id, found.stops) == (
        2804339835.0,
        1e-12,
        0,
        (39,),
    )


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        (2, None, (2,)),
        (7, None, (7,)),
        ([2, 5], None, (2, 5)),
        ([5, 2, 5], None, (5, 2)),
        ([2, 5], 2, (2, 5)),
        (2, [2, 5, 7], (2, 5, 7)),
        (7, 2, (7, 2)),
        (None, [5], (5,)),
    ],
)
def test_every_id_that_either_file_names_ends_an_answer(
    tmp_path: Path, config: Any, generation: Any, stops: tuple[int, ...]
) -> None:
    found = read(
        tmp_path, None if generation is None else {"eos_token_id": generation}, eos_token_id=config
    )
    assert found.stops == stops
    assert found.eos_token_id == (stops[0] if len(stops) == 1 else stops)


def test_an_end_outside_of_the_vocabulary_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"generation_config\.json: eos_token_id is 40; .* below vocab_size 40"
    ):
        read(tmp_path, {"eos_token_id": [2, 40]})


@pytest.mark.parametrize("ends", [2, 7, (2, 5), (7, 2)])
def test_what_is_written_is_read_alike(tmp_path: Path, ends: Any) -> None:
    shape = LlamaConfig(40, 16, 24, 2, 4, 2, 99, 1e-5, 5e5, True, 3, ends)
    values = make_config_json(shape)
    assert values["eos_token_id"] == make_generation_json(shape)["eos_token_id"] == ends
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path) == (shape, False)
    assert list_remarks(tmp_path, shape) == ()


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "rope_theta",
        "rope_scaling",
        "architectures",
        "hidden_act",
        "eos_token_id",
        "layer_types",
        "model_type",
    ],
)
def test_of_a_long_value_the_beginning_is_shown(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=key) as error:
        read(tmp_path, **{key: ["no such value"] * 5000})

    assert "[" in str(error.value)
    assert len(str(error.value)) < len(str(tmp_path)) + 400
