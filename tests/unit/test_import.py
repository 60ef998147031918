"""`llama2 import`: every format through the command line, what is said, and what is refused with
nothing written."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import llama2
from safetensors.torch import load_file, save_file
from sources import model_of, same, state

from llama2.formats import checkpoint, hf, llama2c, meta
from llama2.formats.detect import open_model
from llama2.model.llama import LlamaConfig
from llama2.tokenizer import CHAT_TEMPLATE
from llama2.tokenizer.tokenizer import Tokenizer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture
def model(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A checkpoint with wide weights and its tokenizer."""
    checkpoint.save(model_of(LlamaConfig(tokenizer.vocab_size, **SHAPE)), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def as_hf(model: Path, out: Path) -> Path:
    return Path(shutil.copytree(model, out))


def as_pickles(model: Path, out: Path) -> Path:
    shutil.copytree(model, out)
    torch.save(load_file(out / "model.safetensors"), out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()
    (out / "checksums.json").unlink()

    return out


def as_adapter(model: Path, out: Path) -> Path:
    """One that changes nothing: B is zero."""
    out.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(model)}
    (out / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(2, 32), name.format("B"): torch.zeros(32, 2)},
        out / "adapter_model.safetensors",
    )

    return out


def as_meta(model: Path, out: Path) -> Path:
    meta.write(hf.read(model), out, shards=2)
    return out


def as_llama2c(model: Path, out: Path) -> Path:
    out.mkdir()
    llama2c.write(hf.read(model), out / "model.bin")
    return out / "model.bin"


def as_gguf(model: Path, out: Path) -> Path:
    gguf = pytest.importorskip("llama2.formats.gguf")
    pytest.importorskip("gguf")
    out.mkdir()
    gguf.write(hf.read(model), out / "model.gguf", precision="f32")

    return out / "model.gguf"


FORMATS: list[tuple[Callable[[Path, Path], Path], str]] = [
    (as_hf, "Hugging Face"),
    (as_pickles, "Hugging Face"),
    (as_adapter, "PEFT adapter of Hugging Face"),
    (as_meta, "meta"),
    (as_llama2c, "llama2c"),
    (as_gguf, "gguf"),
]


