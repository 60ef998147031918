"""Reward models: which comparisons make up the data, in which shares, and what is measured."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from commands import llama2

from llama2 import records
from llama2.config import build
from llama2.errors import UserError
from llama2.evaluate.baselines import BagOfWords
from llama2.formats import checkpoint
from llama2.ranks import Ranks
from llama2.records import DEGREES, Preference, Response, messages_of
from llama2.results import Baselines, PairedDifference, Proportion, SetAccuracy
from llama2.runs import Run
from llama2.stages import reward
from llama2.stages.common import reward_accuracy
from llama2.stages.common.reward_pairs import (
    EncodedPair,
    Encoder,
    collate,
    collate_shared,
    mean_length,
    read_heldout,
    read_pairs,
)
from llama2.stages.common.training import freeze_lower
from llama2.train.loop import Plan
from llama2.train.objectives import make_ranking_loss


def write(path, count, axis="helpful", long=False):
    records.write(
        path,
        [
            Preference(
                f"{path.stem}{index}",
                messages_of([("user", f"{path.stem} {index}")]),
                (Response(("good " * 80) if long else "good"), Response("bad")),
                0,
                DEGREES[index % 4],
                "preferred_only" if axis == "safe" else None,
                axis,
            )
            for index in range(count)
        ],
    )
    return path


def config(**sets):
    return build(reward.Config, {"out": "x", "model": "m", "preferences": sets})


def mixed(made, tokenizer, longest=200):
    run = Run(made.out, False)
    return read_pairs(made.preferences, Encoder(tokenizer, longest, 1000), run, made.seed), run


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((None, None), (90, 60)),  # every pair once
        ((None, 0.1), (90, 10)),  # 10 % of all: 10 of 100
        ((0.1, None), (7, 60)),  # the safety model's mix: 90 % safety, 10 % helpfulness
        ((None, 0.4), (90, 60)),  # just as many as there are
        ((0.5, 0.5), (60, 60)),  # as many as the scarcer set allows
        ((0.1, 0.9), (7, 60)),
    ],
)
def test_shares_of_the_mixture(tmp_path, tokenizer, shares, expected):
    files = write(tmp_path / "help.jsonl", 90), write(tmp_path / "safe.jsonl", 60, "safe")
    made = config(
        h={"path": files[0], "share": shares[0]}, s={"path": files[1], "share": shares[1]}
    )
    sets, run = mixed(made, tokenizer)
    assert (len(sets["h"]), len(sets["s"])) == expected
    assert all(len({tuple(pair.chosen) for pair in found}) == len(found) for found in sets.values())
    assert [run.tally(f"preferences.{name}").kept for name in "hs"] == list(expected)
    assert mixed(made, tokenizer)[0] == sets  # a function of the seed

    if shares[0] == 0.1:
        assert run.tally("preferences.h").skipped == {"beyond its share of 0.1": 83}
        assert mixed(made.model_copy(update={"seed": 1}), tokenizer)[0] != sets


def test_a_share_that_cannot_be_reached_is_refused_with_one_that_can(tmp_path, tokenizer):
    files = [
        write(tmp_path / f"{name}.jsonl", count)
        for name, count in (("h", 100), ("s", 5), ("o", 10))
    ]
    sets = {
        "h": {"path": files[0]},
        "s": {"path": files[1], "share": 0.03},
        "o": {"path": files[2], "share": 0.47},
    }
    with pytest.raises(UserError) as refused:
        mixed(config(**sets), tokenizer)

    assert refused.value.cause == (
        "the shares of 200 pairs cannot be reached: 's' has 5 of 6 pairs, 'o' has 10 of 94 pairs"
    )
    assert refused.value.cure.startswith(
        "lower --preferences.s.share to 0.0434 and --preferences.o.share to 0.0869, draw pairs more than once with "
        "--preferences.s.repeat true --preferences.o.repeat true, or give every set a share"
    )
    sets["s"]["share"], sets["o"]["share"] = 0.0434, 0.0869
    assert {name: len(found) for name, found in mixed(config(**sets), tokenizer)[0].items()} == {
        "h": 100,
        "s": 5,
        "o": 10,
    }
    sets["s"]["share"], sets["o"]["share"] = 0.02, 0.47

    with pytest.raises(
        UserError,
        match=r"shares of 196 pairs cannot be reached: 'o' has 10 of 92 pairs; lower "
        r"--preferences\.o\.share to 0\.089, draw",
    ):
        mixed(config(**sets), tokenizer)

    sets["o"] |= {"share": 0.47, "repeat": True}
    drawn = mixed(config(**sets), tokenizer)[0]["o"]
    times = Counter(tuple(pair.chosen) for pair in drawn)
    assert (len(drawn), len(times), set(times.values())) == (92, 10, {9, 10})


def test_shares_that_leave_nothing_or_something_are_refused(tmp_path, tokenizer):
    files = write(tmp_path / "help.jsonl", 9), write(tmp_path / "safe.jsonl", 9, "safe")
    for shares, axis, refusal in (
        ((None, 1), None, "the shares add up to 1, which leaves nothing for: h; lower them"),
        (
            (0.5, 0.2),
            None,
            "add up to 0.7, and no set is taken whole to be the rest; make them add up to 1",
        ),
        ((0.8, 0.9), None, "the shares add up to 1.7, and no set is taken whole"),
        (
            (None, 0.5),
            "helpful",
            r"preferences\.s: no pair is left for its share of 0\.5; mend the data",
        ),
        (
            (0.5, None),
            "helpful",
            "nothing is left of s, which the shares of the other sets refer to",
        ),
    ):
        made = config(
            h={"path": files[0], "share": shares[0]},
            s={"path": files[1], "share": shares[1], "axis": axis},
        )
        with pytest.raises(UserError, match=refusal):
            mixed(made, tokenizer)


def test_one_axis_of_a_file_is_taken(tmp_path, tokenizer):
    both = [
        *records.read(Preference, write(tmp_path / "help.jsonl", 5)),
        *records.read(Preference, write(tmp_path / "safe.jsonl", 3, "safe")),
    ]
    records.write(tmp_path / "both.jsonl", both)
    for axis, count in (("helpful", 5), ("safe", 3), (None, 8)):
        sets, run = mixed(config(a={"path": tmp_path / "both.jsonl", "axis": axis}), tokenizer)
        assert len(sets["a"]) == count
        assert run.tally("preferences.a").skipped == (
            {"of the other axis": 8 - count} if axis else {}
        )

    assert {pair.safe for pair in sets["a"]} == {(-1, -1), (1, 0)}
    assert {pair.axis for pair in sets["a"]} == {"helpful", "safe"}


def test_pairs_that_tell_nothing_or_are_too_long_are_left_out_and_counted(tmp_path, tokenizer):
    short, long = write(tmp_path / "help.jsonl", 4), write(tmp_path / "long.jsonl", 3, long=True)
    bad = [
        Preference(
            str(index),
            messages_of([("user", "Hi")]),
            (Response(first), Response(second)),
            0,
            "better",
        )
        for index, (first, second) in enumerate([("Yes.", ""), (" \n", "No."), ("Yes.", "Yes. ")])
    ]
    records.write(tmp_path / "bad.jsonl", [*records.read(Preference, short), *bad])
    sets, run = mixed(config(a={"path": tmp_path / "bad.jsonl"}, b={"path": long}), tokenizer, 60)
    assert (len(sets["a"]), len(sets["b"])) == (4, 0)
    assert max(pair.size for pair in sets["a"]) <= 60
    assert (
        run.tally("preferences.a").line()
        == "read 7, kept 4, left out 3: empty answer 2, identical answers 1"
    )
    longest = max(
        Encoder(tokenizer, 60, 256).encode_pair(one).size for one in records.read(Preference, long)
    )
    assert run.tally("preferences.b").line() == (
        f"read 3, kept 0, left out 3: too long 3 (--max-tokens {longest} holds the longest)"
    )


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--max-tokens", 10), "left out 5: too long 5 (--max-tokens "),
        (("--preferences.a.axis", "safe"), "left out 5: of the other axis 5; "),
    ],
)
def test_nothing_left_is_an_error_with_its_numbers(tmp_path, policy, one_line, words, why):
    heard = one_line(
        "reward",
        "--model",
        policy,
        "--preferences.a.path",
        write(tmp_path / "help.jsonl", 5),
        "--out",
        tmp_path / "out",
        *words,
    )
    assert heard.startswith("nothing is left to train on: preferences.a: read 5, kept 0, ")
    assert why in heard


def test_the_chosen_rows_come_first():
    pairs = [
        EncodedPair([1, 5, 2], [1, 6], 0, (1, 0)),
        EncodedPair([1, 7], [1, 8, 9, 2], 3, (-1, -1)),
    ]
    batch = collate(pairs)
    assert batch["tokens_BT"].tolist() == [[1, 5, 2, 0], [1, 7, 0, 0], [1, 6, 0, 0], [1, 8, 9, 2]]
    assert batch["lengths_B"].tolist() == batch["read_B"].tolist() == [3, 2, 2, 4]
    assert mean_length(pairs) == (9 + 4 + 4 + 16) / 11
    assert batch["degrees_P"].tolist() == [0, 3]
    assert batch["safe_B"].tolist() == [1, -1, 0, -1]


def test_a_row_for_both_answers_holds_their_beginning_once():
    pairs = [
        EncodedPair([1, 5, 2], [1, 6], 0, (1, 0)),
        EncodedPair([1, 7], [1, 7, 9, 2], 3, (-1, -1)),
    ]
    batch = collate_shared(pairs)
    assert batch["tokens_BT"].tolist() == [[1, 5, 2, 6, 0], [1, 7, 7, 9, 2]]
    assert batch["branches_BT"].tolist() == [[0, 1, 1, 2, 3], [0, 1, 2, 2, 2]]
    assert batch["ends_BK"].tolist() == [[2, 3], [1, 4]]
    assert batch["weights_BT"].sum() == 4
    assert batch["read_B"].tolist() == [pair.joint_size for pair in pairs] == [4, 5]
    assert batch["safe_B"].tolist() == [1, -1, 0, -1]


def test_sharing_prompts_changes_nothing_but_rounding(tmp_path, tokenizer, policy, monkeypatch):
    """The loss and its gradients are those of two rows a pair."""
    encoder = Encoder(tokenizer, 200, 256)
    files = write(tmp_path / "a.jsonl", 8), write(tmp_path / "b.jsonl", 5, "safe")
    pairs = [encoder.encode_pair(one) for file in files for one in records.read(Preference, file)]
    assert all(pair.shared > 5 for pair in pairs)
    assert sum(pair.joint_size for pair in pairs) < 0.7 * sum(2 * pair.size for pair in pairs)

    scorer = checkpoint.load_scorer(policy, seed=1)
    objective = make_ranking_loss("small", 0.5)
    found = []
    for make in (collate, collate_shared):
        scorer.zero_grad()
        loss = objective(scorer, make(pairs))
        loss.total.backward()
        assert loss.weight == len(pairs)
        values = torch.stack([loss.total.detach(), *(loss.metrics[key] for key in loss.metrics)])
        found.append([values, *(each.grad.clone() for each in scorer.parameters())])

    for apart, together in zip(*found, strict=True):
        assert (apart - together).norm() <= 1e-4 * apart.norm()

    # and so is the accuracy, whatever stands in a batch
    turned = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs[::2]]
    pairs = pairs[1::2] + turned
    marks = [
        mark(scorer, pairs, "fp32", Ranks.alone())
        for mark in (reward_accuracy.mark_pairs, reward_accuracy.mark_joint_pairs)
    ]
    monkeypatch.setattr(reward_accuracy, "JOINT_TOKENS", 100)
    marks.append(reward_accuracy.mark_joint_pairs(scorer, pairs, "fp32", Ranks.alone()))
    assert marks[0] == marks[1] == marks[2]
    assert len(set(marks[0])) > 1


def test_a_long_prompt_loses_its_oldest_exchanges(tmp_path, tokenizer):
    turns = [("system", "Be brief."), ("user", "first " * 30), ("assistant", "one " * 30)]
    prompt = messages_of([*turns, ("user", "second"), ("assistant", "two"), ("user", "third")])
    preference = Preference("x", prompt, (Response("Yes."), Response("No.")), 0, "better")
    late = messages_of([turns[0], ("user", "second"), ("assistant", "two"), ("user", "third")])
    expected = Encoder(tokenizer, 200, 256).encode_pair(replace(preference, prompt=late))
    short = Encoder(tokenizer, 70, 256, shorten=True).encode_pair(preference)
    assert (short.chosen, short.rejected) == (expected.chosen, expected.rejected)
    assert short.conversation == Encoder(tokenizer, 200, 256).encode_pair(preference).conversation
    assert Encoder(tokenizer, 60, 256).encode_pair(preference).size > 60

    whole = replace(preference, prompt=messages_of([("user", "first " * 90)]))
    run = Run(tmp_path / "run", False)
    assert Encoder(tokenizer, 60, 256, shorten=True).encode([whole], run.tally("a")) == []
    assert "too long 1" in run.tally("a").line()  # the newest question is never cut


def test_accuracy_by_degree_counts_ties_half(monkeypatch):
    pairs = [EncodedPair([1], [1], degree, (-1, -1)) for degree in (0, 0, 1, 3)]
    monkeypatch.setattr(
        reward_accuracy,
        "score_rows",
        lambda *_, **options: [2.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, -1.0],
    )
    marks = reward_accuracy.mark_pairs(None, pairs, "fp32", Ranks.alone())
    assert marks == [1.0, 0.0, 0.5, 1.0]
    accuracy = reward_accuracy.summarise_marks(pairs, marks)
    every = accuracy.all
    assert every.rate == (1 + 0 + 0.5 + 1) / 4
    assert (accuracy.significantly.rate, accuracy.significantly.n) == (0.5, 2)
    assert list(accuracy.by_degree) == ["significantly", "better", "negligibly"]
    assert 0 <= every.low < every.rate < every.high <= 1
    # texts of equal length: that baseline is right on half, and no words were given
    lead = accuracy.leads["length"]
    assert (lead.difference, lead.n) == (0.625 - 0.5, 4)
    assert list(accuracy.leads) == ["length"]
    assert accuracy.baselines_by_degree["negligibly"].leads["length"].difference == 0.5


def test_a_set_of_several_sources_is_measured_source_by_source():
    def pair(source, better, worse):
        return EncodedPair([1], [1], 1, (-1, -1), texts=(better, worse), source=source)

    pairs = [pair("b", "kind", "no"), pair("a", "no", "rude"), pair("b", "kind", "no")]
    sets = {"x": pairs, "y": pairs[:1]}
    words = BagOfWords.fit([("kind", "no")] * 20)
    marks = {"x": [1.0, 1.0, 0.0], "y": [0.0]}
    accuracies = reward_accuracy.measure_sets(sets, marks, words)
    assert list(accuracies) == ["x", "y", "x/a", "x/b"]
    assert [accuracies[name].all.rate for name in ("x", "x/a", "x/b")] == [2 / 3, 1.0, 0.5]
    assert accuracies["x/a"].baselines.bag_of_words.rate == 0.0
    assert accuracies["x/a"].leads["bag of words"].difference == 1.0
    assert accuracies["x/b"].leads["bag of words"].difference == -0.5
    lines = list(reward_accuracy.describe_accuracies(sets, accuracies))
    assert [line.split(" pairs of ")[1].split(";")[0] for line in lines] == ["x/a", "x/b", "x", "y"]
    assert "(the model -50.0 points [" in lines[1]


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, 0), (2, 1), (5, 4), (6, 5), (100, 5), (1000, 30)]
)
def test_warm_up_is_the_papers_where_there_are_steps_for_it(steps, expected):
    assert reward.count_warmup(Plan(), steps) == expected
    plan = Plan(max_steps=steps, warmup_steps=expected)
    plan.check()
    assert max(plan.scale_rate(step) for step in range(steps)) == 1.0
    assert reward.count_warmup(Plan(warmup_steps=0), steps) == 0
    assert reward.count_warmup(Plan(warmup_steps=7), steps) == 7


INTERVALS = [
    ((0.4, 0.6), 0.5, 0.5, ["chance explains that"]),
    ((0.2, 0.4), 0.5, 0.5, ["worse than chance"]),
    ((0.55, 0.65), 0.02, 0.04, []),
    ((0.55, 0.65), -0.01, 0.1, ["the length of answers may explain that"]),
    ((0.55, 0.65), -0.3, -0.05, ["the length of answers and a bag of words may explain that"]),
]


@pytest.mark.parametrize(("interval", "longer", "words", "expected"), INTERVALS)
def test_an_accuracy_that_proves_nothing_is_warned_of(interval, longer, words, expected):
    low, high = interval

    def share(rate):
        return Proportion(rate=rate, n=40, low=low, high=high)

    def lead(least):
        return PairedDifference(difference=least + 0.04, n=40, low=least, high=least + 0.08)

    baselines = Baselines(
        longer=share(0.5),
        bag_of_words=share(0.6),
        over_longer=lead(longer),
        over_bag_of_words=lead(words),
    )
    accuracy = SetAccuracy(all=share((low + high) / 2), baselines=baselines)
    lines = list(reward_accuracy.warn_of_chance("b", accuracy))
    assert len(lines) == len(expected)

    for line, part in zip(lines, expected):
        assert line.startswith(f"right on {50 * (low + high):.1f} % of 40 pairs of b: ")
        assert part in line

    both = reward_accuracy.describe_accuracy("b", accuracy, {"safe", "helpful"})
    assert "the longer answer (about safety the shorter) is on 50.0 %" in both
    assert "the longer answer is on" in reward_accuracy.describe_accuracy(
        "b", accuracy, {"helpful"}
    )
    assert reward_accuracy.describe_accuracy("b", accuracy, {"safe"}) == (
        f"right on {50 * (low + high):.1f} % [{100 * low:.1f}, {100 * high:.1f}] of 40 pairs of b; the shorter answer "
        f"is on 50.0 % (the model {100 * longer + 4:+.1f} points [{100 * longer:+.1f}, "
        f"{100 * longer + 8:+.1f}]), a bag of words on 60.0 % (the model "
        f"{100 * words + 4:+.1f} points [{100 * words:+.1f}, {100 * words + 8:+.1f}])"
    )
    # files of earlier versions hold no leads, and prove nothing either way
    bare = Baselines(longer=share(0.9), bag_of_words=share(0.9))
    old = accuracy.model_copy(update={"baselines": bare})
    if low > 0.5:
        assert list(reward_accuracy.warn_of_chance("b", old)) == []
        assert "points" not in reward_accuracy.describe_accuracy("b", old, {"safe"})


def test_a_reward_model_learns_what_is_preferred(tmp_path, policy, tokenizer, capsys):
    """Good against bad is easy; the head is fresh, the warm-up fits a run of any length."""
    files = write(tmp_path / "help.jsonl", 64), write(tmp_path / "heldout.jsonl", 12)
    words = [
        "reward",
        "--model",
        policy,
        "--preferences.a.path",
        files[0],
        "--heldout.b.path",
        files[1],
        "--batch-size",
        8,
        "--training.optimizer.learning-rate",
        5e-3,
    ]
    assert llama2(*words, "--epochs", 3, "--out", tmp_path / "out") == 0
    heard = capsys.readouterr().err
    found = json.loads((tmp_path / "out/accuracy.json").read_text())["sets"]["b"]
    assert found["all"] == {"rate": 1.0, "n": 12, "low": found["all"]["low"], "high": 1.0}
    assert found["baselines"]["bag_of_words"] == found["all"]  # "good" beats "bad" for it as well,
    assert found["baselines"]["longer"] == found["all"]  # and is the longer word
    assert (
        "right on 100.0 % [75.8, 100.0] of 12 pairs of b; the longer answer is on 100.0 % (the model "
        "+0.0 points [-14.0, +14.0]), a bag of words on 100.0 %" in heard
    )
    for degree in DEGREES:
        assert f"b, {degree}: 100.0 % [43.9, 100.0] of 3 pairs; length is on 100.0 %" in heard
        assert found["baselines_by_degree"][degree]["over_longer"]["difference"] == 0.0

    stored = json.loads((tmp_path / "out/bag_of_words.json").read_text())
    assert (stored["fitted_to"], stored["words"]) == (64, ["bad", "good"])
    (few, same) = json.loads((tmp_path / "out/warnings.json").read_text())
    assert (
        few
        == "24 updates from 64 pairs in 3 epochs: fewer than 50 teach little; --batch-size 3 would give 66"
    )
    assert same.endswith(
        "the length of answers and a bag of words may explain that; more pairs, more updates or a "
        "larger model are needed to show more"
    )
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["sets"] == {"a": {"pairs": 64, "share": 1.0}}
    pairs = [
        Encoder(tokenizer, 200, 256).encode_pair(one) for one in records.read(Preference, files[0])
    ]
    assert summary["tokens"] == 3 * sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    assert summary["trained"] == 3 * 2 * 64  # an answer is scored at its last token
    assert checkpoint.is_scorer(tmp_path / "out")
    assert llama2(*words, "--training.plan.max-steps", 2, "--out", tmp_path / "short") == 0
    again = [*words[:2], tmp_path / "out", *words[3:]]
    assert llama2(*again, "--training.plan.max-steps", 1, "--out", tmp_path / "on") == 0
    first, on = (
        checkpoint.load_scorer(tmp_path / name).score.weight.detach() for name in ("out", "on")
    )
    assert float((first - on).abs().max()) < 0.01  # a reward model goes on with its own head
    assert not torch.equal(first, on)


@pytest.mark.parametrize(
    ("label", "weight", "said"),
    [
        (
            None,
            0.5,
            ["auxiliary_weight 0.5 needs safety labels of both kinds, and no pair has one"],
        ),
        ("both", 0.5, ["all labelled answers are safe"]),
        ("neither", 0.5, ["all labelled answers are unsafe"]),
        ("preferred_only", 0.5, []),
        (None, 0.0, []),
    ],
)
def test_an_auxiliary_loss_without_labels_to_separate_is_warned_of(tokenizer, label, weight, said):
    answers = Response("Yes."), Response("No.")
    one = Preference("x", messages_of([("user", "Hi")]), answers, 0, "better", label, "safe")
    unlabelled = Preference("y", messages_of([("user", "Hi")]), answers, 0, "better")
    pairs = [Encoder(tokenizer, 200, 256).encode_pair(each) for each in (one, unlabelled)]
    lines = list(reward.warn_of_labels(pairs, weight))
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines))


@pytest.mark.parametrize("axis", ["helpful", "safe"])
def test_the_last_line_is_about_the_axis_that_was_trained_on(tmp_path, policy, axis, capsys):
    """It is the one that a recipe shows."""
    sets = [write(tmp_path / f"{name}.jsonl", 8, name) for name in ("helpful", "safe")]
    assert (
        llama2(
            "reward",
            "--model",
            policy,
            "--preferences.a.path",
            write(tmp_path / "a.jsonl", 8, axis),
            "--heldout.helpful.path",
            sets[0],
            "--heldout.safe.path",
            sets[1],
            "--batch-size",
            8,
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if ": right on " in line and "warning" not in line
    ]
    assert len(lines) == 2
    assert f"of 8 pairs of {axis};" in lines[-1]


def test_a_limit_takes_some_pairs_by_chance(tmp_path, tokenizer):
    file = write(tmp_path / "help.jsonl", 30)
    whole, _ = mixed(config(a={"path": file}), tokenizer)
    made = config(a={"path": file, "limit": 7})
    sets, run = mixed(made, tokenizer)
    assert len(sets["a"]) == run.tally("preferences.a").kept == 7
    assert run.tally("preferences.a").skipped == {"over the limit": 23}
    assert all(pair in whole["a"] for pair in sets["a"])
    assert mixed(made, tokenizer)[0] == sets
    assert mixed(made.model_copy(update={"seed": 1}), tokenizer)[0] != sets
    heldout = read_heldout(made.preferences, Encoder(tokenizer, 200, 1000), run, 0)
    assert len(heldout["a"]) == 7


def test_a_head_with_a_rate_of_its_own_begins_at_zero(tmp_path, policy):
    words = ["reward", "--model", policy, "--preferences.a.path", write(tmp_path / "a.jsonl", 16)]
    words += ["--training.plan.max-steps", 1, "--training.optimizer.learning-rate", 1e-12]
    assert llama2(*words, "--head-learning-rate", 1e-3, "--out", tmp_path / "out") == 0
    head = checkpoint.load_scorer(tmp_path / "out").score.weight.detach()
    assert 0 < float(head.abs().max()) <= 1.1e-3  # one step of AdamW

    again = [*words[:2], tmp_path / "out", *words[3:], "--head-learning-rate", 1e-12]
    assert llama2(*again, "--out", tmp_path / "on") == 0
    on = checkpoint.load_scorer(tmp_path / "on").score.weight.detach()
    assert torch.allclose(on, head, atol=1e-9)  # one that was trained goes on as it was


def test_frozen_layers_stay_and_the_others_learn(tmp_path, policy):
    words = ["reward", "--model", policy, "--preferences.a.path", write(tmp_path / "a.jsonl", 16)]
    frozen = [*words, "--training.frozen-layers", 1, "--batch-size", 8, "--share-prompts"]
    assert llama2(*frozen, "--out", tmp_path / "out") == 0
    before, after = checkpoint.load(policy), checkpoint.load_scorer(tmp_path / "out")
    old = before.model.state_dict()
    changed = [
        name
        for name, tensor in after.model.state_dict().items()
        if not torch.equal(tensor, old[name])
    ]
    assert changed
    assert not any(name.startswith(("embed_tokens", "layers.0.")) for name in changed)
    assert all(name.startswith(("layers.", "norm")) for name in changed)


def test_a_model_whose_layers_are_all_frozen_is_refused(policy):
    trunk = checkpoint.load(policy).model
    with pytest.raises(UserError, match="frozen_layers 2 leaves none of the model's 2 layers"):
        freeze_lower(trunk, 2)
