"""Reward models: which comparisons make up the data, in which shares, and what is measured."""

import json

import pytest
import torch
from commands import llama2

from llama2 import records
from llama2.config import build
from llama2.errors import UserError
from llama2.model import checkpoint
from llama2.records import DEGREES, Preference, Response, messages_of
from llama2.stages import reward


def write(path, count, axis="helpful", long=False):
    records.write(path, [Preference(
        f"{path.stem}{index}", messages_of([("user", f"{path.stem} {index}")]),
        (Response(("good " * 80) if long else "good"), Response("bad")), 0, DEGREES[index % 4],
        "preferred_only" if axis == "safe" else None, axis) for index in range(count)])
    return path


def config(**sets):
    return build(reward.Config, {"out": "x", "model": "m", "preferences": sets})


def counts(pairs, tokenizer):
    texts = [tokenizer.decode(pair.chosen) for pair in pairs]
    return {name: sum(name in text for text in texts) for name in ("help", "safe")}


@pytest.mark.parametrize(("shares", "expected"), [
    ((None, None), (90, 60)),  # every pair once
    ((None, 0.1), (90, 10)),  # 10 % of all: 10 of 100
    ((0.1, None), (7, 60)),  # the safety model's mix: 90 % safety, 10 % helpfulness
    ((None, 0.5), (90, 60)),  # as many again, as far as there are
    ((0.5, 0.5), (60, 60)),  # as many as the scarcer set allows
    ((0.1, 0.9), (7, 60)),
])
def test_shares_of_the_mixture(tmp_path, tokenizer, shares, expected):
    files = write(tmp_path / "help.jsonl", 90), write(tmp_path / "safe.jsonl", 60, "safe")
    made = config(h={"path": files[0], "share": shares[0]}, s={"path": files[1], "share": shares[1]})
    pairs, skipped = reward.mixed(made, tokenizer, 200)
    found = counts(pairs, tokenizer)
    assert (found["help"], found["safe"]) == expected
    assert skipped == 0
    assert reward.mixed(made, tokenizer, 200)[0] == pairs  # a function of the seed
    if shares[0] == 0.1:
        other = reward.mixed(made.model_copy(update={"seed": 1}), tokenizer, 200)[0]
        assert other != pairs


def test_shares_that_leave_nothing_are_refused(tmp_path, tokenizer):
    files = write(tmp_path / "help.jsonl", 9), write(tmp_path / "safe.jsonl", 9, "safe")
    with pytest.raises(UserError, match="shares add up to 1, which leaves nothing for: h; lower them"):
        reward.mixed(config(h={"path": files[0]}, s={"path": files[1], "share": 1}), tokenizer, 200)


def test_one_axis_of_a_file_is_taken(tmp_path, tokenizer):
    both = [*records.read(Preference, write(tmp_path / "help.jsonl", 5)),
            *records.read(Preference, write(tmp_path / "safe.jsonl", 3, "safe"))]
    records.write(tmp_path / "both.jsonl", both)
    for axis, count in (("helpful", 5), ("safe", 3), (None, 8)):
        pairs, _ = reward.mixed(config(a={"path": tmp_path / "both.jsonl", "axis": axis}), tokenizer, 200)
        assert len(pairs) == count
    assert {pair.safe for pair in pairs} == {(-1, -1), (1, 0)}


def test_pairs_too_long_are_left_out_and_counted(tmp_path, tokenizer):
    short, long = write(tmp_path / "help.jsonl", 4), write(tmp_path / "safe.jsonl", 3, long=True)
    pairs, skipped = reward.mixed(config(a={"path": short}, b={"path": long}), tokenizer, 60)
    assert (len(pairs), skipped) == (4, 3)
    assert max(pair.size for pair in pairs) <= 60


def test_the_chosen_rows_come_first():
    pairs = [reward.Pair([1, 5, 2], [1, 6], 0, (1, 0)), reward.Pair([1, 7], [1, 8, 9, 2], 3, (-1, -1))]
    batch = reward.collate(pairs)
    assert batch["tokens_BT"].tolist() == [[1, 5, 2, 0], [1, 7, 0, 0], [1, 6, 0, 0], [1, 8, 9, 2]]
    assert batch["lengths_B"].tolist() == [3, 2, 2, 4]
    assert batch["degrees_P"].tolist() == [0, 3]
    assert batch["safe_B"].tolist() == [1, -1, 0, -1]


def test_accuracy_by_degree_counts_ties_half(monkeypatch):
    pairs = [reward.Pair([1], [1], degree, (-1, -1)) for degree in (0, 0, 1, 3)]
    monkeypatch.setattr(reward, "rewards", lambda *_: [2.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, -1.0])
    found = reward.accuracy(None, pairs, "fp32")
    assert found["all"]["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert found["significantly"] == {"accuracy": 0.5, "n": 2, "low": found["significantly"]["low"],
                                      "high": found["significantly"]["high"]}
    assert set(found) == {"all", "significantly", "better", "negligibly"}
    assert 0 <= found["all"]["low"] < found["all"]["accuracy"] < found["all"]["high"] <= 1


def test_a_reward_model_learns_what_is_preferred(tmp_path, policy):
    """Good against bad is easy; the head is fresh, the warm-up fits a run of any length."""
    files = write(tmp_path / "help.jsonl", 64), write(tmp_path / "heldout.jsonl", 12)
    words = ["reward", "--model", policy, "--preferences.a.path", files[0], "--heldout.b.path", files[1],
             "--batch-size", 8, "--training.optimizer.learning-rate", 5e-3]
    assert llama2(*words, "--epochs", 3, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/accuracy.json").read_text())["sets"]["b"]
    assert found["all"] == {"accuracy": 1.0, "n": 12, "low": found["all"]["low"], "high": 1.0}
    assert checkpoint.is_scorer(tmp_path / "out")
    assert llama2(*words, "--training.plan.max-steps", 2, "--out", tmp_path / "short") == 0
    again = [*words[:2], tmp_path / "out", *words[3:]]
    assert llama2(*again, "--training.plan.max-steps", 1, "--out", tmp_path / "on") == 0
    first, on = (checkpoint.load_scorer(tmp_path / name).score.weight.detach() for name in ("out", "on"))
    assert float((first - on).abs().max()) < 0.01  # a reward model goes on with its own head
    assert not torch.equal(first, on)
