"""What lies beside weights: ids that end answers, and chat templates, wherever others put them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama2.errors import UserError
from llama2.tokenizer import chat_settings


def put(directory: Path, name: str, values: Any) -> None:
    (directory / name).write_text(values if isinstance(values, str) else json.dumps(values))


def test_nothing_beside_says_nothing(tmp_path: Path) -> None:
    assert chat_settings.read_stop_ids(tmp_path) == ()
    assert chat_settings.read_chat_template(tmp_path) is None


def test_ends_are_those_of_both_files(tmp_path: Path) -> None:
    put(tmp_path, "config.json", {"eos_token_id": 128001})
    put(tmp_path, "generation_config.json", {"eos_token_id": [128001, 128008, 128009]})
    assert chat_settings.read_stop_ids(tmp_path) == (128001, 128008, 128009)


@pytest.mark.parametrize(
    "text",
    ["[1]", "{", '{"eos_token_id": "2"}', '{"eos_token_id": []}', '{"eos_token_id": [null]}'],
)
def test_damage_is_one_line_with_the_file(tmp_path: Path, text: str) -> None:
    put(tmp_path, "generation_config.json", text)
    with pytest.raises(UserError, match=r"generation_config\.json:") as raised:
        chat_settings.read_stop_ids(tmp_path)

    assert "\n" not in str(raised.value)
    assert raised.value.cure


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, None),
        ({"chat_template": None}, None),
        ({"chat_template": ""}, None),
        ({"chat_template": "a"}, "a"),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "t"},
                    {"name": "default", "template": "d"},
                ]
            },
            "d",
        ),
        ({"chat_template": [{"name": "rag", "template": "r"}]}, "r"),
    ],
)
def test_a_template_of_the_settings(tmp_path: Path, settings: Any, found: str | None) -> None:
    put(tmp_path, "tokenizer_config.json", settings)
    assert chat_settings.read_chat_template(tmp_path) == found


def test_a_file_of_its_own_goes_first(tmp_path: Path) -> None:
    put(tmp_path, "tokenizer_config.json", {"chat_template": "a"})
    put(tmp_path, "chat_template.jinja", "b")
    assert chat_settings.read_chat_template(tmp_path) == "b"


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "tokenizer_config.json", {"chat_template": 7})
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json: chat_template is '7'; a text was expected"
    ):
        chat_settings.read_chat_template(tmp_path)


END = {"content": "<|im_end|>", "special": True}


@pytest.mark.parametrize(
    ("settings", "added", "stops"),
    [
        (
            {
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": {"2": {"content": "</s>"}, "1024": END},
            },
            {},
            (2, 1024),
        ),
        ({"eos_token": END}, {"<|im_end|>": 1024, "<|im_start|>": 1025}, (2, 1024)),
        ({"eos_token": "</s>"}, {"<|im_end|>": 1024}, (2,)),
        ({"eos_token": "</s>"}, {"</s>": 2}, (2,)),
        ({"eos_token": None}, {"<|im_end|>": 1024}, (2,)),
        ({"eos_token": "<|im_end|>"}, {"<|im_end|>": "x"}, (2,)),
        ({"eos_token": "<|im_end|>"}, {"<|im_end|>": 5000}, (2,)),
        ({"eos_token": ["a"]}, {}, (2,)),
    ],
)
def test_an_added_item_that_is_the_tokenizers_eos_ends_answers_too(
    tmp_path: Path, settings: Any, added: Any, stops: tuple[int, ...]
) -> None:
    put(tmp_path, "config.json", {"eos_token_id": 2})
    put(tmp_path, "tokenizer_config.json", settings)
    put(tmp_path, "added_tokens.json", added)
    assert chat_settings.read_stop_ids(tmp_path, 1026) == stops


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        (
            {
                "tokenizer.json": {
                    "added_tokens": [
                        {"id": 2, "content": "</s>"},
                        {"id": 1024, "content": "<|im_end|>"},
                    ]
                }
            },
            (2, 1024),
        ),
        ({"tokenizer.json": {"added_tokens": [{"id": 2, "content": "</s>"}]}}, (2,)),
        ({"tokenizer.json": {"added_tokens": {"<|im_end|>": 1024}}}, (2,)),
        (
            {
                "tokenizer_config.json": {},
                "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}},
                "added_tokens.json": {"<|im_end|>": 1024},
            },
            (2, 1024),
        ),
    ],
)
def test_the_end_of_a_tokenizer_may_stand_in_any_of_its_files(
    tmp_path: Path, files: dict[str, Any], stops: tuple[int, ...]
) -> None:
    put(tmp_path, "config.json", {"eos_token_id": 2})
    for name, values in {"tokenizer_config.json": {"eos_token": "<|im_end|>"}, **files}.items():
        put(tmp_path, name, values)

    assert chat_settings.read_stop_ids(tmp_path, 1026) == stops
