"""What other programs send: the server's own answers, fields that change nothing, and beginnings of
answers."""

from __future__ import annotations

import itertools
import json

import httpx
import openai
import pytest
import torch
from pydantic import BaseModel
from servers import serving

from llama2.formats import checkpoint
from llama2.generate.engine import Engine
from llama2.generate.rewards import to_probability
from llama2.generate.sampling import Sampling
from llama2.generate.score import score_rows
from llama2.records import Message
from llama2.tokenizer.template import encode_dialog, encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer

ASK = [{"role": "user", "content": "Name a colour."}]
MORE = {"role": "user", "content": "And another?"}
LONG = {"2": -100}  # no end before the limit


@pytest.fixture(scope="module")
def served(policy, scorers):
    with serving(policy, slots=4, limits={"waiting": 8}) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    with served.client() as client:
        yield client


# --- answers sent back ---


class Mood(BaseModel):
    mood: bool


# the client's own, of what it has parsed
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_answers_may_be_sent_back(client):
    asked = {"model": "policy", "temperature": 0, "max_tokens": 12, "logit_bias": LONG}
    text = client.chat.completions.create(**asked, messages=ASK).choices[0].message.content
    asked["stop"] = text[3:5]  # the helpers take no answer that was cut off for one
    answer = client.chat.completions.create(**asked, messages=ASK).choices[0].message

    with client.chat.completions.stream(**asked, messages=ASK) as stream:
        streamed = stream.get_final_completion().choices[0].message

    parsed = (
        client.chat.completions.parse(
            model="policy", messages=ASK, response_format=Mood, seed=1, max_tokens=60
        )
        .choices[0]
        .message
    )
    assert isinstance(parsed.parsed, Mood)
    plain = {"role": "assistant", "content": answer.content}
    wanted = (
        client.chat.completions.create(**asked, messages=[*ASK, plain, MORE])
        .choices[0]
        .message.content
    )

    for same in (
        answer,
        answer.model_dump(),
        answer.to_dict(),
        json.loads(answer.model_dump_json()),
        streamed,
        streamed.model_dump(),
        streamed.to_dict(),
    ):
        again = client.chat.completions.create(**asked, messages=[*ASK, same, MORE])
        assert again.choices[0].message.content == wanted

    del asked["stop"]
    for same in (parsed, parsed.model_dump(), parsed.to_dict()):
        assert (
            client.chat.completions.create(**asked, messages=[*ASK, same, MORE])
            .choices[0]
            .message.content
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"refusal": None},
        {"refusal": ""},
        {"tool_calls": None},
        {"tool_calls": []},
        {"function_call": None},
        {"audio": None},
        {"annotations": []},
        {"annotations": None},
        {"name": "bob"},
        {"reasoning_content": None},
        {"tool_call_id": None},
        {"content": None},
        {"content": []},
        {"type": "text"},
        {"id": "msg_1"},
        {"provider_specific_fields": None},
        {"content": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_a_turn_may_have_fields_that_say_nothing(served, fields):
    turn = {"role": "assistant", "content": "b", **fields}
    empty = "content" in fields and not fields["content"]
    found = served.post(
        "chat/completions", messages=[*ASK, turn, MORE], max_tokens=2, seed=1
    ).json()
    plain = served.post(
        "chat/completions",
        messages=[*ASK, {"role": "assistant", "content": "" if empty else "b"}, MORE],
        max_tokens=2,
        seed=1,
    ).json()
    assert found["choices"] == plain["choices"]


# --- fields ---

NOTHING = {
    "tools": [None, []],
    "tool_choice": [None, "none", "auto"],
    "functions": [None, []],
    "function_call": [None, "none", "auto"],
    "parallel_tool_calls": [None, True, False],
    "modalities": [None, ["text"]],
    "audio": [None],
    "prediction": [None, {"type": "content", "content": "x"}],
    "reasoning_effort": [None, "none"],
    "verbosity": [None, "medium"],
    "web_search_options": [None],
    "moderation": [None],
    "logprobs": [None, False, 0],
    "top_logprobs": [None, 0],
    "max_completion_tokens": [None, 3, -1],
    "add_generation_prompt": [None, True, False],
    "continue_final_message": [None, False],
    "chat_template": [None],
    "chat_template_kwargs": [None, {}],
    "documents": [None, []],
    "return_token_ids": [None, False],
}
NOTHING["chat_template_kwargs"].append({"enable_thinking": False})
NOTHING_IN_BOTH = {
    "metadata": [None, {}, {"a": "b"}],
    "store": [None, False, True],
    "service_tier": [None, "auto", "default"],
    "user": [None, "u"],
    "safety_identifier": [None, "u"],
    "prompt_cache_key": [None, "k"],
    "prompt_cache_retention": [None, "24h"],
    "n": [None, 1],
    "best_of": [None, 1],
    "seed": [7],
    "stop": [None, "", [], [""], ["never said"] * 16],
    "logit_bias": [None, {}],
    "top_k": [None, 0, -1],
    "top_p": [None, 1, 1.0],
    "min_p": [None, 0],
    "temperature": [None, 1],
    "repetition_penalty": [None, 1],
    "presence_penalty": [None, 0],
    "frequency_penalty": [None, 0],
    "stop_token_ids": [None, []],
    "ignore_eos": [None, False],
    "response_format": [None, {"type": "text"}],
    "stream": [None, False],
    "stream_options": [None, {}, {"include_usage": False}, {"include_obfuscation": False}],
    "min_tokens": [None, 0],
    "skip_special_tokens": [None, True],
    "include_stop_str_in_output": [None, False],
    "use_beam_search": [None, False],
    "length_penalty": [None, 1, 1.0],
    "priority": [None, 0],
    "guided_json": [None],
    "structured_outputs": [None, {}],
    "prompt_logprobs": [None],
    "truncate_prompt_tokens": [None],
    "bad_words": [None, []],
    "allowed_token_ids": [None],
    "return_tokens_as_token_ids": [None, False],
    "model": [None, "policy", ""],
    "max_tokens": [3.0],
}
OF_TEXTS = {
    "suffix": [None, ""],
    "echo": [None, False],
    "logprobs": [None, False],
    "return_token_ids": [None, False],
    "add_special_tokens": [None, True],
}


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("chat/completions", {"messages": ASK}, NOTHING | NOTHING_IN_BOTH),
        ("completions", {"prompt": "The cat"}, OF_TEXTS | NOTHING_IN_BOTH),
    ],
)
def test_a_value_that_changes_nothing_is_accepted(served, path, body, fields):
    wanted = served.post(path, **body, max_tokens=3, seed=7).json()["choices"]
    for name, values in fields.items():
        for value in values:
            asked = {
                **body,
                "seed": 7,
                **({} if value == -1 and name.startswith("max") else {"max_tokens": 3}),
                name: value,
            }
            found = served.post(path, **asked)
            assert found.status_code == 200, (name, value, found.text)
            choices = found.json()["choices"]

            if "max_tokens" in asked:
                assert choices == wanted, (name, value)

    everything = {name: None for name in fields if name != "seed"}
    assert served.post(path, **everything, **body, seed=7).status_code == 200


