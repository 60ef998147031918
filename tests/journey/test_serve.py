"""A server as its users meet it: OpenAI's client, streams, mistakes, crowds, and the end of its
process."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from servers import serving

from llama2.generate.sampling import Sampling
from llama2.records import Message
from llama2.tokenizer.template import encode_prompt

ASK = [{"role": "user", "content": "Name a colour."}]
LONG = {"2": -100}  # no end before the limit


@pytest.fixture(scope="module")
def served(policy, scorers):
    with serving(policy, scorers[1], slots=4, limits={"waiting": 8}) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    with served.client() as client:
        yield client


def test_a_chat(client):
    answer = client.chat.completions.create(
        model="policy", messages=ASK, temperature=0, max_tokens=20
    )
    choice = answer.choices[0]
    assert (answer.object, answer.model, choice.message.role) == (
        "chat.completion",
        "policy",
        "assistant",
    )
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert choice.logprobs is None


def test_a_stream_says_the_same(client):
    asked = {
        "model": "policy",
        "messages": ASK,
        "seed": 3,
        "max_tokens": 40,
        "n": 3,
        "logit_bias": LONG,
    }
    whole = client.chat.completions.create(**asked)
    texts, finishes, usage, roles = [""] * 3, [None] * 3, None, []

    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            roles += [choice.delta.role] if choice.delta.role else []

        usage = chunk.usage or usage

    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) > 1
    assert roles == ["assistant"] * 3
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens > 0  # the first call read this prompt


def test_a_stop_string_ends_the_answer_before_it(client):
    asked = {"model": "policy", "messages": ASK, "seed": 3, "max_tokens": 40, "logit_bias": LONG}
    text = client.chat.completions.create(**asked).choices[0].message.content
    stop = text[5:9]
    cut = client.chat.completions.create(**asked, stop=[stop, "never said"])
    assert cut.choices[0].message.content == text[: text.index(stop)].strip()
    assert cut.choices[0].finish_reason == "stop"
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**asked, stop=stop, stream=True)
    ]
    assert "".join(parts) == cut.choices[0].message.content


def test_logprobs(client):
    asked = {
        "model": "policy",
        "messages": ASK,
        "temperature": 0,
        "max_tokens": 12,
        "logit_bias": LONG,
    }
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    said = b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace")
    assert said.strip() == answer.choices[0].message.content

    for token in tokens:
        assert len(token.top_logprobs) == 3
        others = {other.token: other.logprob for other in token.top_logprobs}
        assert token.logprob == pytest.approx(others.get(token.token, token.logprob), abs=1e-4)
        assert token.logprob <= max(others.values()) + 1e-4

    streamed = [
        token
        for chunk in client.chat.completions.create(**asked, logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_completions(client):
    answer = client.completions.create(
        model="policy", prompt=["The cat", "The dog"], max_tokens=5, n=2, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.object == "text_completion"
    echoed = client.completions.create(
        model="policy", prompt=["The cat", "The dog"], max_tokens=5, n=2, seed=1, echo=True
    )
    assert [choice.text for choice in echoed.choices] == [
        prompt + choice.text
        for prompt, choice in zip(("The cat",) * 2 + ("The dog",) * 2, answer.choices)
    ]
    again = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(
            model="policy", prompt="The cat", max_tokens=5, seed=1, echo=True, stream=True
        )
    )
    assert again == echoed.choices[0].text


def test_the_likelihood_of_a_text(client, served):
    tokenizer = next(iter(served.models.values())).tokenizer
    ids = [tokenizer.bos, *tokenizer.encode("The cat sees the dog")]
    answer = client.completions.create(
        model="policy", prompt=ids, max_tokens=0, echo=True, logprobs=2
    )
    found = answer.choices[0].logprobs
    assert answer.choices[0].text == "The cat sees the dog"
    assert found.token_logprobs[0] is None
    assert all(value < 0 for value in found.token_logprobs[1:])
    assert len(found.tokens) == len(found.text_offset) == len(ids)
    assert answer.usage.completion_tokens == 0
    drawn = (
        client.completions.create(
            model="policy", prompt=ids[:3], max_tokens=1, seed=4, logit_bias=LONG, logprobs=0
        )
        .choices[0]
        .logprobs
    )
    again = (
        client.completions.create(
            model="policy", prompt="The cat sees the dog", max_tokens=3, echo=True, logprobs=0
        )
        .choices[0]
        .logprobs
    )
    assert again.token_logprobs[: len(ids)] == pytest.approx(found.token_logprobs, abs=1e-4)
    assert drawn.text_offset == [again.text_offset[3]]  # as if the prompt had been there


SHAPE = {
    "type": "object",
    "properties": {"mood": {"enum": ["glad", "sad"]}},
    "required": ["mood"],
    "additionalProperties": False,
}


def test_a_schema_guides_every_sample(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SHAPE}}
    asked = {"model": "policy", "n": 3, "seed": 1, "max_tokens": 60}
    answer = client.chat.completions.create(**asked, messages=ASK, response_format=form)
    said = [choice.message.content for choice in answer.choices]
    more = client.completions.create(
        **asked, prompt="The cat says", extra_body={"response_format": form}
    )

    for text in (*said, *(choice.text for choice in more.choices)):
        assert json.loads(text)["mood"] in ("glad", "sad")

    assert {choice.finish_reason for choice in (*answer.choices, *more.choices)} == {"stop"}
    alone = client.chat.completions.create(
        **asked, messages=ASK, response_format={"type": "json_object"}
    )
    assert all(choice.message.content.startswith("{") for choice in alone.choices)


def test_the_end_is_reported_with_the_ids_it_is_one_of(client, served):
    model = next(iter(served.models.values()))
    prompt = encode_prompt(model.tokenizer, (Message("user", "Name a colour."),))
    asked = {"model": "policy", "prompt": prompt, "temperature": 0, "max_tokens": 60, "logprobs": 1}
    plain = client.completions.create(**asked).choices[0]
    assert plain.finish_reason == "stop"

    for more in ({}, {"stop_token_ids": [model.tokenizer.encode(".")[-1]]}, {"ignore_eos": True}):
        found = client.completions.create(
            **asked, extra_body={"return_token_ids": True, **more}
        ).choices[0]
        stop = (*(() if "ignore_eos" in more else (2,)), *more.get("stop_token_ids", ()))
        ((its,),) = model.engine.generate(
            [prompt], Sampling(temperature=0, max_tokens=60, stop=stop)
        )
        assert (tuple(found.token_ids), found.finish_reason) == (its.tokens, its.finish)
        assert found.logprobs.token_logprobs == pytest.approx(its.logprobs, abs=1e-4)
        assert len(found.logprobs.tokens) == len(found.logprobs.text_offset) == len(its.tokens)
        chunks = list(
            client.completions.create(
                **asked, extra_body={"return_token_ids": True, **more}, stream=True
            )
        )
        parts = [chunk.choices[0] for chunk in chunks]
        assert tuple(token for part in parts for token in part.token_ids) == its.tokens
        assert "".join(part.text for part in parts) == found.text
        assert [
            value for part in parts if part.logprobs for value in part.logprobs.token_logprobs
        ] == pytest.approx(its.logprobs, abs=1e-4)

        if not more:
            assert (plain.text, plain.logprobs) == (found.text, found.logprobs)
            assert found.logprobs.tokens[-1] == "</s>"
            assert parts[-1].token_ids == [2]


def test_scores(served, scorers):
    body = served.post("score", messages=[*ASK, {"role": "assistant", "content": "Blue."}]).json()
    assert body["model"] == "safe"
    assert 0 < body["probability"] < 1
    assert (body["score"] > 0) == (body["probability"] > 0.5)


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        (
            "chat/completions",
            {"messages": ASK, "model": "polcy"},
            404,
            "model",
            "did you mean 'policy'",
        ),
        ("chat/completions", {"messages": ASK, "model": "safe"}, 400, "model", "use /v1/score"),
        (
            "chat/completions",
            {"messages": ASK, "temprature": 1},
            400,
            "temprature",
            "did you mean 'temperature'",
        ),
        (
            "chat/completions",
            {"messages": ASK, "temperature": 3},
            400,
            "temperature",
            "less than or equal to 2",
        ),
        (
            "chat/completions",
            {"messages": ASK, "temperature": "1"},
            400,
            "temperature",
            "valid number",
        ),
        ("chat/completions", {"messages": ASK, "n": 0}, 400, "n", "greater than or equal to 1"),
        ("chat/completions", {"messages": ASK, "n": 100}, 400, "n", "more than the 12"),
        (
            "chat/completions",
            {"messages": ASK, "stop": list("abcdefghijklmnopq")},
            400,
            "stop",
            "at most 16",
        ),
        (
            "chat/completions",
            {"messages": ASK, "logit_bias": {"x": 1}},
            400,
            "logit_bias",
            "no token id",
        ),
        (
            "chat/completions",
            {"messages": ASK, "logit_bias": {"999999": 1}},
            400,
            "logit_bias",
            "there is no token",
        ),
        (
            "chat/completions",
            {"messages": ASK, "top_logprobs": 2},
            400,
            "top_logprobs",
            "set logprobs",
        ),
        (
            "chat/completions",
            {"messages": ASK, "stream_options": {"include_usage": True}},
            400,
            "stream_options",
            "set stream",
        ),
        ("chat/completions", {"messages": []}, 400, "messages", "at least one user turn"),
        ("chat/completions", {"messages": ASK * 2}, 400, "messages", "roles must alternate"),
        (
            "chat/completions",
            {"messages": [{"role": "robot", "content": ""}]},
            400,
            "messages.0.role",
            "input should be",
        ),
        ("chat/completions", {}, 400, "messages", "field required"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a " * 400}]},
            400,
            "messages",
            "more than leave",
        ),
        ("completions", {"prompt": [70000]}, 400, "prompt", "token ids outside"),
        ("completions", {"prompt": []}, 400, "prompt", ""),
        (
            "completions",
            {"prompt": "a", "stop_token_ids": [70000]},
            400,
            "stop_token_ids",
            "there is no token 70000",
        ),
        (
            "completions",
            {
                "prompt": "a",
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "nothing"}},
                },
            },
            400,
            "response_format",
            "cannot be used",
        ),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "only with echo"),
        ("score", {"messages": ASK}, 400, "messages", "last turn must be 'assistant'"),
        ("nonsense", {}, 404, None, "Not Found"),
    ],
)
def test_a_mistake_is_named(served, path, body, status, param, words):
    answer = served.post(path, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_openais_client_understands_refusals(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": "word " * 400}]
        )

    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=ASK)


def test_models(client):
    assert [(model.id, model.owned_by) for model in client.models.list()] == [
        ("policy", "llama2"),
        ("safe", "llama2"),
    ]
    assert client.models.retrieve("safe").id == "safe"


def test_health_and_metrics(served):
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "failed": []}
    served.post("chat/completions", messages=ASK, max_tokens=3)
    text = httpx.get(f"{served.url}/metrics").text

    for name in (
        "llama2_running{",
        "llama2_waiting{",
        "llama2_completion_tokens_total{",
        "llama2_cached_tokens{",
        "llama2_first_token_seconds_bucket{",
        "llama2_between_tokens_seconds_bucket{",
    ):
        assert name in text

    assert 'path="/v1/chat/completions",status="200"' in text


def test_the_raw_stream(served):
    """What no client library shows: the framing and the end."""
    with httpx.stream(
        "POST",
        f"{served.url}/v1/chat/completions",
        json={"messages": ASK, "stream": True, "max_tokens": 3},
    ) as answer:
        lines = answer.read().decode().split("\n\n")

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"]
    assert "usage" not in chunks[0]
