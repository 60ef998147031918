"""A server as its users meet it: OpenAI's client, streams, mistakes, crowds, and the end of its process."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
import torch
from servers import serving

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
    answer = client.chat.completions.create(model="policy", messages=ASK, temperature=0, max_tokens=20)
    choice = answer.choices[0]
    assert (answer.object, answer.model, choice.message.role) == ("chat.completion", "policy", "assistant")
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert choice.logprobs is None


def test_a_stream_says_the_same(client):
    asked = {"model": "policy", "messages": ASK, "seed": 3, "max_tokens": 40, "n": 3, "logit_bias": LONG}
    whole = client.chat.completions.create(**asked)
    texts, finishes, usage, roles = [""] * 3, [None] * 3, None, []
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
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
    parts = [chunk.choices[0].delta.content or "" for chunk in
             client.chat.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(parts) == cut.choices[0].message.content


def test_logprobs(client):
    asked = {"model": "policy", "messages": ASK, "temperature": 0, "max_tokens": 12, "logit_bias": LONG}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    said = b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace")
    assert said.strip() == answer.choices[0].message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        others = {other.token: other.logprob for other in token.top_logprobs}
        assert token.logprob == pytest.approx(others.get(token.token, token.logprob), abs=1e-4)
        assert token.logprob <= max(others.values()) + 1e-4
    streamed = [token for chunk in client.chat.completions.create(**asked, logprobs=True, stream=True)
                if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_completions(client):
    answer = client.completions.create(model="policy", prompt=["The cat", "The dog"], max_tokens=5, n=2, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.object == "text_completion"
    echoed = client.completions.create(model="policy", prompt=["The cat", "The dog"], max_tokens=5, n=2, seed=1,
                                       echo=True)
    assert [choice.text for choice in echoed.choices] == [
        prompt + choice.text for prompt, choice in zip(("The cat",) * 2 + ("The dog",) * 2, answer.choices)]
    again = "".join(chunk.choices[0].text for chunk in client.completions.create(
        model="policy", prompt="The cat", max_tokens=5, seed=1, echo=True, stream=True))
    assert again == echoed.choices[0].text


def test_the_likelihood_of_a_text(client, served):
    tokenizer = next(iter(served.models)).tokenizer
    ids = [tokenizer.bos, *tokenizer.encode("The cat sees the dog")]
    answer = client.completions.create(model="policy", prompt=ids, max_tokens=0, echo=True, logprobs=2)
    found = answer.choices[0].logprobs
    assert answer.choices[0].text == "The cat sees the dog"
    assert found.token_logprobs[0] is None
    assert all(value < 0 for value in found.token_logprobs[1:])
    assert len(found.tokens) == len(found.text_offset) == len(ids)
    assert answer.usage.completion_tokens == 0
    drawn = client.completions.create(model="policy", prompt=ids[:3], max_tokens=1, seed=4, logit_bias=LONG,
                                      logprobs=0).choices[0].logprobs
    again = client.completions.create(model="policy", prompt="The cat sees the dog", max_tokens=3, echo=True,
                                      logprobs=0).choices[0].logprobs
    assert again.token_logprobs[: len(ids)] == pytest.approx(found.token_logprobs, abs=1e-4)
    assert drawn.text_offset == [again.text_offset[3]]  # as if the prompt had been there


class Spelling:
    """A grammar of one text."""

    def __init__(self, ids, size, eos):
        self.ids, self.size, self.eos, self.place = ids, size, eos, 0

    def mask(self):
        allowed = torch.zeros(self.size, dtype=torch.bool)
        allowed[self.ids[self.place] if self.place < len(self.ids) else self.eos] = True
        return allowed

    def accept(self, token):
        self.place += 1

    def fresh(self):
        return Spelling(self.ids, self.size, self.eos)


def test_a_grammar_guides_every_sample(client, monkeypatch):
    wanted = []

    def compiled(tokenizer, schema):
        wanted.append(json.loads(schema))
        return Spelling(tokenizer.encode('{"a": 1}'), tokenizer.vocab_size, tokenizer.eos)

    monkeypatch.setattr("llama2.serve.routes._compiled", compiled)
    shape = {"type": "object"}
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": shape}}):
        answer = client.chat.completions.create(model="policy", messages=ASK, n=3, response_format=form)
        assert [choice.message.content for choice in answer.choices] == ['{"a": 1}'] * 3
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert wanted == [None, shape]


def test_scores(served, scorers):
    body = served.post("score", messages=[*ASK, {"role": "assistant", "content": "Blue."}]).json()
    assert body["model"] == "safe"
    assert 0 < body["probability"] < 1
    assert (body["score"] > 0) == (body["probability"] > 0.5)


@pytest.mark.parametrize(("path", "body", "status", "param", "words"), [
    ("chat/completions", {"messages": ASK, "model": "polcy"}, 404, "model", "did you mean 'policy'"),
    ("chat/completions", {"messages": ASK, "model": "safe"}, 400, "model", "use /v1/score"),
    ("chat/completions", {"messages": ASK, "temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
    ("chat/completions", {"messages": ASK, "temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ("chat/completions", {"messages": ASK, "temperature": "1"}, 400, "temperature", "valid number"),
    ("chat/completions", {"messages": ASK, "n": 0}, 400, "n", "greater than or equal to 1"),
    ("chat/completions", {"messages": ASK, "n": 100}, 400, "n", "more than the 12"),
    ("chat/completions", {"messages": ASK, "stop": list("abcde")}, 400, "stop", "at most 4"),
    ("chat/completions", {"messages": ASK, "logit_bias": {"x": 1}}, 400, "logit_bias", "no token id"),
    ("chat/completions", {"messages": ASK, "logit_bias": {"999999": 1}}, 400, "logit_bias", "there is no token"),
    ("chat/completions", {"messages": ASK, "top_logprobs": 2}, 400, "top_logprobs", "set logprobs"),
    ("chat/completions", {"messages": ASK, "stream_options": {}}, 400, "stream_options", "set stream"),
    ("chat/completions", {"messages": []}, 400, "messages", "at least one user turn"),
    ("chat/completions", {"messages": ASK * 2}, 400, "messages", "roles must alternate"),
    ("chat/completions", {"messages": [{"role": "tool", "content": ""}]}, 400, "messages.0.role", "input should be"),
    ("chat/completions", {}, 400, "messages", "field required"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a " * 400}]}, 400, "messages", "more than leave"),
    ("completions", {"prompt": [70000]}, 400, "prompt", "token ids outside"),
    ("completions", {"prompt": []}, 400, "prompt", ""),
    ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "only with echo"),
    ("score", {"messages": ASK}, 400, "messages", "last turn must be 'assistant'"),
    ("nonsense", {}, 404, None, "Not Found"),
])
def test_a_mistake_is_named(served, path, body, status, param, words):
    answer = served.post(path, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_openais_client_understands_refusals(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "word " * 400}])
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=ASK)


def test_models(client):
    assert [(model.id, model.owned_by) for model in client.models.list()] == [("policy", "llama2"), ("safe", "llama2")]
    assert client.models.retrieve("safe").id == "safe"


def test_health_and_metrics(served):
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "failed": []}
    served.post("chat/completions", messages=ASK, max_tokens=3)
    text = httpx.get(f"{served.url}/metrics").text
    for name in ("llama2_running{", "llama2_waiting{", "llama2_completion_tokens_total{", "llama2_cached_tokens{",
                 "llama2_first_token_seconds_bucket{", "llama2_between_tokens_seconds_bucket{"):
        assert name in text
    assert 'path="/v1/chat/completions",status="200"' in text


def test_the_raw_stream(served):
    """What no client library shows: the framing and the end."""
    with httpx.stream("POST", f"{served.url}/v1/chat/completions",
                      json={"messages": ASK, "stream": True, "max_tokens": 3}) as answer:
        lines = answer.read().decode().split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"]
    assert "usage" not in chunks[0]