SETTINGS = {  # of text-generation-webui, llama.cpp and others, all of them off
    "typical_p": 1,
    "tfs": 1.0,
    "top_a": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "penalty_alpha": 0,
    "num_beams": 1,
    "mirostat_mode": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "guidance_scale": 1,
    "negative_prompt": "",
    "encoder_repetition_penalty": 1,
    "repetition_penalty_range": 1024,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "smoothing_factor": 0,
    "smoothing_curve": 1,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "xtc_probability": 0,
    "xtc_threshold": 0.1,
    "dynatemp_range": 0,
    "dynamic_temperature": False,
    "temperature_last": False,
    "do_sample": True,
    "add_bos_token": True,
    "ban_eos_token": False,
    "truncation_length": 2048,
    "stopping_strings": [],
    "custom_token_bans": "",
    "grammar_string": "",
    "cache_prompt": True,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "n_probs": 0,
    "id_slot": -1,
    "thinking": {"type": "disabled"},
    "enable_thinking": False,
    "session_id": "x",
    "samplers": "",
    "preset": "None",
    "num_ctx": 2048,
    "kv_transfer_params": None,
    "of_nobody": None,
}


@pytest.mark.parametrize(
    ("path", "body"),
    [("chat/completions", {"messages": ASK}), ("completions", {"prompt": "The cat"})],
)
def test_settings_of_other_servers_may_be_off(served, path, body):
    asked = {**body, "max_tokens": 3, "seed": 7}
    found = served.post(path, **asked, **SETTINGS)
    assert found.status_code == 200, found.text
    assert found.json()["choices"] == served.post(path, **asked).json()["choices"]


