"""What vLLM's and llama.cpp's servers answer, in the shapes that their documents and sources give,
is understood."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from llama2.errors import UserError
from llama2.generate.grammar import json_grammar
from llama2.generate.remote import Server, connect
from llama2.generate.sampling import Sampling

PROMPT = [1, 300, 350]
GREEDY = Sampling(temperature=0, max_tokens=20, stop=(2,))


class Replay(BaseHTTPRequestHandler):
    """Answers with `server.answers`, one after another: (status, JSON), or a list of JSON as a
    stream."""

    def do_GET(self) -> None:
        self._send(200, json.dumps(self.server.models))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        status, answer = self.server.answers.pop(0)

        if isinstance(answer, list):
            self._send(
                status,
                "".join(f"data: {json.dumps(part)}\n\n" for part in answer) + "data: [DONE]\n\n",
            )
        else:
            self._send(status, json.dumps(answer))

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Replay)
    server.answers, server.asked, server.models = [], [], VLLM_MODELS
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def remote(server, tokenizer):
    return connect(Server(url=f"http://127.0.0.1:{server.server_port}", retries=1), tokenizer, 4096)


VLLM_MODELS = {
    "object": "list",
    "data": [
        {
            "id": "tiny",
            "object": "model",
            "created": 1700000000,
            "owned_by": "vllm",
            "root": "/models/tiny",
            "parent": None,
            "max_model_len": 128,
            "permission": [{"id": "modelperm-0", "object": "model_permission"}],
        }
    ],
}
LLAMACPP_MODELS = {
    "models": [{"name": "tiny", "model": "tiny", "type": "model", "capabilities": ["completion"]}],
    "object": "list",
    "data": [
        {
            "id": "tiny",
            "object": "model",
            "created": 1700000000,
            "owned_by": "llamacpp",
            "meta": {
                "vocab_type": 1,
                "n_vocab": 420,
                "n_ctx_train": 256,
                "n_embd": 32,
                "n_params": 99,
                "size": 99,
            },
        }
    ],
}


def vllm(tokenizer, ids, finish="stop", names=True, token_ids=True, stop_reason=None):
    """A whole answer of vLLM. Its log-probabilities are never below -9999."""
    text = tokenizer.decode([300, *ids])[len(tokenizer.decode([300])) :]
    logprobs = [-0.25 * place for place in range(len(ids) - 1)] + [-9999.0]
    tokens = [f"token_id:{token}" if names else "?" for token in ids]
    choice = {
        "index": 0,
        "text": text,
        "finish_reason": finish,
        "stop_reason": stop_reason,
        "prompt_logprobs": None,
        "logprobs": {
            "text_offset": [0] * len(ids),
            "token_logprobs": logprobs,
            "tokens": tokens,
            "top_logprobs": [{name: value} for name, value in zip(tokens, logprobs)],
        },
    }

    if token_ids:
        choice |= {"token_ids": list(ids), "prompt_token_ids": PROMPT}

    return 200, {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 1700000000,
        "model": "tiny",
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": None,
        "kv_transfer_params": None,
        "usage": {
            "prompt_tokens": 3,
            "total_tokens": 3 + len(ids),
            "completion_tokens": len(ids),
            "prompt_tokens_details": None,
        },
    }


def refusal(message, status=400):
    return status, {
        "error": {"message": message, "type": "BadRequestError", "param": None, "code": status}
    }


def test_vllm_reports_the_stop_id_and_its_log_probability(server, remote, tokenizer):
    ids = (*tokenizer.encode("one two"), 2)
    assert remote.context == 128
    for answer in (
        vllm(tokenizer, ids),
        vllm(tokenizer, ids, names=False),
        vllm(tokenizer, ids, token_ids=False),
    ):
        server.answers.append(answer)
        ((found,),) = remote.generate([PROMPT], GREEDY)
        assert (found.tokens, found.finish) == (ids, "stop")
        assert found.logprobs == (*(-0.25 * place for place in range(len(ids) - 1)), -9999.0)

    server.answers.append(vllm(tokenizer, ids[:-1], finish="length"))
    ((cut,),) = remote.generate([PROMPT], GREEDY)
    assert (cut.tokens, cut.finish) == (ids[:-1], "length")
    server.answers.append(vllm(tokenizer, (*ids[:-1], 360), stop_reason=360))
    ((other,),) = remote.generate([PROMPT], Sampling(temperature=0, max_tokens=20, stop=(2, 360)))
    assert (other.tokens, other.finish) == ((*ids[:-1], 360), "stop")


def test_a_server_is_told_every_way_of_sampling_it_may_have_a_default_for(
    server, remote, tokenizer
):
    """vLLM takes defaults from the checkpoint's generation_config.json; llama.cpp's server has its
    own."""
    server.answers += [vllm(tokenizer, (300, 2)), vllm(tokenizer, (300, 2))]
    remote.generate([PROMPT], GREEDY)
    asked = server.asked[-1]
    assert asked["prompt"] == PROMPT
    assert {
        name: asked[name]
        for name in ("top_k", "min_p", "repetition_penalty", "presence_penalty", "temperature")
    } == {
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "temperature": 0,
    }
    assert "ignore_eos" not in asked
    remote.generate([PROMPT], Sampling(max_tokens=2))
    assert server.asked[-1]["ignore_eos"] is True


def test_what_changes_nothing_may_be_refused_and_what_changes_something_not(
    server, remote, tokenizer
):
    old = refusal("top_k must be -1 (disable), or at least 1, got 0.")
    server.answers += [
        old,
        vllm(tokenizer, (300, 2)),
        vllm(tokenizer, (300, 2)),
        refusal("top_k is unknown"),
    ]
    assert remote.generate([PROMPT], GREEDY)[0][0].tokens == (300, 2)
    assert "top_k" not in server.asked[-1]
    remote.generate([PROMPT], Sampling(max_tokens=5, stop=(2,), top_k=7))
    assert server.asked[-1]["top_k"] == 7

    with pytest.raises(UserError, match="top_k is unknown"):
        remote.generate([PROMPT], Sampling(max_tokens=5, stop=(2,), top_k=7))


def test_a_stream_of_vllm(server, remote):
    def part(**choice: Any) -> dict[str, Any]:
        return {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": 1,
            "model": "tiny",
            "choices": [
                {"index": 0, "logprobs": None, "finish_reason": None, "stop_reason": None, **choice}
            ],
        }

    parts = [
        part(text=" a", token_ids=[300, 340], prompt_token_ids=PROMPT),
        part(text="b", token_ids=[350]),
        part(text="", token_ids=[2], finish_reason="stop"),
    ]
    usage = {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 1,
        "model": "tiny",
        "choices": [],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
    server.answers.append((200, [*parts, usage]))
    assert list(remote.stream(PROMPT, GREEDY)) == [300, 340, 350, 2]
    assert server.asked[-1]["stream"] is True
    server.answers.append(
        (
            200,
            [
                parts[0],
                {
                    "error": {
                        "message": "the engine died",
                        "type": "InternalServerError",
                        "param": None,
                        "code": 500,
                    }
                },
            ],
        )
    )

    with pytest.raises(UserError, match="the engine died"):
        list(remote.stream(PROMPT, GREEDY))


def test_a_schema_is_sent_as_vllm_wants_it_and_an_answer_that_ignores_it_is_noticed(
    server, remote, tokenizer
):
    schema = {"enum": ["yes", "no"]}
    said = tokenizer.encode('"yes"')
    server.answers += [
        vllm(tokenizer, (*said, 2)),
        vllm(tokenizer, (*tokenizer.encode("{}"), 2)),
        vllm(tokenizer, (*tokenizer.encode("Sure!"), 2)),
        vllm(tokenizer, said[:2], finish="length"),
    ]
    guided = Sampling(max_tokens=9, stop=(2,), grammar=json_grammar(tokenizer, schema))
    assert tokenizer.decode(remote.generate([PROMPT], guided)[0][0].tokens) == '"yes"'
    assert server.asked[-1]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema},
    }
    remote.generate([PROMPT], Sampling(max_tokens=9, stop=(2,), grammar=json_grammar(tokenizer)))
    assert server.asked[-1]["response_format"] == {"type": "json_object"}

    with pytest.raises(UserError, match="not JSON"):
        remote.generate([PROMPT], guided)

    # cut off, which nobody can help
    assert remote.generate([PROMPT], guided)[0][0].finish == "length"
    assert len(server.asked) == 4  # what would come again is not asked for again


def llamacpp(tokenizer, ids, listed=None, finish="stop"):
    """A whole answer of llama.cpp's server; `listed` are the ids it lists."""
    content = [
        {
            "id": token,
            "token": tokenizer.bytes_of(token).decode("utf-8", "replace"),
            "bytes": list(tokenizer.bytes_of(token)),
            "logprob": -0.5,
            "top_logprobs": [{"id": token, "token": "?", "bytes": [63], "logprob": -0.5}],
        }
        for token in listed or ids
    ]
    return 200, {
        "choices": [
            {
                "text": tokenizer.decode(ids),
                "index": 0,
                "logprobs": {"content": content},
                "finish_reason": finish,
            }
        ],
        "created": 1700000000,
        "model": "tiny",
        "system_fingerprint": "b9000",
        "object": "text_completion",
        "usage": {
            "completion_tokens": len(ids),
            "prompt_tokens": 3,
            "total_tokens": 3 + len(ids),
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "id": "chatcmpl-0",
        "timings": {"cache_n": 0, "prompt_n": 3, "predicted_n": len(ids)},
    }


def test_llamacpp_lists_ids_beside_their_log_probabilities(server, remote, tokenizer):
    server.models = LLAMACPP_MODELS
    ids = (*tokenizer.encode("one two"), 2)
    server.answers += [
        (503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}),
        llamacpp(tokenizer, ids),
    ]
    ((found,),) = remote.generate([PROMPT], GREEDY)
    assert (found.tokens, found.finish, found.logprobs) == (ids, "stop", (-0.5,) * len(ids))
    assert len(server.asked) == 2
    # it does not say how much it takes
    assert connect(Server(url=remote.url), tokenizer, 200).context == 200


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (
            500,
            {
                "error": {
                    "message": "2 validation errors:\n  {'type': 'string_type', 'loc': ('body', 'prompt', 'str'), "
                    "'msg': 'Input should be a valid string', 'input': [1, 300, 350]}",
                    "code": None,
                    "type": "internal_server_error",
                    "param": None,
                }
            },
        ),
        (
            422,
            {
                "detail": [
                    {
                        "type": "string_type",
                        "loc": ["body", "prompt"],
                        "msg": "Input should be a valid string",
                    }
                ]
            },
        ),
    ],
)
def test_a_server_that_takes_text_alone_is_named_at_once(server, remote, status, answer):
    """The Python server of llama.cpp says the first, FastAPI's own words are the second."""
    server.answers.append((status, answer))
    with pytest.raises(UserError, match="prompts only as text"):
        remote.generate([PROMPT], GREEDY)

    assert len(server.asked) == 1


def test_llamacpp_leaves_out_tokens_inside_of_a_character(server, remote, tokenizer):
    ids = (*tokenizer.encode("a\U0001f600b"), 2)
    whole = [token for token in ids if tokenizer.bytes_of(token) not in (b"\xf0", b"\x9f", b"\x98")]
    assert len(whole) < len(ids)
    server.answers += [llamacpp(tokenizer, ids, whole)]
    ((found,),) = remote.generate([PROMPT], GREEDY)
    assert tokenizer.decode(found.tokens) == "a\U0001f600b"
    assert all(map(math.isnan, found.logprobs))
    assert found.finish == "stop"
