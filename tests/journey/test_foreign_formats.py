"""A byte-level model with a ChatML template of its own, through the command line."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_formats import LLAMA_3, NO_SYSTEM, make_byte_level
from commands import llama2
from servers import serving

from llama2 import records
from llama2.formats import checkpoint
from llama2.model.llama import Llama, LlamaConfig
from llama2.records import Dialog, messages_of
from llama2.stages import sft
from llama2.tokenizer import Tokenizer
from llama2.tokenizer.template import CHATML

DIALOGS = [
    Dialog(
        messages_of(
            [
                ("system", "Be brief."),
                ("user", f"How old is mill {number}?"),
                ("assistant", "Old."),
                ("user", "And the river?"),
                ("assistant", "Older."),
            ]
        )
    )
    for number in range(24)
]


def make_model(directory: Path, template: str | None) -> Path:
    """A small model with a byte-level tokenizer and this chat template."""
    tokenizer = make_byte_level(directory, template)
    shape = LlamaConfig(tokenizer.vocab_size, 32, 64, 2, 4, 2, 192)
    config = replace(shape, bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos)
    checkpoint.save(Llama(config, 0), directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), CHATML)


@pytest.fixture(scope="module")
def dialogs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dialogs") / "dialogs.jsonl"
    records.write(path, DIALOGS)
    return path


@pytest.fixture(scope="module")
def tuned(base: Path, dialogs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model after it has learnt the dialogs by heart."""
    out = tmp_path_factory.mktemp("tuned") / "sft"
    words: list[object] = ["sft", "--model", base, "--dialogs.all.path", dialogs, "--out", out]
    words += ["--sequence-length", 128, "--batch-size", 4, "--micro-batch-size", 4]
    words += ["--epochs", 20, "--heldout", 0, "--training.optimizer.learning-rate", 5e-3]
    assert llama2(*words) == 0
    return out


def settings(directory: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((directory / "tokenizer_config.json").read_text())
    return values


def test_tuning_learns_the_answers_alone_and_keeps_the_template(base: Path, tuned: Path) -> None:
    tokenizer = Tokenizer.load(base)
    ids, mask = sft.encode_for_training(tokenizer, DIALOGS[0])
    learnt = [token for token, flag in zip(ids, mask, strict=True) if flag]
    names = {token: name for name, token in tokenizer.controls.items()}
    text = "".join(names.get(token) or tokenizer.decode([token]) for token in learnt)
    assert text == "Old.<|im_end|>Older.<|im_end|>"

    summary = json.loads((tuned / "summary.json").read_text())
    assert summary["trained"] == 20 * len(learnt) * len(DIALOGS)
    assert settings(tuned)["chat_template"] == CHATML
    assert Tokenizer.load(tuned).is_same(tokenizer)


def test_a_cut_answer_has_no_end_to_learn(base: Path) -> None:
    tokenizer = Tokenizer.load(base)
    cut = Dialog(DIALOGS[0].messages, metadata={"cut": True})
    ids, mask = sft.encode_for_training(tokenizer, cut)
    assert tokenizer.decode(ids).endswith("Older.")
    assert mask[-1]
    assert ids.count(tokenizer.eos) == 4


def test_it_answers_in_chat(tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("How old is mill 3?\nAnd the river?\n"))
    words = ["chat", tuned, "--no-history", "--system", "Be brief.", "--temperature", 0]
    assert llama2(*words) == 0
    assert capsys.readouterr().out.split() == ["Old.", "Older."]


def test_it_answers_on_a_server(tuned: Path) -> None:
    with serving(tuned) as served:
        rows = [{"role": "system", "content": "Be brief."}]
        rows += [{"role": "user", "content": "How old is mill 3?"}]
        answer = served.post("chat/completions", messages=rows, temperature=0).json()
        choice = answer["choices"][0]
        assert choice["message"]["content"] == "Old."
        assert choice["finish_reason"] == "stop"

        begun = [*rows, {"role": "assistant", "content": "Ol"}]
        more = served.post(
            "chat/completions",
            messages=begun,
            temperature=0,
            continue_final_message=True,
            add_generation_prompt=False,
        ).json()
        assert more["choices"][0]["finish_reason"] == "stop"

        typed = served.post(
            "chat/completions",
            messages=[{"role": "user", "content": "<|im_end|>"}],
            max_tokens=1,
        ).json()
        tokenizer = Tokenizer.load(tuned)
        said = len(tokenizer.encode("<|im_end|>"))
        assert typed["usage"]["prompt_tokens"] > said > 3


def test_a_conversation_that_the_template_refuses_is_the_clients_fault(
    tmp_path: Path, one_line: Callable[..., str]
) -> None:
    model = make_model(tmp_path / "model", NO_SYSTEM)
    with serving(model) as served:
        rows = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
        answer = served.post("chat/completions", messages=rows)
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert "no place for a system turn (System role not supported)" in message
        assert str(tmp_path) not in message

    line = one_line("chat", model, "--no-history", "--system", "x")
    assert "tokenizer_config.json: the chat template has no place for a system turn" in line


HOSTILE = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ [1] | batch(1000000000, 0) | list }}",
    "{{ ('x' * 900000) | replace('x', 'y' * 900000) }}",
    "{% include 'other' %}",
    "{% from 'other' import x %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('No.\nNever.') }}",
    "{% for %}",
    "{{ foo.bar }}",
    "{{ bos_token }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_one_line(
    base: Path, tmp_path: Path, one_line: Callable[..., str], template: str
) -> None:
    tokenizer = Tokenizer.load(base)
    model = tmp_path / "model"
    tokenizer.with_chat_template(template).save(model)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (model / name).write_bytes((base / name).read_bytes())

    begin = time.process_time()
    line = one_line("chat", model, "--no-history")
    assert time.process_time() - begin < 3
    assert f"{model / 'tokenizer_config.json'}: the chat template" in line
    (model / "chat_template.jinja").write_text(template)
    line = one_line("serve", model, "--port", 0)
    assert f"{model / 'chat_template.jinja'}: the chat template" in line


def test_an_answer_stops_at_what_the_template_writes_behind_it(tmp_path: Path) -> None:
    """Llama 3's is another token than the EOS of its files."""
    model = make_model(tmp_path / "model", LLAMA_3)
    end = Tokenizer.load(model).controls["<|eot_id|>"]
    with serving(model) as served:
        answer = served.post(
            "chat/completions",
            messages=[{"role": "user", "content": "Hi"}],
            logit_bias={str(end): 100},
            max_tokens=8,
        ).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 1


def test_a_format_is_chosen_by_flag(tmp_path: Path, base: Path, dialogs: Path) -> None:
    (tmp_path / "own.jinja").write_text(LLAMA_3)
    words: list[object] = ["sft", "--model", base, "--dialogs.all.path", dialogs]
    words += ["--sequence-length", 128, "--training.plan.max-steps", 1, "--batch-size", 4]
    words += ["--out", tmp_path / "sft", "--chat-template", tmp_path / "own.jinja"]
    assert llama2(*words) == 0
    tokenizer = Tokenizer.load(tmp_path / "sft")
    assert tokenizer.template == LLAMA_3
    end = tokenizer.controls["<|eot_id|>"]
    assert (
        end in json.loads((tmp_path / "sft" / "generation_config.json").read_text())["eos_token_id"]
    )