@pytest.mark.parametrize("seed", [None, -1])
def test_without_a_seed_every_answer_is_another(served, seed):
    """-1 is no seed to clients of vLLM and llama.cpp."""
    said = [
        served.post(
            "completions", prompt="The", max_tokens=30, temperature=2, logit_bias=LONG, seed=seed
        ).json()
        for _ in range(2)
    ]
    assert said[0]["choices"] != said[1]["choices"]


@pytest.mark.parametrize(
    "form",
    [
        {
            "type": "json_object",
            "schema": {
                "type": "object",
                "properties": {"a": {"const": 5}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": {"a": 5}}}},
    ],
)
def test_both_ways_to_say_a_schema(served, form):
    found = served.post(
        "chat/completions", messages=ASK, response_format=form, max_tokens=60
    ).json()
    assert json.loads(found["choices"][0]["message"]["content"]) == {"a": 5}


def test_a_schema_may_be_left_out(served):
    for form in ({"name": "x"}, {"name": "x", "schema": None}, {"name": "x", "schema": {}}):
        assert (
            served.post(
                "chat/completions",
                messages=ASK,
                max_tokens=3,
                response_format={"type": "json_schema", "json_schema": form},
            ).status_code
            == 200
        )


TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}
PICTURE = {
    "type": "image_url",
    "image_url": {"url": "data:image/png;base64,AAAA", "detail": "auto"},
}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [TOOL]}, "tools", "tools are not supported by this server"),
        (
            {"tools": [TOOL], "tool_choice": "auto"},
            "tools",
            "tools are not supported by this server",
        ),
        ({"tool_choice": "required"}, "tool_choice", "tools are not supported"),
        ({"functions": [TOOL["function"]]}, "functions", "tools are not supported"),
        ({"function_call": {"name": "f"}}, "function_call", "tools are not supported"),
        (
            {"messages": [{"role": "user", "content": [PICTURE]}]},
            "messages.0.content.0",
            "images are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, PICTURE]}]},
            "messages.0.content.1",
            "images are not supported by this server",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}
                ]
            },
            "messages.0.content.0",
            "audio is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
            "messages.0.content.0",
            "files are not supported",
        ),
        (
            {"messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": [{}]}, MORE]},
            "messages.1.tool_calls",
            "tools are not supported",
        ),
        (
            {"messages": [*ASK, {"role": "tool", "tool_call_id": "x", "content": "1"}]},
            "messages.1.role",
            "tools are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages.0.content",
            "only an assistant's turn may be null",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "a text is wanted"),
        (
            {"messages": [*ASK, {"role": "assistant", "content": None, "refusal": "No."}, MORE]},
            "messages.1.refusal",
            "send it as text",
        ),
        ({"modalities": ["text", "audio"]}, "modalities", "text alone"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio", "audio is not supported"),
        ({"web_search_options": {}}, "web_search_options", "web search is not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "without reasoning"),
        ({"min_tokens": 3}, "min_tokens", "not supported"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
        ({"best_of": 2}, "best_of", "equal n"),
        ({"n": 2, "best_of": 1}, "best_of", "equal n"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": -2}, "max_tokens", "greater than or equal to -1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "not both"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"typical_p": 0.9}, "typical_p", "this way to sample is not supported"),
        (
            {"repetition_penalty": 1.1, "repetition_penalty_range": 64},
            "repetition_penalty_range",
            "the whole text",
        ),
        ({"messages": None}, "messages", "valid list"),
        ({"of_nobody": 0}, "of_nobody", "unknown parameter"),
        ({"mirostat_mode": 2}, "mirostat_mode", "this way to sample is not supported"),
        ({"repeat_penalty": 1.1}, "repeat_penalty", "use repetition_penalty"),
        ({"grammar": "root ::= x"}, "grammar", "use response_format"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "without reasoning"),
        ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
        (
            {"chat_template_kwargs": {"x": 1}},
            "chat_template_kwargs",
            "the model's format is asked for without options",
        ),
        (
            {"response_format": {"type": "json_schema", "schema": {}}},
            "response_format.schema",
            "unknown parameter",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"stor": True}, "stor", "did you mean 'store'"),
        ({"top_kk": 1}, "top_kk", "did you mean 'top_k'"),
        ({"max_token": 1}, "max_token", "did you mean 'max_tokens'"),
        ({"max_new_tokens": 1}, "max_new_tokens", "did you mean 'max_tokens'"),
        ({"stops": "a"}, "stops", "did you mean 'stop'"),
        ({"suffix": "a"}, "suffix", "it belongs to /v1/completions"),
        ({"prompt": "a"}, "prompt", "it belongs to /v1/completions"),
        ({"continue_final_message": True}, "messages", "the last turn is the user's"),
        (
            {"messages": [*ASK, {"role": "assistant", "content": "Sure"}]},
            "messages",
            "set continue_final_message",
        ),
        (
            {
                "messages": [*ASK, {"role": "assistant", "content": "Sure"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "add_generation_prompt",
            "set it to false",
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "a"},
                    {"role": "system", "content": "b"},
                    *ASK,
                ]
            },
            "messages",
            "Llama 2's format",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}, *ASK]},
            "messages",
            "Llama 2's format",
        ),
        ({"messages": ASK * 2}, "messages", "Llama 2's format"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_reason(served, fields, param, words):
    found = served.post("chat/completions", **{"messages": ASK, **fields})
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"suffix": "x"}, "suffix", "not supported by this server"),
        ({"best_of": 3}, "best_of", "equal n"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"messages": ASK}, "messages", "it belongs to /v1/chat/completions"),
        ({"tools": []}, "tools", "it belongs to /v1/chat/completions"),
        ({"ech": True}, "ech", "did you mean 'echo'"),
    ],
)
def test_the_same_of_completions(served, fields, param, words):
    found = served.post("completions", **{"prompt": "a", **fields})
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_tools_are_left_alone_where_none_may_be_called(served):
    assert (
        served.post(
            "chat/completions", messages=ASK, tools=[TOOL], tool_choice="none", max_tokens=2
        ).status_code
        == 200
    )


