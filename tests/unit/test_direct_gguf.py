"""Verbs on a GGUF file as it is: they do what they do with the directory that it was made from."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import llama2

from llama2.config import build
from llama2.errors import UserError
from llama2.formats import checkpoint, gguf, hf
from llama2.hashing import hash_file
from llama2.model.scorer import Scorer
from llama2.serve import models
from llama2.serve.settings import ServeConfig
from llama2.tokenizer import CHAT_TEMPLATE

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy, every number kept."""
    target = tmp_path_factory.mktemp("direct") / "policy.gguf"
    gguf.write(hf.read(policy), target, precision="f32", chat_template=CHAT_TEMPLATE)
    return target


@pytest.fixture(scope="module")
def small(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy, quantized."""
    target = tmp_path_factory.mktemp("direct") / "policy.gguf"
    gguf.write(hf.read(policy), target, precision="q8_0", chat_template=CHAT_TEMPLATE)
    return target


def test_the_model_is_that_of_the_directory(policy: Path, file: Path) -> None:
    ours, theirs = checkpoint.load(policy).state_dict(), checkpoint.load(file).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert checkpoint.config_of(file) == checkpoint.config_of(policy)
    assert not checkpoint.is_scorer(file)
    assert checkpoint.exists(file)
    assert checkpoint.read_template(file) == checkpoint.read_template(policy)

    a, b = checkpoint.load_tokenizer(policy), checkpoint.load_tokenizer(file)
    assert a.is_same(b)
    assert (a.stops, a.eos, a.bos, a.template) == (b.stops, b.eos, b.bos, b.template)


def test_quantized_weights_come_in_the_precision_that_is_asked_for(small: Path) -> None:
    whole = checkpoint.load(small)
    halved = checkpoint.load(small, dtype=torch.bfloat16)
    for name, weight in whole.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(halved.state_dict()[name], weight.to(torch.bfloat16))

    kinds = {"model.embed_tokens.weight": torch.float32}
    scorer = checkpoint.load_scorer(small, dtype=lambda name: kinds.get(name, torch.bfloat16))
    assert isinstance(scorer, Scorer)
    assert scorer.model.embed_tokens.weight.dtype == torch.float32
    assert scorer.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_quantized_weights_are_loaded_in_inference_mode(small: Path) -> None:
    with torch.inference_mode():
        inside = checkpoint.load(small, dtype=torch.bfloat16)

    outside = checkpoint.load(small, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(weight, outside[name]) for name, weight in inside.state_dict().items())


def test_a_file_that_changes_is_read_again(file: Path, small: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(file, tmp_path / "m.gguf"))
    before = checkpoint.load_tokenizer(copy)
    assert checkpoint.load_tokenizer(copy) is before
    shutil.copy(small, copy)
    assert checkpoint.load_tokenizer(copy) is not before


def test_chat(
    policy: Path,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = []
    for place in (policy, file):
        monkeypatch.setattr("sys.stdin", io.StringIO("What is 3 plus 4?\nWho are you?\nSing.\n"))
        arguments = ("--temperature", 2, "--max-tokens", 20, "--precision", "fp32")
        assert llama2("chat", place, "--each-line", *arguments) == 0
        answers.append(capsys.readouterr().out)

    assert answers[0] == answers[1]
    assert answers[0].strip()


def test_serve(file: Path) -> None:
    """A client calls it by the name of the file without its ending."""
    config = build(ServeConfig, {"checkpoints": [str(file)], "precision": "fp32", "slots": 1})
    assert config.model_names == ("policy",)
    assert models.check(file) == "chat"

    served = models.load(config)
    try:
        assert served["policy"].created == int(file.stat().st_mtime)
        assert served["policy"].tokenizer.template == CHAT_TEMPLATE
    finally:
        served["policy"].worker.stop()


def test_stages(
    policy: Path, file: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights that are trained and the answers that are drawn are the same to the bit."""
    for place, out in ((policy, tmp_path / "a"), (file, tmp_path / "b")):
        common = ("--training.plan.max-steps", 2, "--seed", 3)
        data = ("--dialogs.all.path", world / "demonstrations.jsonl", "--sequence-length", 192)
        assert llama2("sft", "--model", place, *data, *common, "--out", out) == 0

    assert hash_file(tmp_path / "a/model.safetensors") == hash_file(
        tmp_path / "b/model.safetensors"
    )
    manifest = json.loads((tmp_path / "b/manifest.json").read_text())
    assert manifest["inputs"]["model"] == hash_file(file)
    assert manifest["config"]["model"] == str(file)

    # repeated, the run is known as finished; with another file it is refused
    again = ("sft", "--model", file, *data, *common, "--out", tmp_path / "b")
    assert llama2(*again) == 0
    capsys.readouterr()
    other = Path(shutil.copy(file, tmp_path / file.name))
    other.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert llama2("sft", "--model", other, *again[3:]) == 2
    assert "changed: model" in capsys.readouterr().err


def test_evaluation_and_the_choice_of_a_version(
    policy: Path, file: Path, prompts: Path, tmp_path: Path
) -> None:
    judge = tmp_path / "judge"
    checkpoint.save(checkpoint.load_scorer(file), judge)
    checkpoint.load_tokenizer(file).save(judge)
    common = ("--prompts", prompts, "--rewards.helpful", judge, "--rewards.safe", judge)
    sample = ("--sample.max-tokens", 5, "--sample.slots", 2)
    given = ("--candidate", policy, "--predecessor", file, *common, *sample)
    assert llama2("select", *given, "--out", tmp_path / "kept") == 0

    # equal models: neither wins, so the predecessor stays, as a directory like any other
    kept = json.loads((tmp_path / "kept/verdict.json").read_text())["kept"]
    assert kept == "predecessor"
    ours, theirs = (checkpoint.load(place) for place in (tmp_path / "kept", policy))
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    assert checkpoint.load_tokenizer(tmp_path / "kept").template == CHAT_TEMPLATE


def test_a_dry_run_knows_the_shape(
    file: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--dialogs.all.path", world / "demonstrations.jsonl", "--out", tmp_path / "out")
    assert llama2("sft", "--model", file, *data, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == checkpoint.config_of(file).parameters()


def test_text_is_tokenized_for_it(file: Path, tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    for n in range(9):
        text = f"Tom number {n} has a mill by the river, and {n} hens that he feeds at noon. "
        (documents / f"{n}.txt").write_text(text * 5)

    clean = ("--sources.a.path", documents, "--heldout", 0.5, "--out", tmp_path / "clean")
    assert llama2("clean", *clean) == 0
    shards = ("--documents", tmp_path / "clean", "--out", tmp_path / "shards")
    assert llama2("tokenize", *shards, "--tokenizer", file) == 0
    made = checkpoint.open_tokenizer(tmp_path / "shards")
    assert made.is_same(checkpoint.open_tokenizer(file))


def test_what_must_be_imported_first(
    policy: Path, file: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "model.bin"
    assert llama2("export", policy, "--to", "llama2c", "--out", other) == 0
    capsys.readouterr()
    with pytest.raises(
        UserError, match=r"llama2c is not used as it is; llama2 import .*model\.bin"
    ):
        checkpoint.load(other)

    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(file, folder / "m.gguf")
    data = ("--dialogs.all.path", world / "demonstrations.jsonl", "--out", tmp_path / "out")
    for verb in (("chat",), ("serve",), ("sft", *data, "--model")):
        assert llama2(*verb, folder) == 2
        assert f"give the file itself: {folder / 'm.gguf'}" in capsys.readouterr().err


def test_damage_is_one_line(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = small.read_bytes()
    for name, data in (
        ("short", content[: len(content) // 2]),
        ("head", content[:100]),
        ("magic", b"GGUF"),
        ("empty", b""),
        ("other", b"GGML" + content[4:]),
    ):
        damaged = tmp_path / f"{name}.gguf"
        damaged.write_bytes(data)
        assert llama2("chat", damaged) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
