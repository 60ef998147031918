"""A finished reward model on pairs that were kept apart, in the formats people have them in."""

import json
import shutil

import pytest
from commands import llama2

from llama2 import records
from llama2.records import Preference, Response, messages_of


def write_preferences(path, count, better="good", worse="bad"):
    rows = []
    for index in range(count):
        question = messages_of([("user", f"{path.stem} {index}")])
        answers = Response(better), Response(worse)
        rows.append(Preference(f"{path.stem}{index}", question, answers, 0, "better"))

    records.write(path, rows)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory, policy):
    """A reward model that has learnt that "good" is better than "bad"."""
    folder = tmp_path_factory.mktemp("reward")
    path = write_preferences(folder / "train.jsonl", 64)
    words = ["reward", "--model", policy, "--preferences.a.path", path, "--batch-size", 8]
    words += ["--training.optimizer.learning-rate", 5e-3, "--epochs", 3]
    assert llama2(*words, "--out", folder / "helpful") == 0
    return folder / "helpful"


def read(out):
    return json.loads((out / "accuracy.json").read_text())


def test_formats_of_others_are_judged_by_set_and_by_source(tmp_path, model, capsys):
    hh = tmp_path / "hh-rlhf"
    for name, count in (("helpful-base", 5), ("helpful-online", 3)):
        (hh / name).mkdir(parents=True)
        rows = []
        for index in range(count):
            start = f"\n\nHuman: What of {name} {index}?\n\nAssistant:"
            rows.append(json.dumps({"chosen": f"{start} good", "rejected": f"{start} bad"}))

        (hh / name / "test.jsonl").write_text("\n".join(rows))

    llmbar = tmp_path / "llmbar.json"
    row = {"input": "Say it.", "output_1": "bad", "output_2": "good", "label": 2}
    llmbar.write_text(json.dumps([row, {**row, "label": 1}]))
    out = tmp_path / "out"
    command = ["accuracy", model, "--pairs.hh.path", hh, "--pairs.llmbar.path", llmbar]
    assert llama2(*command, "--out", out) == 0

    result = read(out)
    assert result["reward_model"] == "helpful"
    assert set(result["sets"]) == {"hh", "hh/helpful-base/test", "hh/helpful-online/test", "llmbar"}
    assert result["sets"]["hh"]["all"]["n"] == 8
    assert result["sets"]["hh"]["all"]["rate"] == 1.0
    assert result["sets"]["llmbar"]["all"]["rate"] == 0.5  # the same pair both ways round
    baselines = result["sets"]["hh"]["baselines"]
    assert baselines["bag_of_words"]["rate"] == baselines["longer"]["rate"] == 1.0
    assert baselines["over_bag_of_words"]["difference"] == 0.0
    heard = capsys.readouterr().err
    assert "of 8 pairs of hh; the longer answer is on 100.0 % (the model +0.0 points [" in heard
    assert "of 5 pairs of hh/helpful-base/test" in heard
    (warning,) = [line for line in json.loads((out / "warnings.json").read_text()) if "hh" in line]
    assert "may explain that" in warning


def test_the_bag_of_words_can_be_fitted_to_other_pairs(tmp_path, model, capsys):
    pairs = write_preferences(tmp_path / "new.jsonl", 8)
    reverse = write_preferences(tmp_path / "reverse.jsonl", 40, "bad", "good")
    command = ["accuracy", model, "--pairs.new.path", pairs]
    assert llama2(*command, "--training-pairs.a.path", reverse, "--out", tmp_path / "a") == 0
    baselines = read(tmp_path / "a")["sets"]["new"]["baselines"]
    assert baselines["bag_of_words"]["rate"] == 0.0
    assert baselines["over_bag_of_words"]["low"] > 0.4

    # a reward model from elsewhere has none, and that is said
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    for name in ("bag_of_words.json", "manifest.json", "COMPLETE"):
        (bare / name).unlink()

    assert llama2("accuracy", bare, *command[2:], "--out", tmp_path / "b") == 0
    assert "bag_of_words" not in read(tmp_path / "b")["sets"]["new"]["baselines"]
    assert "--training-pairs.NAME.path FILE fits one" in capsys.readouterr().err


def test_pairs_that_were_trained_on_are_named(tmp_path, model):
    pairs = write_preferences(tmp_path / "train.jsonl", 6)
    assert llama2("accuracy", model, "--pairs.old.path", pairs, "--out", tmp_path / "o") == 0
    warnings = json.loads((tmp_path / "o" / "warnings.json").read_text())
    assert any(line.startswith("6 of 6 pairs of pairs.old open like pairs") for line in warnings)


def test_what_is_no_reward_model_or_holds_no_pair_is_refused(tmp_path, model, policy, capsys):
    pairs = write_preferences(tmp_path / "some.jsonl", 2)
    assert llama2("accuracy", policy, "--pairs.a.path", pairs, "--out", tmp_path / "p") == 2
    assert "not a reward model" in capsys.readouterr().err
    long = write_preferences(tmp_path / "long.jsonl", 2, "good " * 400)
    command = ["accuracy", model, "--pairs.a.path", long, "--out", tmp_path / "q"]
    assert llama2(*command) == 2
    assert "no pair is left to judge by: a: read 2, kept 0, left out 2: too long" in (
        capsys.readouterr().err
    )
    assert llama2(*command, "--max-tokens", "0") == 2
    assert llama2("accuracy", model, "--out", tmp_path / "r") == 2
