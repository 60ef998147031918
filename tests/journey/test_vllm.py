"""The engine over a network on a real vLLM: the completions of here, exact ends, seeds, and what it
refuses.

LLAMA2_PEER_VLLM is an interpreter with vLLM. Without it, these are skipped. CONTRIBUTING.md says
how to get one.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess

import httpx
import pytest
import torch
from commands import llama2
from servers import wait_for
from test_remote_serve import WAYS

from llama2.errors import UserError
from llama2.formats import checkpoint
from llama2.generate.engine import Engine
from llama2.generate.grammar import json_grammar
from llama2.generate.remote import RemoteEngine, Server, connect
from llama2.generate.sampling import Sampling
from llama2.model.llama import Llama, LlamaConfig
from llama2.records import Message
from llama2.tokenizer.template import encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer

PYTHON = os.environ.get("LLAMA2_PEER_VLLM")
pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason="LLAMA2_PEER_VLLM names no interpreter"),
    pytest.mark.timeout(1800),
]
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
TOLERANCE = 1e-3  # of log p, whose sums are made in another order
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
PROMPTS = [[1, 300 + row, 350, 360 + row] for row in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer, world):
    """A model as our stages write it, whose heads are as wide as vLLM's kernels for CPUs want
    them."""
    folder = tmp_path_factory.mktemp("wide")
    checkpoint.save(Llama(LlamaConfig(tokenizer.vocab_size, **SHAPE)), folder / "base")
    tokenizer.save(folder / "base")
    assert (
        llama2(
            "sft",
            "--model",
            folder / "base",
            "--dialogs.all.path",
            world / "demonstrations.jsonl",
            "--out",
            folder / "policy",
            "--sequence-length",
            192,
            "--batch-size",
            4,
            "--epochs",
            3,
            "--training.optimizer.learning-rate",
            1e-2,
            "--training.plan.warmup-steps",
            3,
        )
        == 0
    )

    return folder / "policy"


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    """Where vLLM serves it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    folder = tmp_path_factory.mktemp("vllm")
    command = [
        PYTHON,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        model,
        "--served-model-name",
        "policy",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--dtype",
        "float32",
        "--max-num-seqs",
        16,
        "--enforce-eager",
    ]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(
            [str(word) for word in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, **SETTINGS, "VLLM_CACHE_ROOT": str(folder)},
        ) as process,
    ):

        def ready():
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_for(ready, 900)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def here(model):
    return Engine(checkpoint.load(model).eval(), precision="fp32")


@pytest.fixture
def remote(url, tokenizer):
    return connect(Server(url=url, retries=0), tokenizer, 10**6)


def test_it_is_found_by_its_name_and_context(url, here, remote, tokenizer):
    assert (remote.model, remote.context) == ("policy", here.context)
    with pytest.raises(UserError, match="it does not serve 'polcy'; did you mean 'policy'"):
        connect(Server(url=url, model="polcy"), tokenizer, 256)


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"a schema"}))
def test_greedy_completions_are_those_of_the_engine_here(remote, here, tokenizer, way):
    sampling = Sampling(temperature=0, max_tokens=40, **WAYS[way])
    chats = [
        encode_prompt(tokenizer, (Message("user", text),))
        for text in ("Who are you?", "Name a colour.")
    ]
    rows = zip(
        remote.generate([*chats, *PROMPTS], sampling), here.generate([*chats, *PROMPTS], sampling)
    )

    for (mine,), (its,) in rows:
        assert (mine.prompt, mine.tokens, mine.finish) == (its.prompt, its.tokens, its.finish)
        assert mine.logprobs == pytest.approx(its.logprobs, abs=TOLERANCE)
        assert list(remote.stream(mine.prompt, sampling)) == list(its.tokens)


def test_a_schema_is_obeyed(remote, tokenizer):
    """Only the schema is the same: vLLM lets white space stand between any two signs."""
    grammar = json_grammar(tokenizer, WAYS["a schema"]["grammar"])
    rows = remote.generate(PROMPTS, Sampling(max_tokens=200, stop=(2,), seed=3, grammar=grammar))
    said = [json.loads(tokenizer.decode(one.tokens)) for (one,) in rows if one.finish == "stop"]
    assert said
    assert all(each.keys() == {"mood"} and each["mood"] in ("glad", "sad") for each in said)