def test_a_nucleus_of_nothing_is_the_likeliest_token(served):
    for path, body in (
        ("chat/completions", {"messages": ASK}),
        ("completions", {"prompt": "The cat"}),
    ):
        asked = {**body, "max_tokens": 20, "logit_bias": LONG}
        greedy, least = (
            served.post(path, **asked, **more).json()["choices"]
            for more in ({"temperature": 0}, {"top_p": 0, "temperature": 1.5, "seed": 3})
        )
        assert greedy == least


def test_minus_one_token_is_as_many_as_there_is_room_for(served):
    for path, body in (
        ("chat/completions", {"messages": ASK}),
        ("completions", {"prompt": "The cat"}),
    ):
        for name in ("max_tokens", *(("max_completion_tokens",) if "messages" in body else ())):
            found = served.post(path, **body, logit_bias=LONG, **{name: -1}).json()
            assert found["usage"]["total_tokens"] == 256
            assert found["choices"][0]["finish_reason"] == "length"


def test_a_developer_speaks_as_the_system(served):
    said = [
        served.post(
            "chat/completions",
            messages=[{"role": role, "content": "Be brief."}, *ASK],
            temperature=0,
            max_tokens=20,
            logit_bias=LONG,
        ).json()["choices"][0]
        for role in ("system", "developer")
    ]
    assert said[0] == said[1]


# --- counts ---