@pytest.mark.parametrize(("write", "told"), FORMATS, ids=[write.__name__ for write, _ in FORMATS])
def test_every_format_comes_in_by_the_same_command(
    tmp_path: Path,
    model: Path,
    tokenizer: Tokenizer,
    write: Callable[[Path, Path], Path],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(model, tmp_path / "theirs")
    assert llama2("import", path, "--out", tmp_path / "ours") == 0
    heard = capsys.readouterr()
    assert heard.out == f"{tmp_path / 'ours'}\n"
    assert told.lower() in heard.err.lower()
    assert "2 layers of width 32, 4 heads, 2 for keys and values" in heard.err
    assert "all numbers finite; the tokenizer has 420 pieces, as the model" in heard.err
    assert same(state(hf.read(tmp_path / "ours")), state(hf.read(model)))
    text = "[INST] How old is the mill? [/INST] été 🙂"
    assert Tokenizer.load(tmp_path / "ours").encode(text) == tokenizer.encode(text)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "checksums.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    tokens = torch.tensor([[1, 300, 17, 5]])

    with torch.no_grad():
        assert torch.allclose(
            checkpoint.load(tmp_path / "ours")(tokens), checkpoint.load(model)(tokens), atol=1e-5
        )


def test_what_came_in_is_talked_to_and_trained_at_once(
    tmp_path: Path,
    model: Path,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        llama2(
            "import",
            as_meta(model, tmp_path / "theirs"),
            "--out",
            tmp_path / "ours",
            "--dtype",
            "bf16",
            "--chat-template",
            "llama2",
        )
        == 0
    )
    assert {stored.dtype for stored in hf.read(tmp_path / "ours").tensors.values()} == {
        torch.bfloat16
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert llama2("chat", tmp_path / "ours", "--max-tokens", 4, "--no-history") == 0
    assert (
        llama2(
            "sft",
            "--model",
            tmp_path / "ours",
            "--dialogs.all.path",
            world / "demonstrations.jsonl",
            "--out",
            tmp_path / "sft",
            "--sequence-length",
            96,
            "--training.plan.max-steps",
            1,
            "--batch-size",
            2,
        )
        == 0
    )
    assert checkpoint.load(tmp_path / "sft").config == checkpoint.config_of(tmp_path / "ours")


def test_transformers_loads_what_came_in(tmp_path: Path, model: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer_file = cut_tokenizer(tokenizer, tmp_path / "cut.model", 415)
    assert (
        llama2(
            "import",
            as_pickles(model, tmp_path / "theirs"),
            "--tokenizer",
            tokenizer_file,
            "--out",
            tmp_path / "ours",
        )
        == 0
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.tensor([[1, 300, 17, 5]])

    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, checkpoint.load(model)(tokens), atol=1e-4)

    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")(
        "How old is the mill?"
    ).input_ids
    assert ids == [1, *Tokenizer.load(tokenizer_file).encode("How old is the mill?")]


def test_only_the_precision_asked_for_changes(tmp_path: Path, model: Path) -> None:
    assert llama2("import", model, "--out", tmp_path / "ours", "--dtype", "fp16") == 0
    assert same(
        state(hf.read(tmp_path / "ours")),
        {name: tensor.half() for name, tensor in state(hf.read(model)).items()},
    )
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "float16"


def test_a_dry_run_says_what_it_found_and_writes_nothing(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llama2("import", model, "--out", tmp_path / "ours", "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert "a language model of" in told["recognised"]
    assert not (tmp_path / "ours").exists()


# --- tokenizers ---
def cut_tokenizer(tokenizer: Tokenizer, file: Path, size: int) -> Path:
    """The same tokenizer without its last pieces."""
    from llama2.tokenizer import sentencepiece_model

    file.parent.mkdir(exist_ok=True)
    file.write_bytes(tokenizer.model)
    whole = sentencepiece_model.load(file)
    file.write_bytes(sentencepiece_model.build(sentencepiece_model.Vocabulary(whole.items[:size])))

    return file


def test_a_vocabulary_larger_than_the_tokenizer_is_padded(
    tmp_path: Path, model: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = cut_tokenizer(tokenizer, tmp_path / "cut.model", 415)
    assert llama2("import", model, "--tokenizer", smaller, "--out", tmp_path / "ours") == 0
    assert (
        "the tokenizer has 415 pieces, the model 420: the other 5 are padding now"
        in capsys.readouterr().err
    )
    padded, before = Tokenizer.load(tmp_path / "ours"), Tokenizer.load(smaller)
    assert padded.vocab_size == 420

    for text in ("the old mill [PAD417] [INST] x", "été\n", "[PAD415]"):
        assert padded.encode(text) == before.encode(text)

    assert padded.decode([*before.encode("mill"), 417, 419]) == "mill"


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(
    tmp_path: Path, model: Path, tokenizer: Tokenizer, one_line: Callable[..., str]
) -> None:
    checkpoint.save(model_of(LlamaConfig(400, **SHAPE)), model)
    assert re.search(
        "the tokenizer has 420 pieces, the model 400; give the model's own",
        one_line("import", model, "--out", tmp_path / "ours"),
    )
    assert not (tmp_path / "ours").exists()


def test_a_checkpoint_without_a_tokenizer_comes_in_with_a_warning(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.model", "tokenizer.json"):
        (model / name).unlink()

    assert llama2("import", model, "--out", tmp_path / "ours") == 0
    assert "no tokenizer came with it" in capsys.readouterr().err
    assert not (tmp_path / "ours" / "tokenizer.model").exists()


def test_a_directory_as_transformers_5_leaves_it_comes_in_whole(
    tmp_path: Path, model: Path, tokenizer: Tokenizer, one_line: Callable[..., str]
) -> None:
    (model / "tokenizer.model").unlink()
    assert llama2("import", model, "--out", tmp_path / "ours") == 0
    again = Tokenizer.load(tmp_path / "ours")
    assert all(
        again.encode(text) == tokenizer.encode(text)
        for text in ("the  old mill", "été\n", "</s>", "    x")
    )
    values = json.loads((model / "tokenizer.json").read_bytes())
    (model / "tokenizer.json").write_text(json.dumps(values | {"decoder": {"type": "ByteLevel"}}))
    said = one_line("import", model, "--out", tmp_path / "none")
    assert said.startswith(
        f"{model / 'tokenizer.json'}: byte_fallback is True, which no byte-level"
    )
    assert not (tmp_path / "none").exists()


def test_added_tokens_are_control_items_in_every_format(
    tmp_path: Path, model: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tune whose answers end with an item that its trainer added behind those of
    tokenizer.model."""
    checkpoint.save(model_of(LlamaConfig(422, **SHAPE)), model)
    (model / "tokenizer.json").unlink()
    (model / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 420, "<|im_start|>": 421}))
    (model / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    )
    assert llama2("import", model, "--out", tmp_path / "ours") == 0
    assert (
        "422 pieces, as the model, of which no text spells '<|im_end|>', '<|im_start|>'"
        in capsys.readouterr().err
    )
    (tmp_path / "back").mkdir()

    for form, target in (("hf", "hf"), ("meta", "meta"), ("gguf", "gguf/model.gguf")):
        assert llama2("export", tmp_path / "ours", "--to", form, "--out", tmp_path / target) == 0
        assert llama2("import", tmp_path / target, "--out", tmp_path / "back" / form) == 0
        found = Tokenizer.load(tmp_path / "back" / form)
        assert found.controls == {"<s>": 1, "</s>": 2, "<|im_end|>": 420, "<|im_start|>": 421}
        assert found.encode("<|im_start|>x<|im_end|>") == tokenizer.encode(
            "<|im_start|>x<|im_end|>"
        )


def test_eos_is_told_as_the_model_has_it(tmp_path: Path, model: Path) -> None:
    """A template writes `eos_token`, and trainers put it behind answers: it stays what it was if
    the format does."""
    checkpoint.save(model_of(LlamaConfig(422, **SHAPE, eos_token_id=420)), model)
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (model / name).unlink()

    (model / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 420, "<|im_start|>": 421}))
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": "<|im_end|>",
                "extra_special_tokens": ["<|im_start|>"],
                "chat_template": template,
            }
        )
    )
    assert llama2("import", model, "--out", tmp_path / "ours") == 0
    assert llama2("import", model, "--chat-template", "llama2", "--out", tmp_path / "llama2") == 0
    assert llama2("export", tmp_path / "ours", "--to", "hf", "--out", tmp_path / "again") == 0

    for place, eos in (("ours", "<|im_end|>"), ("again", "<|im_end|>"), ("llama2", "</s>")):
        told = [
            json.loads((tmp_path / place / name).read_bytes())["eos_token"]
            for name in ("tokenizer_config.json", "special_tokens_map.json")
        ]
        assert told == [eos, eos], place
        assert Tokenizer.load(tmp_path / place).eos == 2


def test_files_of_a_tokenizer_that_disagree_are_said(
    tmp_path: Path, model: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((model / "tokenizer.json").read_bytes())
    values["model"]["merges"].reverse()
    (model / "tokenizer.json").write_text(json.dumps(values))
    assert llama2("import", model, "--out", tmp_path / "ours") == 0
    said = capsys.readouterr().err
    assert (
        f"{model / 'tokenizer.json'} is not the tokenizer of the tokenizer.model beside it" in said
    )
    assert Tokenizer.load(tmp_path / "ours").fingerprint == tokenizer.fingerprint
    assert llama2("verify", model, tmp_path / "ours") == 1
    assert "is not the tokenizer of the tokenizer.model beside it" in capsys.readouterr().out
    assert llama2("verify", tmp_path / "ours", tmp_path / "ours") == 0


def test_a_tokenizer_under_another_name_is_pointed_out_and_taken(
    tmp_path: Path, model: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = as_llama2c(model, tmp_path / "theirs").with_name("tokenizer.bin")
    for name in ("tokenizer.model", "tokenizer.json"):
        (model / name).unlink()

    shutil.copy(theirs, model / "tok512.bin")
    assert llama2("import", model, "--out", tmp_path / "without") == 0
    assert f"it may be {model / 'tok512.bin'}" in capsys.readouterr().err
    assert (
        llama2("import", model, "--tokenizer", model / "tok512.bin", "--out", tmp_path / "ours")
        == 0
    )
    again = Tokenizer.load(tmp_path / "ours")
    assert all(
        again.encode(text) == tokenizer.encode(text) for text in ("the  old mill", "été\n", "</s>")
    )


# --- what is refused ---
class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


CHANGES: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral"},
    "rope": {
        "rope_parameters": None,
        "rope_scaling": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]},
    },
    "window": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 16,
    },
}


def faults(tmp_path: Path, model: Path) -> dict[str, tuple[Path, str]]:
    """What is given to the command, and what it must say."""
    made = {
        name: tmp_path / name
        for name in (
            "cut",
            "code",
            "shape",
            "mixtral",
            "rope",
            "window",
            "shard",
            "nothing",
            "text",
            "one",
        )
    }
    (shutil.copytree(model, made["cut"]) / "checksums.json").unlink()
    cut(made["cut"] / "model.safetensors")
    torch.save(
        {"bomb": Bomb(tmp_path / "it ran")}, as_pickles(model, made["code"]) / "pytorch_model.bin"
    )
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(31)
    torch.save(weights, as_pickles(model, made["shape"]) / "pytorch_model.bin")
    for name, change in CHANGES.items():
        as_hf(model, made[name])
        values = json.loads((model / "config.json").read_text()) | change
        (made[name] / "config.json").write_text(json.dumps(values))

    (as_meta(model, made["shard"]) / "consolidated.01.pth").unlink()
    made["nothing"].mkdir()
    (made["nothing"] / "model.gguf").write_bytes(b"GGUF")
    made["text"].write_text("not a checkpoint at all, but long enough to look like one")

    return {
        "cut": (made["cut"], r"model\.safetensors: truncated"),
        "code": (
            made["code"],
            r"pytorch_model\.bin: refused, for reading it would call 'posix\.mkdir'",
        ),
        "shape": (made["shape"], r"model\.norm\.weight \[31\] instead of \[32\]"),
        "mixtral": (made["mixtral"], r"model_type is 'mixtral'"),
        "rope": (
            made["rope"],
            r"rope_scaling\.rope_type is 'longrope', which is not known; .* default, linear, dyn",
        ),
        "window": (made["window"], r"sliding_window is 16, Llama 2 has 0"),
        "missing shard": (made["shard"], r"one of 2 shards, of which 1 are here"),
        "half a llama2.c file": (cut(as_llama2c(model, made["one"])), r"model\.bin"),
        "the file beside": (
            model / "model.safetensors",
            "one file of a checkpoint; give the directory it lies in",
        ),
        "a directory of something else": (
            made["nothing"],
            r"though model\.gguf is in it; give the file itself",
        ),
        "a text": (
            made["text"],
            r"no checkpoint; looked for a directory with config\.json .* a \.gguf file",
        ),
        "nowhere": (tmp_path / "nowhere", "no such file"),
        "an empty directory": (
            Path(os.makedirs(tmp_path / "empty") or tmp_path / "empty"),
            "no checkpoint; looked",
        ),
    }


def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, model: Path, one_line: Callable[..., str]
) -> None:
    (tmp_path / "there").mkdir()
    for name, (path, message) in faults(tmp_path, model).items():
        for out in (tmp_path / "ours", tmp_path / "there"):
            said = one_line("import", path, "--out", out)
            assert re.search(message, said), f"{name}: {said}"
            assert str(path) in said, name

        assert not (tmp_path / "ours").exists()
        assert not list((tmp_path / "there").iterdir())
        assert not list(tmp_path.glob(".*"))

    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_found_and_named(
    tmp_path: Path, model: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][47, 31] = value
    save_file(weights, model / "model.safetensors")
    (model / "checksums.json").unlink()
    assert llama2("import", model, "--out", tmp_path / "ours") == 2
    assert re.search(
        r"error: .*model\.safetensors: tensor 'model\.layers\.1\.mlp\.up_proj\.weight' has numbers that "
        r"are infinite or undefined",
        capsys.readouterr().err,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_is_there_already_stays(
    tmp_path: Path, model: Path, one_line: Callable[..., str]
) -> None:
    before = {path: path.read_bytes() for path in model.iterdir()}
    assert "something is there already; choose another --out" in one_line(
        "import", model, "--out", model
    )
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert llama2("import", model, "--out", tmp_path / "empty") == 0
    assert same(state(open_model(tmp_path / "empty")), state(open_model(model)))


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    tmp_path: Path, model: Path, one_line: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9, 9)
    )
    assert re.search(
        r"the weights take 0\.\d GB, and 0\.0 GB are free",
        one_line("import", model, "--out", tmp_path / "a" / "ours"),
    )
    assert not (tmp_path / "a").exists()


# --- chat templates ---
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}"
    "{% endfor %}{{ '<|assistant|>\\n' }}"
)


def asked_by(model: Path, template: str | None) -> Path:
    """A model whose directory has another chat template, or none."""
    Tokenizer.load(model).with_chat_template(template).save(model)
    (model / "checksums.json").unlink()
    return model


def settings(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "tokenizer_config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (ZEPHYR, r"its chat template is another's \(Zephyr\), and is kept\n"),
        (None, "no chat template came with it: .*--chat-template llama2"),
    ],
)
def test_the_template_of_others_is_kept_and_used(
    tmp_path: Path,
    model: Path,
    world: Path,
    template: str | None,
    told: str,
    one_line: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither import nor export nor training launders it; a model without one is taught
    Llama 2's."""
    asked_by(model, template)
    assert llama2("import", model, "--out", tmp_path / "in") == 0
    assert re.search(told, capsys.readouterr().err)
    assert llama2("export", tmp_path / "in", "--to", "hf", "--out", tmp_path / "out") == 0
    assert llama2("export", tmp_path / "in", "--to", "gguf", "--out", tmp_path / "m.gguf") == 0
    assert llama2("import", tmp_path / "m.gguf", "--out", tmp_path / "again") == 0

    for directory in (model, tmp_path / "in", tmp_path / "out", tmp_path / "again"):
        assert settings(directory).get("chat_template") == template

    words = ("chat", tmp_path / "again", "--no-history", "--max-tokens", 4)
    if template is None:
        assert "there is no chat template" in one_line(*words)
        assert "there is no chat template" in one_line("serve", tmp_path / "again", "--port", 0)
    else:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        assert llama2(*words) == 0

    tuned = (
        *("sft", "--model", tmp_path / "in", "--dialogs.all.path", world / "demonstrations.jsonl"),
        *("--sequence-length", 96, "--training.plan.max-steps", 1, "--batch-size", 2),
    )
    assert llama2(*tuned, "--out", tmp_path / "sft") == 0
    assert settings(tmp_path / "sft")["chat_template"] == (template or CHAT_TEMPLATE)
    assert llama2(*tuned, "--out", tmp_path / "named", "--chat-template", "llama2") == 0
    assert settings(tmp_path / "named")["chat_template"] == CHAT_TEMPLATE


def test_llama_2s_template_is_written_if_asked(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked_by(model, ZEPHYR)
    assert llama2("import", model, "--out", tmp_path / "in", "--chat-template", "llama2") == 0
    assert "Llama 2's, as asked; the model's was another's (Zephyr)" in capsys.readouterr().err
    assert settings(tmp_path / "in")["chat_template"] == CHAT_TEMPLATE
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert llama2("chat", tmp_path / "in", "--max-tokens", 4, "--no-history") == 0


def test_a_template_in_a_file_of_its_own_comes_in(tmp_path: Path, model: Path) -> None:
    """As transformers 5 writes it. An adapter's goes before its base's."""
    (model / "chat_template.jinja").write_text(ZEPHYR)
    assert llama2("import", model, "--out", tmp_path / "in") == 0
    assert settings(tmp_path / "in")["chat_template"] == ZEPHYR
    adapter = as_adapter(model, tmp_path / "adapter")
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": "theirs"}))
    assert llama2("import", adapter, "--out", tmp_path / "merged") == 0
    assert settings(tmp_path / "merged")["chat_template"] == "theirs"


# --- where answers begin and end ---
def edited(model: Path, name: str = "config.json", **changes: Any) -> Path:
    file = model / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))
    (model / "checksums.json").unlink(missing_ok=True)

    return model


def ends(directory: Path) -> list[Any]:
    return [
        json.loads((directory / name).read_text())["eos_token_id"]
        for name in ("config.json", "generation_config.json")
    ]


def test_an_end_behind_the_items_of_the_tokenizer_is_kept_everywhere(
    tmp_path: Path, model: Path, tokenizer: Tokenizer, world: Path
) -> None:
    """As of a model tuned for ChatML, whose end of a turn was added behind the items."""
    smaller = cut_tokenizer(tokenizer, tmp_path / "cut.model", 418)
    edited(edited(model, eos_token_id=418), "generation_config.json", eos_token_id=418)
    assert llama2("import", model, "--tokenizer", smaller, "--out", tmp_path / "in") == 0
    assert ends(tmp_path / "in") == [[418, 2], [418, 2]]
    assert Tokenizer.load(tmp_path / "in").stops == (2, 418)
    assert llama2("export", tmp_path / "in", "--to", "hf", "--out", tmp_path / "out") == 0
    assert ends(tmp_path / "out") == [[418, 2], [418, 2]]
    assert llama2("export", tmp_path / "in", "--to", "gguf", "--out", tmp_path / "m.gguf") == 0
    assert llama2("import", tmp_path / "m.gguf", "--out", tmp_path / "again") == 0
    assert ends(tmp_path / "again") == [[418, 2], [418, 2]]
    assert (
        llama2(
            "sft",
            "--model",
            tmp_path / "in",
            "--dialogs.all.path",
            world / "demonstrations.jsonl",
            "--out",
            tmp_path / "sft",
            "--sequence-length",
            96,
            "--training.plan.max-steps",
            1,
            "--batch-size",
            2,
        )
        == 0
    )
    assert ends(tmp_path / "sft") == [[418, 2], [418, 2]]


def test_a_model_tuned_where_it_lies_ends_by_what_it_was_taught(
    tmp_path: Path, model: Path, world: Path
) -> None:
    edited(model, eos_token_id=7)
    edited(model, "generation_config.json", eos_token_id=[7, 9])
    assert (
        llama2(
            "sft",
            "--model",
            model,
            "--dialogs.all.path",
            world / "demonstrations.jsonl",
            "--out",
            tmp_path / "sft",
            "--sequence-length",
            96,
            "--training.plan.max-steps",
            1,
            "--batch-size",
            2,
        )
        == 0
    )
    assert ends(tmp_path / "sft") == [[7, 9, 2], [7, 9, 2]]


def test_another_begin_than_the_tokenizers_is_refused_in_every_format(
    tmp_path: Path, model: Path, one_line: Callable[..., str]
) -> None:
    edited(model, bos_token_id=0)
    file = as_gguf(model, tmp_path / "theirs")
    for path in (model, file):
        assert one_line("import", path, "--out", tmp_path / "in") == (
            f"{path}: the model's bos_token_id is 0, the tokenizer's is 1; if the model was trained with this "
            "tokenizer, set bos_token_id to 1"
        )

    for words in (("chat", model, "--no-history"), ("serve", model, "--port", 0)):
        assert "the model's bos_token_id is 0, the tokenizer's is 1" in one_line(*words)


def test_an_unknown_key_is_said(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(model, my_note="from Bob")
    assert llama2("import", model, "--out", tmp_path / "in") == 0
    assert "config.json: unknown and left out: my_note" in capsys.readouterr().err
    checkpoint.load(model)
    assert "config.json: unknown and left out: my_note" in capsys.readouterr().err


def test_an_unknown_key_commands_no_terminal(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(model, **{"my\x1b[2J": "from Bob"})
    checkpoint.load(model)
    heard = capsys.readouterr().err
    assert "unknown and left out: my" in heard
    assert "\x1b" not in heard


def test_what_quantized_weights_grow_to_is_said_with_the_flag_for_less(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("llama2.formats.gguf")
    pytest.importorskip("gguf")
    gguf.write(hf.read(model), tmp_path / "small.gguf", precision="q4_0")
    count = sum(stored.numel for stored in hf.read(model).tensors.values())
    there = (tmp_path / "small.gguf").stat().st_size
    assert llama2("import", tmp_path / "small.gguf", "--out", tmp_path / "a") == 0
    assert (
        f"{tmp_path / 'a'}: the weights take {4 * count / 1e6:.1f} MB, in {tmp_path / 'small.gguf'} "
        f"{there / 1e6:.1f} MB; --dtype bf16 takes {2 * count / 1e6:.1f} MB\n"
    ) in capsys.readouterr().err
    assert (
        llama2("import", tmp_path / "small.gguf", "--out", tmp_path / "b", "--dtype", "bf16") == 0
    )
    assert (
        f"{tmp_path / 'b'}: the weights take {2 * count / 1e6:.1f} MB\n" in capsys.readouterr().err
    )
    assert llama2("import", model, "--out", tmp_path / "c") == 0
    assert (
        f"{tmp_path / 'c'}: the weights take {4 * count / 1e6:.1f} MB\n" in capsys.readouterr().err
    )
