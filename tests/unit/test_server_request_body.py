"""Bodies are counted before they are parsed, and checked up to their first fault."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llama2.serve import request_body
from llama2.serve.errors import ApiError
from llama2.serve.schema import ChatRequest, CompletionRequest, ScoreRequest

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
WRONG = {"role": "x", "content": 1}
TEXT = {"type": "text", "text": "a"}
QUIET = "[{:," * 300_000 + "\\" * 7 + '"' + "\\n" * 70_000


def encoded(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def refused(content: bytes, kind: type[Any] = ChatRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        request_body.parse_request(content, kind)

    assert caught.value.status == 400
    assert len(caught.value.message) < 300
    return caught.value


@pytest.mark.parametrize(
    "content",
    [
        encoded(messages=[WRONG] * 100_001),
        encoded(messages=[{}] * 80_001),
        encoded(**{f"k{key}": 1 for key in range(200_000)}),
        encoded(prompt=[1] * 1_000_000),
        encoded(logit_bias={str(token): 1 for token in range(250_000)}),
        b"[" * 3_900_000,
        b'{"a":' * 700_000,
        b'"' * 3_900_000,
        b"," * 3_900_000,
        b'{"a":"\\\\"' + b",1" * 300_000,
    ],
)
def test_what_is_too_much_is_never_parsed(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "_parse_json", None)
    assert "the body has more than" in refused(content).message


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_what_stands_in_a_string_does_not_count(shift: int) -> None:
    """Wherever the pieces end, also between a backslash and what it is for."""
    content = b" " * shift + encoded(prompt=QUIET)
    assert len(content) > 10 * request_body._PIECE
    assert request_body.parse_request(content, CompletionRequest).prompt == QUIET


def test_counts_are_those_of_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.dumps({"a": ["x, y", "[{:", '"', "\\"], "b": {"c": [1, 2, 3]}}).encode()
    for name, count in (("TEXTS", 7), ("GROUPS", 7), ("VALUES", 6)):
        monkeypatch.setattr(request_body, f"MOST_{name}", count)

    request_body.check_counts(content)
    for name, count in (("TEXTS", 7), ("GROUPS", 7), ("VALUES", 6)):
        monkeypatch.setattr(request_body, f"MOST_{name}", count - 1)
        with pytest.raises(ApiError, match=f"more than {count - 1} "):
            request_body.check_counts(content)

        monkeypatch.setattr(request_body, f"MOST_{name}", count)


def test_errors_are_not_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a list with thousands of faults the first is enough."""
    seen: list[int] = []
    explained = request_body.explain

    def counting(details: Any, *more: Any) -> tuple[str, str | None]:
        seen.append(len(details))
        return explained(details, *more)

    monkeypatch.setattr(request_body, "explain", counting)
    for kind, fields in (
        (ChatRequest, {"messages": [WRONG] * 4096}),
        (ScoreRequest, {"messages": [WRONG] * 4096}),
        (CompletionRequest, {"prompt": ["a"] * 100 + [1] * 100}),
        (CompletionRequest, {"prompt": [[1] * 100 + ["x"] * 100] * 128}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 100_000}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": ["x"] * 30_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text"}] * 5000}]}),
    ):
        refused(encoded(**fields), kind)

    assert len(seen) == 7
    assert max(seen) < 20


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({f"k{key}": 1 for key in range(13_000)}, None, "the body: an object of 13000 keys"),
        (
            {"messages": [{**USER, **{f"k{key}": 1 for key in range(200)}}]},
            "messages.0",
            "an object of 202 keys",
        ),
        ({"messages": [USER], "k" * 100_000: 1}, None, "unknown parameter 'kkk"),
        ({"messages": [{}] * 4097}, "messages", "4097 messages"),
        (
            {"messages": [USER], "logit_bias": {str(token): "x" for token in range(1025)}},
            "logit_bias",
            "1025 tokens",
        ),
    ],
)
def test_what_has_no_sense_is_named(fields: dict[str, Any], param: str | None, words: str) -> None:
    error = refused(encoded(**fields))
    assert error.param == param
    assert words in error.message


def test_what_is_large_for_a_reason_is_taken() -> None:
    assert (
        len(
            request_body.parse_request(
                encoded(messages=[*[USER, ANSWER] * 2047, USER]), ChatRequest
            ).messages
        )
        == 4095
    )
    ids = [[7] * 4096] * 63
    assert request_body.parse_request(encoded(prompt=ids), CompletionRequest).prompt == ids
    schema = {"properties": {f"k{key}": {"enum": [key]} for key in range(3000)}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = request_body.parse_request(encoded(messages=[USER], response_format=form), ChatRequest)
    assert asked.response_format.json_schema.schema_ == schema  # type: ignore[union-attr]


def test_marks_at_the_beginning_and_halves_of_characters() -> None:
    assert (
        request_body.parse_request(b"\xef\xbb\xbf" + encoded(messages=[USER]), ChatRequest)
        .messages[0]
        .content
        == "a"
    )
    error = refused(b'{"messages": [{"role": "user", "content": "\\ud800"}]}')
    assert (error.param, "half of a surrogate pair" in error.message) == (
        "messages.0.content",
        True,
    )
    assert "byte 2" in refused(b'"\xff"').message
    assert "not valid JSON" in refused(b"[" * 3000).message
    assert "not valid JSON" in refused(b'{"seed": ' + b"9" * 100_000 + b"}").message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [USER], "user": 5}, "user"),
        ({"messages": [USER], "metadata": "x"}, "metadata"),
        ({"messages": [USER], "min_tokens": 3}, "min_tokens"),
        ({"messages": [{**USER, "name": 5}]}, "messages.0.name"),
        ({"messages": [{**USER, "tool_calls": [1]}]}, "messages.0.tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{**TEXT, "annotations": [1]}]}]},
            "messages.0.content.0.annotations",
        ),
    ],
)
def test_a_field_without_effect_is_named_with_its_object(
    fields: dict[str, Any], param: str
) -> None:
    error = refused(encoded(**fields))
    assert error.param == param
    assert error.message.startswith(f"{param}: ")


def test_the_schema_lists_fields_without_effect() -> None:
    properties = ChatRequest.model_json_schema()["properties"]
    assert properties["user"]["type"] == ["string", "null"]
    assert properties["min_tokens"] == {"enum": [None, 0]}
    assert "suffix" not in properties
    assert "suffix" in CompletionRequest.model_json_schema()["properties"]
