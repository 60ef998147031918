"""Long work is done beside the event loop, gives what it would give there, and is refused where it
cannot end well."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import Served, serving

from llama2.serve import offload, routes
from llama2.tokenizer.tokenizer import Tokenizer

ASK = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def served(policy: Path) -> Iterator[Served]:
    with serving(policy, slots=4) as running:
        yield running


ASKED: list[tuple[str, dict[str, Any]]] = [
    (
        "chat/completions",
        {"messages": ASK, "max_tokens": 12, "n": 2, "logprobs": True, "top_logprobs": 3},
    ),
    ("chat/completions", {"messages": ASK, "max_tokens": 12, "stream": True}),
    (
        "completions",
        {"prompt": ["Gr\u00fc\u00dfe", "\u4f60"], "max_tokens": 5, "echo": True, "logprobs": 4},
    ),
    (
        "completions",
        {
            "prompt": [[1, 300, 301], [1]],
            "max_tokens": 5,
            "echo": True,
            "logprobs": 0,
            "stream": True,
        },
    ),
    ("completions", {"prompt": "a", "max_tokens": 0, "echo": True, "logprobs": 2}),
    ("chat/completions", {"messages": [{"role": "x", "content": "a"}]}),
]


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_answers_are_the_same_beside_the_loop(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    said = []
    for page, tokens in ((10**9, 256), (-1, 2)):
        monkeypatch.setattr(offload, "PAGE", page)
        monkeypatch.setattr(routes, "MOST_TOKENS", tokens)
        answer = served.post(path, **body, seed=3)
        assert answer.headers["content-type"] in (
            "application/json",
            "text/event-stream; charset=utf-8",
        )
        said.append((answer.status_code, _said(answer)))

    assert said[0] == said[1]


def _said(answer: httpx.Response) -> Any:
    """What two calls have in common: of a stream, the text and the tokens of each choice, and how
    it ended."""
    if answer.headers["content-type"] == "application/json":
        return answer.json().get("choices", answer.json())

    texts: dict[int, list[tuple[str, list[Any], str]]] = {}
    for event in answer.text.split("\n\n")[:-2]:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            tokens = list(zip(*(choice.get("logprobs") or {}).values()))
            texts.setdefault(choice["index"], []).append(
                (text, tokens, choice["finish_reason"] or "")
            )

    return {
        index: [
            "".join(text for text, _, _ in parts),
            [token for _, tokens, _ in parts for token in tokens],
            parts[-1][2],
        ]
        for index, parts in texts.items()
    }


def test_long_work_runs_in_a_thread_of_its_own(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, str] = {}
    for module, name in (
        (routes, "encode_prompt"),
        (routes, "_encode"),
        (routes, "_decode"),
        (routes, "_render"),
        (routes, "Generation"),
    ):
        work = getattr(module, name)

        def watched(*arguments: Any, work: Any = work, name: str = name, **named: Any) -> Any:
            names[name] = threading.current_thread().name
            return work(*arguments, **named)

        monkeypatch.setattr(module, name, watched)

    monkeypatch.setattr(offload, "PAGE", -1)
    served.post("chat/completions", messages=ASK, max_tokens=2)
    served.post("completions", prompt="a", max_tokens=2, echo=True)
    assert len(names) == 5
    assert all(name.startswith("offload") for name in names.values())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a" * 3_900_000}]},
            "messages",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "word " * 20_000}]},
            "messages",
        ),
        ("completions", {"prompt": "\u00e9" * 100_000}, "prompt"),
        ("completions", {"prompt": ["a", "a b" * 100_000]}, "prompt"),
    ],
)
def test_a_text_that_cannot_fit_is_never_encoded(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    monkeypatch.setattr(Tokenizer, "encode_many", None)
    answer = served.post(path, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert (
        "more than leave room for an answer in the context of 256; shorten it" in error["message"]
    )


def test_the_longest_text_that_may_fit_is_encoded(served: Served) -> None:
    """So many characters that every token must be of the longest; the tokens are counted and
    told."""
    model = next(iter(served.models.values()))
    answer = served.post("completions", prompt="a" * model.context * model.longest_token)
    assert " tokens, " in answer.json()["error"]["message"]
    tokenizer = model.tokenizer
    assert model.longest_token == max(
        len(tokenizer.bytes_of(token).decode(errors="replace"))
        for token in range(tokenizer.vocab_size)
    )


def test_parts_of_a_long_text_are_those_of_the_whole(tokenizer: Tokenizer) -> None:
    for text in ("red green blue " * 3000, "a" * 30_000, "\u00e9 word" * 5000, ""):
        assert tokenizer.encode(text) == tokenizer.encode_many([text])[0]