@pytest.mark.parametrize(("logprobs", "ids"), [(0, False), (1, False), (2, True), (None, True)])
@pytest.mark.parametrize(
    "ending",
    [
        {},
        {"logit_bias": {"2": 100}},
        {"logit_bias": LONG},
        {"stop": ["e", "a"]},
        {"stop_token_ids": [300, 301, 302, 303]},
    ],
)
def test_counts_agree_within_an_answer(served, logprobs, ids, ending):
    """Every token that was drawn is reported, whatever ended the answer, in one piece or in a
    stream."""
    for echo, n, stream in itertools.product((False, True), (1, 2), (False, True)):
        asked = {
            "prompt": [[1, 300, 310, 320], [1, 330]],
            "max_tokens": 8,
            "echo": echo,
            "n": n,
            "seed": 5,
            "logprobs": logprobs,
            "return_token_ids": ids,
            **ending,
        }
        tokens, values, offsets, numbers, texts = ([[] for _ in range(2 * n)] for _ in range(5))
        if stream:
            answer = served.post(
                "completions", **asked, stream=True, stream_options={"include_usage": True}
            )
            events = [
                json.loads(line[6:])
                for line in answer.text.split("\n\n")
                if line.startswith("data: {")
            ]
            usage = events[-1]["usage"]
            choices = [choice for event in events for choice in event["choices"]]
        else:
            answer = served.post("completions", **asked).json()
            usage, choices = answer["usage"], answer["choices"]

        for choice in choices:
            index, found = choice["index"], choice["logprobs"] or {}
            texts[index] += choice["text"]
            tokens[index] += found.get("tokens", [])
            values[index] += found.get("token_logprobs", [])
            offsets[index] += found.get("text_offset", [])
            numbers[index] += choice.get("token_ids", [])

        count = usage["completion_tokens"] + (6 * n if echo else 0)
        assert usage["prompt_tokens"] == 6
        if logprobs is not None:
            assert sum(map(len, tokens)) == sum(map(len, values)) == sum(map(len, offsets)) == count
            assert sum(value is None for each in values for value in each) == (2 * n if echo else 0)

        if ids:
            assert sum(map(len, numbers)) == count

        if "stop" in ending and not echo:
            assert not set("ea") & set("".join(itertools.chain(*texts)))


def test_counts_agree_within_a_chat(served):
    for ending in ({}, {"logit_bias": {"2": 100}}, {"logit_bias": LONG}, {"stop": ["e", "a"]}):
        asked = {"messages": ASK, "max_tokens": 8, "seed": 5, "logprobs": True, **ending}
        answer = served.post("chat/completions", **asked).json()
        tokens = answer["choices"][0]["logprobs"]["content"]
        assert len(tokens) == answer["usage"]["completion_tokens"]
        lines = served.post("chat/completions", **asked, stream=True).text.split("\n\n")
        choices = [
            json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")
        ]
        assert [
            token
            for choice in choices
            if choice["logprobs"]
            for token in choice["logprobs"]["content"]
        ] == tokens
        assert choices[-1]["delta"] == {}


@pytest.mark.parametrize("bias", [{}, {"2": 100}, {"2": -100}])
def test_a_prompt_and_one_token_have_one_entry_more_than_the_prompt(served, policy, bias):
    """What lm-evaluation-harness asks, and how it takes the answer:
    `token_logprobs[context:-1]`."""
    prompts = [[1, 300, 301, 302, 303], [1, 310, 311]]
    answer = served.post(
        "completions",
        prompt=prompts,
        max_tokens=1,
        temperature=0,
        logprobs=1,
        echo=True,
        seed=1234,
        logit_bias=bias,
    ).json()
    with torch.no_grad():
        logp = [
            checkpoint.load(policy)(torch.tensor([ids])).float().log_softmax(-1)[0]
            for ids in prompts
        ]

    for choice, ids, own in zip(answer["choices"], prompts, logp):
        found = choice["logprobs"]
        assert len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(ids) + 1
        true = [float(own[place - 1, ids[place]]) for place in range(1, len(ids))]
        assert found["token_logprobs"][1:-1] == pytest.approx(true, abs=1e-3)
        assert found["top_logprobs"][0] is None
        assert [max(top.values()) for top in found["top_logprobs"][1:-1]] == pytest.approx(
            [float(own[place].max()) for place in range(len(ids) - 1)], abs=1e-3
        )


def test_tokens_may_be_named_by_their_ids(served):
    asked = {
        "prompt": [1, 300, 310],
        "max_tokens": 4,
        "logprobs": 2,
        "seed": 1,
        "return_token_ids": True,
    }
    choice = served.post("completions", **asked, return_tokens_as_token_ids=True).json()["choices"][
        0
    ]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(
        name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top
    )


# --- streams ---


