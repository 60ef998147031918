"""Settings of a file as a configuration: values of every type, and the names that errors use."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llama2.errors import UserError
from llama2.formats.settings import build_config, changes_nothing, covers_context
from llama2.model.llama import LlamaConfig

VALUES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_absent_values_are_those_of_the_paper() -> None:
    assert build_config("file", VALUES) == LlamaConfig(**VALUES)


def test_a_whole_number_is_a_number() -> None:
    config = build_config("file", VALUES | {"rope_theta": 500000})
    assert config.rope_theta == 500000.0
    assert isinstance(config.rope_theta, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "16"}, "file: dim is '16'; a whole number was expected"),
        ({"hidden_size": True}, "file: dim is True; a whole number was expected"),
        ({"hidden_size": 16.0}, r"file: dim is 16\.0; a whole number was expected"),
        ({"hidden_size": None}, "file: the key 'dim' is missing; did you mean 'Dim'"),
        ({"rope_theta": "1"}, "file: rope_theta is '1'; a number was expected"),
        ({"rms_norm_eps": math.nan}, "file: rms_norm_eps is nan; a finite number was expected"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; true or false was expected"),
        ({"eos_token_id": (2, "x")}, "eos_token_id is"),
        ({"num_attention_heads": 3}, "file: hidden_size 16 does not divide into 3 heads"),
    ],
)
def test_faults_have_the_file_and_its_own_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config("file", VALUES | change, {"hidden_size": "dim"}, {"Dim": 16})


def test_settings_that_change_nothing() -> None:
    assert changes_nothing(1.0000001, [1])
    assert changes_nothing("none", ["none", "linear"])
    assert not changes_nothing(1.001, [1])
    assert not changes_nothing(True, [1])
    assert not changes_nothing(1, [True])
    assert not changes_nothing(None, [1])


def test_a_window_as_long_as_the_context_limits_nothing() -> None:
    config = LlamaConfig(**VALUES, max_position_embeddings=512)
    assert covers_context(512, config)
    assert not covers_context(511, config)
    assert not covers_context(True, config)
    assert not covers_context("512", config)
