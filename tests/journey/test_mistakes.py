"""What users get wrong: exit status 2, one line with cause and cure, and nothing lost or
overwritten."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import in_a_process, llama2
from safetensors.torch import load_file, save_file

from llama2 import runs
from llama2.formats import checkpoint
from llama2.model.llama import Llama, LlamaConfig
from llama2.recipe.workers import context, preload
from llama2.tokenizer.train import train

Refused = Callable[..., str]
GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
PAIR = {
    "id": "a",
    "prompt": [{"role": "user", "content": "Hi"}],
    "responses": [{"text": "x"}, {"text": "y"}],
    "preferred": 0,
    "degree": "better",
}


def line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def sft(model: Path, file: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        "sft",
        "--model",
        model,
        "--dialogs.mine.path",
        file,
        "--out",
        out,
        "--sequence-length",
        128,
        "--batch-size",
        4,
        "--training.optimizer.learning-rate",
        1e-3,
        *more,
    )


# --- configuration ---


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["stf"], "unknown verb 'stf'; did you mean 'sft'?"),
        (
            ["sft", "--training.optimizer.learning-rat", "1e-4"],
            "unknown flag '--training.optimizer.learning-rat'; did you mean '--training.optimizer.learning-rate'?",
        ),
        (
            ["sft", "--model", "m", "--dialogs.a.path", "p", "--heldout", "1.5"],
            "'--heldout': must be less than 1 (it is 1.5); mend the value",
        ),
        (["sft", "--ranks", "4"], "unknown flag '--ranks'"),
        (
            [
                "ppo",
                "--policy",
                "m",
                "--rewards.helpful",
                "h",
                "--prompts",
                "p",
                "--training.compile",
            ],
            "training.compile is not for PPO: rollout and update must compute alike to the last bit",
        ),
        (
            [
                "ppo",
                "--policy",
                "m",
                "--rewards.helpful",
                "h",
                "--prompts",
                "p",
                "--batch-size",
                "1",
            ],
            "'batch_size': one answer an iteration teaches nothing: rewards are whitened over the answers of an iteration",
        ),
        (
            ["pretrain", "--shards", "none"],
            "none: no such file or directory; check the path, or run the stage",
        ),
        (
            ["reward", "--model", "m", "--preferences.a.path", "p", "--margins", "huge"],
            "'--margins': must be 'none', 'small' or 'large'",
        ),
    ],
)
def test_a_wrong_key_or_value_on_the_command_line(tmp_path, one_line: Refused, words, refusal):
    assert refusal in one_line(*words, *(["--out", tmp_path / "x"] if words[0] != "stf" else []))


def test_a_wrong_key_in_a_recipe(tmp_path, one_line: Refused):
    file = tmp_path / "recipe.yaml"
    for text, refusal in (
        ("sequence_lenght: 5", "unknown key 'sequence_lenght'; did you mean 'sequence_length'?"),
        ("epochs: 0", "'epochs': must be greater than 0 (it is 0); mend the value"),
        ("epochs: 1\nepochs: 2", "not valid YAML (the key 'epochs' is given twice); mend the line"),
    ):
        file.write_text(f"model: m\ndialogs: {{a: {{path: p}}}}\n{text}\n")
        heard = one_line("sft", file, "--out", tmp_path / "x")
        assert heard.startswith(str(file))
        assert refusal in heard

    assert not (tmp_path / "x").exists()


def test_a_model_size_that_does_not_fit_its_data(tmp_path, one_line: Refused, policy, world):
    out, dialogs = tmp_path / "x", world / "demonstrations.jsonl"
    refusal = one_line(*sft(policy, dialogs, out), "--sequence-length", 512)
    assert (
        refusal
        == "sequence_length 512 exceeds the model's context 256; give --sequence-length 256 or less"
    )
    assert (
        llama2(*sft(policy, dialogs, out), "--sequence-length", 96, "--training.plan.max-steps", 1)
        == 0
    )


# --- files ---


FILES = {
    "missing": (None, "mine.jsonl: no such file or directory; check the path"),
    "empty": (b"", "mine.jsonl: the file is empty; it should hold Dialog records"),
    "cut off": (line(GOOD) * 2 + line(GOOD)[:40], "mine.jsonl:3: not valid JSON"),
    "not UTF-8": (
        line(GOOD) + "Café".encode("latin-1"),
        "mine.jsonl:2: not UTF-8 (unexpected end of data at byte 3)",
    ),
    "no JSON": (line(GOOD) + b"Hello\n", "mine.jsonl:2: not valid JSON"),
    "another record": (line({"text": "a document"}), "mine.jsonl:1: messages: Field required"),
    "a list": (line([GOOD]), "mine.jsonl:1: "),
    "wrong type": (
        line({"messages": [{"role": "user", "content": 5}]}),
        "mine.jsonl:1: messages.0.content: ",
    ),
    "unknown role": (
        line({"messages": [{"role": "bot", "content": "x"}]}),
        "mine.jsonl:1: messages.0.role: ",
    ),
    "roles": (
        line(GOOD) + line({"messages": [GOOD["messages"][0]] * 2 + GOOD["messages"][1:]}),
        "mine.jsonl:2: roles must alternate user/assistant: turn 2 is 'user', expected 'assistant'; each line",
    ),
    "no answer": (
        line({"messages": GOOD["messages"][:1]}),
        "mine.jsonl:1: the last turn must be 'assistant'",
    ),
    "no turn": (
        line({"messages": []}),
        "mine.jsonl:1: a conversation needs at least one user turn",
    ),
    "no packed file": (b"plain text", "mine.jsonl.gz:1: truncated or corrupt archive"),
    "cut packed file": (gzip.compress(line(GOOD) * 999)[:-9], "truncated or corrupt archive"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named_with_its_line_and_may_be_mended(
    tmp_path, one_line: Refused, base, name
):
    content, refusal = FILES[name]
    file = tmp_path / ("mine.jsonl.gz" if "packed" in name else "mine.jsonl")
    if content is not None:
        file.write_bytes(content)

    words = sft(base, file, tmp_path / "out", "--training.plan.max-steps", 2)
    heard = one_line(*words)
    assert refusal in heard
    assert heard.startswith(str(file))
    assert content is None or file.read_bytes() == content
    assert not (tmp_path / "out" / "COMPLETE").exists()
    good = line(GOOD) * 8
    file.write_bytes(gzip.compress(good) if file.suffix == ".gz" else good)
    assert llama2(*words) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"responses": PAIR["responses"][:1]}, "mine.jsonl:2: responses.1: Field required"),
        ({"responses": [*PAIR["responses"], {"text": "z"}]}, "mine.jsonl:2: responses: "),
        ({"responses": None}, "mine.jsonl:2: responses: "),
        ({"preferred": 2}, "mine.jsonl:2: preferred: Input should be 0 or 1"),
        (
            {"degree": "much"},
            "mine.jsonl:2: degree: Input should be 'significantly', 'better', 'slightly' or 'negligibly'",
        ),
        (
            {"prompt": GOOD["messages"]},
            "mine.jsonl:2: the last turn must be 'user', it is 'assistant'",
        ),
        ({"axis": "kind"}, "mine.jsonl:2: axis: Input should be 'helpful' or 'safe'"),
    ],
)
def test_a_comparison_without_two_answers(tmp_path, one_line: Refused, base, change, refusal):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(line(PAIR) + line(PAIR | change))
    heard = one_line(
        "reward", "--model", base, "--preferences.all.path", file, "--out", tmp_path / "out"
    )
    assert refusal in heard
    assert heard.endswith(
        "each line must be one Preference record (docs/formats.md); `llama2 prepare --kind "
        f"preferences --sources.NAME.path {file} --out DIR` makes them of other formats"
    )


def test_a_bad_heldout_file_is_found_before_training(
    tmp_path, one_line: Refused, base, preferences
):
    (tmp_path / "mine.jsonl").write_bytes(b"{}\n")
    assert "mine.jsonl:1: " in one_line(
        "reward",
        "--model",
        base,
        "--preferences.all.path",
        preferences,
        "--heldout.all.path",
        tmp_path / "mine.jsonl",
        "--out",
        tmp_path / "out",
    )


def test_documents_without_text(tmp_path, one_line: Refused):
    (tmp_path / "a.jsonl").write_bytes(
        line({"text": "A text of more than twenty letters."}) + line({"txt": "x"})
    )
    heard = one_line("clean", "--sources.web.path", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert heard.startswith(f"{tmp_path}/a.jsonl:2: ")


def test_what_a_gate_left_empty_stops_no_later_stage(tmp_path, base, world):
    """A finished run may have kept nothing; the same empty file from anywhere else is a mistake."""
    made = tmp_path / "made"
    assert llama2("world", "--scale", 0.001, "--out", made) == 0
    (made / "none.jsonl").touch()
    words = sft(
        base, world / "demonstrations.jsonl", tmp_path / "out", "--training.plan.max-steps", 1
    )
    assert llama2(*words, "--dialogs.none.path", made / "none.jsonl") == 0


# --- checkpoints ---


def no_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors")


def more_tensors(path: Path) -> None:
    save_file(
        load_file(path / "model.safetensors") | {"model.extra": torch.zeros(2)},
        path / "model.safetensors",
    )


def other_shape(path: Path) -> None:
    save_file(
        load_file(path / "model.safetensors") | {"model.norm.weight": torch.ones(7)},
        path / "model.safetensors",
    )


def cut(path: Path) -> None:
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(1000)


def other_tokenizer(path: Path) -> None:
    train(["some other words altogether, and more of them"] * 9, 290, path)


def one_bit(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (path / "model.safetensors").write_bytes(content)


def no_tokenizer(path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.json"):
        (path / name).unlink()


DAMAGES = {
    "missing": (
        no_tensor,
        False,
        "the tensors do not fit config.json: 1 missing: model.norm.weight",
    ),
    "extra": (more_tensors, False, "the tensors do not fit config.json: 1 unknown: model.extra"),
    "shape": (other_shape, False, "1 wrongly shaped: model.norm.weight [7] instead of [32]"),
    "cut off": (cut, False, "model.safetensors: truncated or not a safetensors file"),
    "damaged": (
        one_bit,
        True,
        "model.safetensors: its checksum differs from checksums.json; fetch it again",
    ),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        False,
        "neither model.safetensors nor ",
    ),
    "no config": (lambda path: (path / "config.json").unlink(), False, "config.json: missing"),
    "no tokenizer": (no_tokenizer, False, "tokenizer.model: no such file"),
    "tokenizer": (
        other_tokenizer,
        False,
        "the tokenizer has 290 pieces, the model 420; put the tokenizer there",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("verb", ["sft", "chat", "reward"])
def test_a_damaged_checkpoint_is_refused(
    tmp_path, one_line: Refused, base, preferences, world, verb, name
):
    damage, checksums, refusal = DAMAGES[name]
    copy = tmp_path / "model"
    shutil.copytree(base, copy)
    damage(copy)

    if not checksums:
        (copy / "checksums.json").unlink()

    words = {
        "sft": sft(copy, world / "demonstrations.jsonl", tmp_path / "out"),
        "chat": ("chat", copy),
        "reward": (
            "reward",
            "--model",
            copy,
            "--preferences.all.path",
            preferences,
            "--out",
            tmp_path / "out",
        ),
    }
    heard = one_line(*words[verb])
    assert heard.startswith(str(copy))
    assert refusal in heard


def test_tokenizers_of_policy_reward_model_and_shards_must_agree(
    tmp_path, one_line: Refused, policy, scorers, prompts, world
):
    helpful, _ = scorers
    copy = tmp_path / "helpful"
    shutil.copytree(helpful, copy)
    words = [
        "".join(reversed(word)) for word in (world / "demonstrations.jsonl").read_text().split()
    ]
    train([" ".join(words)], 420, copy)
    (copy / "checksums.json").unlink()

    for verb in ("ppo", "rejection"):
        heard = one_line(
            verb,
            "--policy",
            policy,
            "--rewards.helpful",
            copy,
            "--prompts",
            prompts,
            "--out",
            tmp_path / verb,
        )
        assert (
            heard
            == f"{copy}: its tokenizer is not the policy's; train policy and reward models on one tokenizer"
        )

    checkpoint.save(Llama(LlamaConfig(500, 32, 48, 1, 2, 2)), tmp_path / "larger")
    shards = tmp_path / "shards"
    assert (
        llama2(
            "clean",
            "--out",
            tmp_path / "clean",
            "--heldout",
            0.2,
            "--sources.a.path",
            world / "documents/lists.jsonl",
        )
        == 0
    )
    assert (
        llama2(
            "tokenize", "--out", shards, "--documents", tmp_path / "clean", "--tokenizer", policy
        )
        == 0
    )
    heard = one_line(
        "pretrain", "--shards", shards, "--model", tmp_path / "larger", "--out", tmp_path / "on"
    )
    assert heard.endswith(
        "the tokenizer has 420 pieces, the model 500; tokenize with the tokenizer of the model"
    )


def test_models_are_not_mistaken_for_one_another(tmp_path, one_line: Refused, scorers, world):
    heard = one_line(*sft(scorers[0], world / "demonstrations.jsonl", tmp_path / "out"))
    assert "this is a reward model, a language model was expected" in heard


def test_a_checkpoint_inside_of_a_run_is_no_finished_run(tmp_path, one_line: Refused, world):
    """Its completion mark is that of a checkpoint."""
    step = tmp_path / "run/checkpoints/step-00000003"
    step.mkdir(parents=True)
    (step / "COMPLETE").touch()
    assert "config.json: missing" in one_line(
        *sft(step, world / "demonstrations.jsonl", tmp_path / "out")
    )


# --- prompts ---


def test_a_prompt_longer_than_the_context(tmp_path, base, monkeypatch, capsys, one_line: Refused):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n" + "a long question " * 99 + "\nHi\n"))
    with pytest.raises(SystemExit) as left:
        llama2("chat", base, "--max-tokens", 4)

    heard = capsys.readouterr()
    assert left.value.code == 2
    assert heard.out.count("\n") >= 2
    (only,) = heard.err.splitlines()
    assert only.startswith("llama2: error: the prompt has ")
    assert only.endswith("more than leave room for an answer in the context of 256; shorten it")
    (tmp_path / "p.jsonl").write_bytes(
        line({"messages": [{"role": "user", "content": "a long question " * 99}]})
    )
    heard = one_line(
        "collect", "--policies", base, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out"
    )
    assert heard.startswith(
        "none of 1 prompts leaves 16 tokens for an answer in the context of 256"
    )


# --- run directories ---


def everything(directory: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_changed_configuration_shows_the_difference_and_loses_nothing(
    tmp_path, base, world, one_line: Refused
):
    out, dialogs = tmp_path / "out", world / "demonstrations.jsonl"
    words = sft(base, dialogs, out, "--training.plan.save-every", 1, "--training.plan.max-steps", 3)
    assert in_a_process(tmp_path / "log", *words, number=signal.SIGKILL, step=2) == -signal.SIGKILL
    before = everything(out)
    heard = one_line(*words, "--epochs", 5, "--training.plan.clip", 0.5)
    assert heard == (
        f"{out}: holds an unfinished run with another configuration: epochs: 2 -> 5; training.plan.clip: "
        "1.0 -> 0.5; choose another --out, or delete that directory to start over"
    )
    heard = one_line("clean", "--sources.a.path", dialogs, "--out", out)
    assert f"{out}: holds an unfinished run with another configuration: " in heard
    assert "verb: sft -> clean" in heard
    assert everything(out) == before

    with runs.lock(out):
        assert f"{out}: another process (pid {os.getpid()}) is writing this run" in one_line(*words)

    assert llama2(*words) == 0
    before = everything(out)
    assert "holds a finished run" in one_line(*words, "--seed", 1)
    assert everything(out) == before


def test_a_changed_input_is_named(tmp_path, base, one_line: Refused):
    file, out = tmp_path / "mine.jsonl", tmp_path / "out"
    file.write_bytes(line(GOOD) * 8)
    words = sft(base, file, out, "--training.plan.max-steps", 1)
    assert llama2(*words) == 0
    before = everything(out)
    file.write_bytes(line(GOOD) * 9)
    assert one_line(*words) == (
        f"{out}: holds a finished run made from other inputs; changed: dialogs.mine.path "
        f"({file}); choose another --out, or delete that directory to start over"
    )
    assert everything(out) == before


def test_a_directory_of_something_else_is_left_alone(tmp_path, base, world, one_line: Refused):
    (tmp_path / "thesis.txt").write_text("years of work")
    heard = one_line(*sft(base, world / "demonstrations.jsonl", tmp_path))
    assert heard == f"{tmp_path}: exists and is no run directory; choose another --out"
    assert everything(tmp_path) == {tmp_path / "thesis.txt": b"years of work"}
    heard = one_line(*sft(base, world / "demonstrations.jsonl", tmp_path / "thesis.txt"))
    assert (
        heard
        == f"{tmp_path}/thesis.txt: a file of this name exists; choose another name, or move it away"
    )


def _limited(words: list[str], limit: int, log: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    os._exit(llama2(*words))


@pytest.mark.parametrize("kilobytes", [20, 150])
def test_a_full_disk_loses_nothing(tmp_path, base, world, kilobytes):
    """Too small for the model; large enough for it, but not for the first checkpoint."""
    words = [
        str(word)
        for word in sft(
            base,
            world / "demonstrations.jsonl",
            tmp_path / "out",
            "--training.plan.max-steps",
            6,
            "--training.plan.save-every",
            4,
        )
    ]
    preload()
    process = context.Process(target=_limited, args=(words, kilobytes << 10, str(tmp_path / "log")))
    process.start()
    process.join(200)
    *_, last = (tmp_path / "log").read_text().splitlines()
    assert process.exitcode == 2, last
    assert last.startswith("llama2: error: ")
    assert "the file would exceed the largest size allowed; raise the limit" in last
    assert llama2(*words) == 0
    assert llama2(*words[:6], tmp_path / "whole", *words[7:]) == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()


def test_no_space_left_is_named(tmp_path, monkeypatch, one_line: Refused):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr("llama2.records.os.replace", full)
    heard = one_line("world", "--scale", 0.001, "--out", tmp_path / "out")
    assert heard.endswith(
        "no space left on the device; free some space and run the same command again: it resumes"
    )


def test_a_defect_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr("llama2.stages.world.write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llama2("world", "--out", tmp_path / "out")