def test_a_stream_may_tell_its_usage_always_and_hide_its_lengths(client):
    asked = {
        "model": "policy",
        "messages": ASK,
        "max_tokens": 6,
        "seed": 2,
        "logit_bias": LONG,
        "stream": True,
    }
    chunks = list(
        client.chat.completions.create(
            **asked, stream_options={"include_usage": True, "continuous_usage_stats": True}
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 6)
    response = client.chat.completions.with_raw_response.create(
        **asked, stream_options={"include_obfuscation": True}
    )
    events = [
        line for line in response.http_response.read().split(b"\n\n") if line.startswith(b"data: {")
    ]
    assert {len(event + b"\n\n") % 256 for event in events} == {0}


# --- beginnings of answers ---


def continued(served, begun, **more):
    turns = [*ASK, {"role": "assistant", "content": begun}]
    return served.post(
        "chat/completions",
        messages=turns,
        continue_final_message=True,
        add_generation_prompt=False,
        **more,
    )


def test_an_answer_goes_on_where_it_was_begun(served, policy):
    """The ids before the new ones are those of the finished conversation in training."""
    tokenizer, engine = (
        Tokenizer.load(policy),
        Engine(checkpoint.load(policy).eval(), precision="fp32"),
    )
    question = (Message("user", "Name a colour."),)
    whole = encode_dialog(
        tokenizer,
        (
            *question,
            Message("assistant", "The cat is blue."),
        ),
    )[0]
    begun = whole[: len(encode_prompt(tokenizer, question)) + len(tokenizer.encode("The cat"))]
    ((its,),) = engine.generate(
        [begun], Sampling(temperature=0, max_tokens=20, stop=(2,), logit_bias=((2, -100.0),))
    )
    text = tokenizer.decode([*tokenizer.encode("The cat"), *its.tokens])

    for given in (
        "The cat",
        "The cat ",
        "  The cat  ",
        [{"type": "text", "text": "The "}, {"type": "text", "text": "cat"}],
    ):
        found = continued(served, given, temperature=0, max_tokens=20, logit_bias=LONG).json()
        assert found["usage"]["prompt_tokens"] == len(begun)
        rest = found["choices"][0]["message"]["content"]
        told = text.removeprefix("The cat").rstrip()
        assert rest == (told.removeprefix(" ") if given in ("The cat ", "  The cat  ") else told)


def test_the_rest_is_streamed_as_it_is_told(served):
    asked = {"temperature": 0, "max_tokens": 20, "logit_bias": LONG}
    whole = continued(served, "The cat", **asked).json()["choices"][0]["message"]["content"]
    lines = continued(served, "The cat", **asked, stream=True).text.split("\n\n")
    deltas = [
        json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")
    ]
    assert "".join(delta.get("content", "") for delta in deltas) == whole


def test_an_answer_begun_with_nothing_is_a_new_one(served):
    asked = {"temperature": 0, "max_tokens": 20, "logit_bias": LONG}
    plain = served.post("chat/completions", messages=ASK, **asked).json()
    for begun in ("", "  ", None):
        assert continued(served, begun, **asked).json()["choices"] == plain["choices"]


def test_the_gate_reads_the_answer_from_its_beginning(policy, scorers):
    """What was begun elsewhere is judged with what it goes on with."""
    with serving(policy, judge=scorers[1], safety={"threshold": 0.0}) as gated:
        found = continued(gated, "The cat", temperature=0, max_tokens=4, logit_bias=LONG).json()
        answer = "The cat" + found["choices"][0]["message"]["content"]
        model = next(iter(gated.models.values()))
        ids = encode_dialog(
            model.tokenizer, (Message("user", "Name a colour."), Message("assistant", answer))
        )[0]
        scorer = checkpoint.load_scorer(scorers[1]).eval()
        assert found["llama2"]["safety"]["probability"] == pytest.approx(
            to_probability(score_rows(scorer, [ids], precision="fp32")[0]), abs=1e-4
        )


# --- openai's client ---


def test_refusals_are_typed_exceptions(client):
    with pytest.raises(
        openai.BadRequestError, match="tools are not supported by this server"
    ) as refused:
        client.chat.completions.create(model="policy", messages=ASK, tools=[TOOL])

    assert refused.value.param == "tools"
    with pytest.raises(openai.NotFoundError):
        client.with_options(max_retries=0).models.retrieve("gpt")

    raw = client.chat.completions.with_raw_response.create(
        model="policy", messages=ASK, max_tokens=2
    )
    assert raw.parse().choices[0].message.role == "assistant"
    assert raw.headers["x-request-id"]
    assert isinstance(httpx.get(f"{client.base_url}models").json()["data"], list)
