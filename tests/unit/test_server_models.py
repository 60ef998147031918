"""What may be served, under which name, and what is refused before the port is opened."""

import json
import shutil
import socket
import sys

import httpx
import pytest
from commands import vouch
from servers import serving

from llama2 import serve
from llama2.formats import checkpoint
from llama2.generate.score import score_rows
from llama2.records import messages_of
from llama2.serve.models import RewardModel
from llama2.tokenizer.template import encode_dialog

ASK = [{"role": "user", "content": "Name a colour."}]


def test_what_cannot_be_served_is_refused(policy, scorers, tmp_path, one_line):
    assert "no such checkpoint directory" in one_line("serve", tmp_path / "none")
    assert "two models are called 'policy'; name them: --names A B" in one_line(
        "serve", policy, policy
    )
    assert "put a language model first" in one_line("serve", scorers[0], policy)
    assert "1 checkpoints and 2 names" in one_line("serve", policy, "--names", "a", "b")
    assert "this is a language model, a reward model was expected" in one_line(
        "serve", policy, "--port", 0, "--safety.model", policy
    )

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"cannot listen at 127.0.0.1:{port} (" in one_line("serve", policy, "--port", port)

    bare = tmp_path / "bare"
    shutil.copytree(policy, bare)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": "{{ bos_token }}"})
    )
    vouch(bare)
    assert "tokenizer_config.json: the chat template does not write what the user says" in one_line(
        "serve", bare, "--port", 0
    )

    for name in ("tokenizer.model", "tokenizer.json"):
        (bare / name).unlink()

    vouch(bare)
    assert "tokenizer.model: no such file" in one_line("serve", bare, "--port", 0)


def test_a_missing_library_is_named(policy, one_line, monkeypatch):
    for name in ("lifecycle", "app", "metrics"):
        monkeypatch.delitem(sys.modules, f"llama2.serve.{name}")
        monkeypatch.delattr(serve, name)

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert one_line("serve", policy, "--port", 0).endswith("pip install 'llama2[serve]'")


def test_a_reward_model_alone_only_scores(scorers):
    with serving(scorers[0]) as served:
        conversation = [*ASK, {"role": "assistant", "content": "Blue."}]
        body = served.post("score", messages=conversation).json()
        assert body["model"] == "helpful"
        answer = served.post("chat/completions", messages=ASK)
        assert answer.status_code == 404
        assert answer.json()["error"]["param"] == "model"
        model = served.models.find(RewardModel, None)
        ids = encode_dialog(
            model.tokenizer, messages_of((turn["role"], turn["content"]) for turn in conversation)
        )[0]
        assert body["score"] == pytest.approx(
            score_rows(checkpoint.load_scorer(scorers[0]), [ids], "fp32")[0], abs=1e-5
        )
        assert body["usage"]["prompt_tokens"] == len(ids)
        long = served.post(
            "score", messages=[{"role": "user", "content": "a " * 400}, conversation[1]]
        )
        assert long.json()["error"]["code"] == "context_length_exceeded"


def test_several_models_have_their_names(policy):
    with serving(policy, policy, names=("one", "two"), slots=2) as served:
        for name in ("one", "two"):
            assert (
                served.post("chat/completions", model=name, messages=ASK, max_tokens=2).json()[
                    "model"
                ]
                == name
            )

        assert served.post("chat/completions", messages=ASK, max_tokens=2).json()["model"] == "one"


# --- the safety gate ---


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_gate_replaces_what_it_finds_unsafe(policy, scorers, threshold):
    asked = {
        "messages": ASK,
        "seed": 1,
        "max_tokens": 20,
        "logprobs": True,
        "logit_bias": {"2": -100},
    }
    with serving(policy) as served:
        free = served.post("chat/completions", **asked).json()["choices"][0]

    with serving(
        policy, judge=scorers[1], safety={"threshold": threshold, "refusal": "No."}
    ) as served:
        body = served.post("chat/completions", **asked).json()
        verdict, choice = body["llama2"]["safety"], body["choices"][0]
        assert verdict["replaced"] == bool(threshold)
        assert 0 < verdict["probability"] < 1

        if threshold:
            assert choice["message"]["content"] == "No."
            assert choice["finish_reason"] == "content_filter"
            assert choice["logprobs"]["content"] == []
        else:
            assert choice["message"] == free["message"]
            assert choice["logprobs"] == free["logprobs"]

        chunks = [
            json.loads(line[6:])
            for line in httpx.post(
                f"{served.url}/v1/chat/completions", json={**asked, "stream": True}
            ).text.split("\n\n")[:-2]
        ]
        said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert said == choice["message"]["content"]
        assert chunks[-1]["llama2"] == body["llama2"]
        several = served.post("completions", prompt=["a", "b"], n=2, seed=1).json()["choices"]
        assert len({each["llama2"]["safety"]["probability"] for each in several}) > 1

        if threshold:
            assert {each["text"] for each in several} == {"No."}


def test_an_answer_ends_at_every_id_that_the_model_names(policy, tmp_path):
    several = tmp_path / "several"
    shutil.copytree(policy, several)
    (several / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5, 300]}))
    (several / "checksums.json").unlink()

    with serving(several) as served:
        for end in (2, 5, 300):
            asked = {
                "messages": ASK,
                "max_tokens": 40,
                "temperature": 0,
                "logit_bias": {str(end): 100},
            }
            body = served.post("chat/completions", **asked).json()
            assert body["choices"][0]["finish_reason"] == "stop"
            assert body["choices"][0]["message"]["content"] == ""
            assert body["usage"]["completion_tokens"] == 1

        asked = {
            "prompt": "a",
            "max_tokens": 7,
            "temperature": 0,
            "logit_bias": {"300": 100},
            "ignore_eos": True,
        }
        assert served.post("completions", **asked).json()["usage"]["completion_tokens"] == 7


def test_a_model_that_says_nothing_is_refused_by_its_name(ruined, one_line):
    assert "ruined: the model's log-probabilities are not finite" in one_line(
        "serve", ruined, "--port", 0
    )