def test_samples_belong_to_their_seeds_and_have_the_models_log_p(remote, model):
    sampling = Sampling(max_tokens=12, n=3, stop=(2,), seed=5, temperature=0.8, top_p=0.9)
    first, again = (remote.generate(PROMPTS, sampling) for _ in range(2))
    tokens = [[one.tokens for one in row] for row in first]
    assert tokens == [[one.tokens for one in row] for row in again]
    assert any(len(set(row)) > 1 for row in tokens)
    share = remote.generate(PROMPTS[1::2], sampling, range(1, 6, 2))
    assert [[one.tokens for one in row] for row in share] == tokens[1::2]
    assert tokens != [
        [one.tokens for one in row]
        for row in remote.generate(
            PROMPTS, Sampling(max_tokens=12, n=3, stop=(2,), seed=6, temperature=0.8, top_p=0.9)
        )
    ]
    policy = checkpoint.load(model).eval()

    with torch.no_grad():
        for one in (one for row in first for one in row):
            logp = policy(torch.tensor([[*one.prompt, *one.tokens]])).float().log_softmax(-1)[0]
            own = [
                float(logp[len(one.prompt) + place - 1, token])
                for place, token in enumerate(one.tokens)
            ]
            assert one.logprobs == pytest.approx(own, abs=TOLERANCE)
            assert not any(map(math.isnan, one.logprobs))


def test_what_it_refuses_is_said_in_a_line(url, remote, tokenizer):
    with pytest.raises(UserError, match="more than leave room for an answer"):
        remote.generate([[1] * remote.context], Sampling(max_tokens=2))

    believing = RemoteEngine(url, "policy", tokenizer=tokenizer, context=10**6, retries=0)
    with pytest.raises(UserError, match=r"1 of 1 completions failed.*HTTP 400.*256") as refused:
        believing.generate([[1] * 300], Sampling(max_tokens=2))

    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"HTTP 404.*check its address, the name of the model"):
        RemoteEngine(url, "nobody", tokenizer=tokenizer, context=256).generate(
            [[1, 300]], Sampling(max_tokens=2)
        )


def test_a_request_that_is_given_up_leaves_it_answering(url, remote, here, tokenizer):
    hasty = RemoteEngine(url, "policy", tokenizer=tokenizer, context=256, retries=0, timeout=0.02)
    with pytest.raises(UserError, match="no answer within"):
        hasty.generate(PROMPTS, Sampling(max_tokens=200, n=4))

    sampling = Sampling(temperature=0, max_tokens=5)
    begun = remote.stream(PROMPTS[0], Sampling(temperature=0, max_tokens=200))
    assert next(begun) == here.generate(PROMPTS[:1], sampling)[0][0].tokens[0]
    begun.close()
    assert (
        remote.generate(PROMPTS, sampling)[0][0].tokens
        == here.generate(PROMPTS, sampling)[0][0].tokens
    )


def test_its_own_tokenizer_of_our_directory_is_ours(url, model):
    """Texts and conversations, as its clients send them, become the ids that training saw."""
    tokenizer = Tokenizer.load(model)
    for text in (
        "The cat sees the dog.",
        "two  spaces\n\nand  more",
        "été 日本語 🙂",
        "[INST] </s> x [/INST]",
    ):
        found = httpx.post(
            f"{url}/tokenize", json={"model": "policy", "prompt": text}, timeout=60
        ).json()["tokens"]
        if "</s>" not in text:  # which others read as the control item
            assert found == [1, *tokenizer.encode(text)]

        turns = (Message("system", "Be brief."), Message("user", text.replace("</s>", "")))
        rows = [{"role": turn.role, "content": turn.content} for turn in turns]
        found = httpx.post(
            f"{url}/tokenize", json={"model": "policy", "messages": rows}, timeout=60
        ).json()["tokens"]
        assert found == encode_prompt(tokenizer, turns)


def test_a_begun_answer_is_gone_on_with_as_here(url, model):
    """`continue_final_message` means the same on both."""
    tokenizer = Tokenizer.load(model)
    rows = [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "The cat"},
    ]
    found = httpx.post(
        f"{url}/tokenize",
        json={
            "model": "policy",
            "messages": rows,
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        timeout=60,
    ).json()["tokens"]
    ids = encode_prompt(tokenizer, (Message("user", "Name a colour."),))
    assert found == [*ids, *tokenizer.encode("The cat")]
