"""The pool of all rounds: old and new answers compete under the newest reward models."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from answers import prompt, score
from commands import llama2

from llama2 import records
from llama2.errors import UserError
from llama2.generate.rewards import RewardModels
from llama2.ranks import Ranks
from llama2.records import Dialog, Message, Prompt, StoredRecords
from llama2.runs import Run
from llama2.stages.common.pool import Pool, rescore
from llama2.stages.common.sampling import Sample, load_rewards, make_dialog

OLD_MODEL = 99.0  # what the reward models of an earlier round said: of no account


class Opinions:
    """Reward models whose opinion is the number that an answer ends with."""

    context = 200

    def __init__(self, tokenizer):
        self.tokenizer, self.rows = tokenizer, []

    def __call__(self, rows, tags):
        self.rows += rows
        said = [
            self.tokenizer.decode([token for token in row if token != self.tokenizer.eos]).split()
            for row in rows
        ]
        return [score(float(words[-1])) for words in said]


@pytest.fixture
def pool(tmp_path, tokenizer):
    """Writes rounds of {prompt: [answers]}, this one first; the pool as {prompt: [answers]} and its
    sizes."""

    def made(*rounds, keep=1, finished_only=True, cut=()):
        here = tmp_path / f"{finished_only}"
        paths = [here / f"round{len(rounds) - number}" for number in range(len(rounds))]
        for path, given in zip(paths, rounds):
            records.write(
                path / "best.jsonl",
                [
                    make_dialog(
                        prompt(asked),
                        text,
                        reward=OLD_MODEL,
                        safety=False,
                        **({"cut": True} if text in cut else {}),
                    )
                    for asked, texts in given.items()
                    for text in texts
                ],
            )

        run = Run(paths[0], False)
        rewards, chat = Opinions(tokenizer), SimpleNamespace(tokenizer=tokenizer)
        sizes = Pool(keep, finished_only, paths).write(run, chat, rewards, Sample())  # type: ignore[arg-type]
        found: dict[str, list[str]] = {}

        for one in records.read(Dialog, paths[0] / "pool.jsonl", may_be_empty=True):
            found.setdefault(one.messages[0].content, []).append(one.messages[-1].content)

        return found, sizes, rewards, run

    return made


def test_the_better_answer_stays_whatever_round_it_is_of(pool):
    found, sizes, _, run = pool({"p": ["new -3"], "q": ["new 2"]}, {"p": ["old 9"], "q": ["old 1"]})
    assert found == {"p": ["old 9"], "q": ["new 2"]}
    assert sizes == [1, 1]
    (kept, other) = records.read(Dialog, run.path / "pool.jsonl")
    assert (kept.metadata["reward"], other.metadata["reward"]) == (9.0, 2.0)  # of the newest models
    assert (
        run.tallies["pool"].line()
        == "read 4, kept 2, left out 2: said twice, or not among the best of its prompt 2"
    )


def test_prompts_that_are_not_asked_now_keep_their_best(pool):
    found, sizes, _, _ = pool(
        {"q": ["a 1"]}, {"r": ["b 0"], "p": ["c 1"]}, {"p": ["d 5"], "s": ["e -9"]}
    )
    assert found == {"q": ["a 1"], "r": ["b 0"], "p": ["d 5"], "s": ["e -9"]}
    assert list(found) == ["q", "r", "p", "s"]  # this round's, then in the order of the rounds
    assert sizes == [1, 1, 2]


def test_several_a_prompt_each_text_once_equals_go_to_the_newest(pool):
    found, sizes, _, _ = pool(
        {"p": ["x 3", "y 1"]}, {"p": ["x 3", "z 2", "w 1"]}, {"p": ["v 3"]}, keep=3
    )
    assert found == {"p": ["x 3", "v 3", "z 2"]}
    assert sizes == [1, 1, 1]


def test_what_was_cut_off_is_scored_without_an_end_and_kept_only_where_allowed(pool, tokenizer):
    rounds = ({"p": ["new 1"]}, {"p": ["old 9"]})
    assert pool(*rounds, cut=("old 9",))[0] == {"p": ["new 1"]}
    found, _, rewards, _ = pool(*rounds, cut=("old 9",), finished_only=False)
    assert found == {"p": ["old 9"]}
    ends = {tuple(row[-1:]) == (tokenizer.eos,) for row in rewards.rows}
    assert ends == {True, False}


def test_an_answer_too_long_for_the_reward_models_is_counted(pool):
    found, _, _, run = pool({"p": ["new 1"]}, {"p": ["word " * 300 + "9"]})
    assert found == {"p": ["new 1"]}
    assert "too long for the reward models 1" in run.tallies["pool"].line()


def test_the_answer_alone_is_learnt_also_of_dialogs_that_said_otherwise(tmp_path, tokenizer):
    asked = prompt("p")
    earlier = replace(make_dialog(asked, "old 9", reward=1.0), train="all")
    records.write(tmp_path / "one/best.jsonl", [earlier])
    records.write(tmp_path / "two/best.jsonl", [make_dialog(asked, "new 1", reward=1.0)])
    run, chat = Run(tmp_path / "two", False), SimpleNamespace(tokenizer=tokenizer)
    Pool(1, True, [tmp_path / "two", tmp_path / "one"]).write(
        run, chat, Opinions(tokenizer), Sample()
    )
    (kept,) = records.read(Dialog, tmp_path / "two/pool.jsonl")
    assert (kept.messages[-1].content, kept.train) == ("old 9", "last")


def test_the_safety_tag_reaches_the_reward_models(tokenizer):
    tags = []

    class Heard(Opinions):
        def __call__(self, rows, given):
            tags.extend(given)
            return super().__call__(rows, given)

    rewards = Heard(tokenizer)
    two = [
        make_dialog(prompt("p"), "a 1", safety=True),
        make_dialog(prompt("q"), "b 1", safety=False),
    ]
    rescore(two, tokenizer, rewards, True)
    assert tags == [True, False]


def test_an_empty_file_that_no_run_wrote_is_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.jsonl").touch()

    with pytest.raises(UserError, match=r"one/best.jsonl: the file is empty"):
        Pool(1, True, [tmp_path / "two", tmp_path / "one"])


def test_two_rounds_through_the_command_line(tmp_path, policy, scorers, prompts, tokenizer):
    words = [
        "rejection",
        "--policy",
        policy,
        "--rewards.helpful",
        scorers[0],
        "--rewards.safe",
        scorers[1],
        "--prompts",
        prompts,
        "--k",
        4,
        "--sample.max-tokens",
        24,
        "--temperatures",
        1.0,
    ]
    assert llama2(*words, "--limit", 10, "--out", tmp_path / "one") == 0
    assert (
        llama2(
            *words,
            "--limit",
            6,
            "--seed",
            5,
            "--out",
            tmp_path / "two",
            "--earlier",
            tmp_path / "one",
        )
        == 0
    )
    rounds = [list(records.read(Dialog, tmp_path / name / "best.jsonl")) for name in ("one", "two")]
    pool = list(records.read(Dialog, tmp_path / "two/pool.jsonl"))
    asked = [{one.messages[:-1] for one in some} for some in rounds]
    assert asked[0] & asked[1]
    assert asked[0] - asked[1]
    assert {one.messages[:-1] for one in pool} == asked[0] | asked[1]
    assert len(pool) == len(asked[0] | asked[1])
    said = {one.messages for some in rounds for one in some}
    assert {one.messages for one in pool} <= said
    rewards = load_rewards(
        RewardModels(helpful=scorers[0], safe=scorers[1]), tokenizer, Ranks.alone()
    )

    for one in pool:
        mine = [
            other for some in rounds for other in some if other.messages[:-1] == one.messages[:-1]
        ]
        marks = [mark for _, _, mark in rescore(mine, tokenizer, rewards, True)]
        # batches differ, in bf16
        assert one.metadata["reward"] == pytest.approx(max(marks), abs=0.02)

    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert summary["pool"].keys() == {"this round", str(tmp_path / "one")}
    assert sum(summary["pool"].values()) == len(pool)
    assert summary["earlier"] == summary["pool"][str(tmp_path / "one")] > 0
    assert summary["kept"] == len(rounds[1])


def test_records_are_read_where_they_stand(tmp_path: Path):
    made = [Prompt((Message("user", text),)) for text in ("a", "é日本", "c" * 5000)]
    records.write(tmp_path / "x.jsonl", made)
    (tmp_path / "x.jsonl").write_bytes(
        (tmp_path / "x.jsonl").read_bytes().replace(b"\n", b"\n\n", 1)
    )
    stored = StoredRecords(Prompt, tmp_path / "x.jsonl")
    assert (len(stored), list(stored), stored[1:]) == (3, made, made[1:])
    assert stored[-1] == made[-1]

    with pytest.raises(IndexError):
        stored[3]
