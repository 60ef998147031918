"""Several versions and judges in turn: one model in memory at a time, parts that survive a kill,
what judges read."""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import llama2

from llama2 import records
from llama2.errors import UserError
from llama2.evaluate.judges import encode_judged
from llama2.formats import checkpoint
from llama2.generate import score
from llama2.generate.dialogue import Answer
from llama2.generate.generator import Completion
from llama2.model.llama import Llama
from llama2.model.scorer import Scorer
from llama2.recipe.workers import context, preload
from llama2.records import Message, Prompt
from llama2.runs import Run, parts
from llama2.stages.common import answers
from llama2.tally import Tally
from llama2.tokenizer.template import encode_dialog, encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer


def killed(words: list[object], after: int) -> int:
    """Carry out a command in a process that kills itself once `after` parts are on the disk; its
    exit status."""
    process = context.Process(target=_child, args=([str(word) for word in words], after))
    process.start()
    process.join(120)
    assert process.exitcode is not None

    return int(process.exitcode)


def _child(words: list[str], after: int) -> None:
    append, done = parts._Finished.append, [0]

    def counted(self: Any, *part: Any) -> None:
        append(self, *part)
        done[0] += 1
        if done[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)

    parts._Finished.append = counted  # type: ignore[method-assign]
    torch.set_num_threads(1)
    os._exit(llama2(*words))


def evaluation(base: Path, policy: Path, scorers: tuple[Path, Path], prompts: Path) -> list[object]:
    return [
        "evaluate",
        "--versions.SFT",
        base,
        "--versions.V1",
        policy,
        "--rewards.helpful",
        scorers[0],
        "--rewards.safe",
        scorers[1],
        "--prompts",
        prompts,
        "--max-tokens",
        12,
        "--slots",
        1,
    ]


def selection(base: Path, policy: Path, scorers: tuple[Path, Path], prompts: Path) -> list[object]:
    return [
        "select",
        "--predecessor",
        base,
        "--candidate",
        policy,
        "--rewards.helpful",
        scorers[0],
        "--rewards.safe",
        scorers[1],
        "--prompts",
        prompts,
        "--sample.max-tokens",
        12,
        "--sample.slots",
        1,
    ]


@pytest.mark.parametrize("command", [evaluation, selection])
def test_a_kill_changes_nothing(command, tmp_path, base, policy, scorers, prompts):
    preload()
    words = command(base, policy, scorers, prompts)
    assert llama2(*words, "--out", tmp_path / "whole") == 0
    broken = [*words, "--out", tmp_path / "broken"]
    assert killed(broken, 1) == -signal.SIGKILL  # within the answers of the first version
    assert killed(broken, 4) == -signal.SIGKILL
    kept = sorted(path.name for path in (tmp_path / "broken/checkpoints/parts").iterdir())
    assert {"answers-0.jsonl", "answers-1.jsonl"} <= set(kept)
    assert llama2(*broken) == 0
    names = [path.name for path in (tmp_path / "whole").iterdir() if path.is_file()]
    lasting = [
        name
        for name in names
        if name not in ("COMPLETE", "manifest.json", "config.yaml") and name[0] != "."
    ]
    assert {"evaluation.json", "samples.jsonl"} <= set(lasting) or "verdict.json" in lasting

    for name in lasting:
        assert (tmp_path / "broken" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes(), name


@pytest.mark.parametrize("command", [evaluation, selection])
def test_one_model_is_in_memory_at_a_time(
    command, tmp_path, base, policy, scorers, prompts, monkeypatch
):
    """Counted whenever an engine answers and whenever a judge scores."""

    def models() -> list[object]:
        gc.collect()
        return [
            one
            for one in gc.get_objects()
            if type(one) in (Llama, Scorer)
            and not any(parameter.is_meta for parameter in one.parameters())
        ]

    seen: list[tuple[str, int, torch.dtype]] = []
    before = len(models())
    ask, judge = answers.Chat.answer, answers.score_rows

    def asked(self: Any, *rest: Any) -> Any:
        seen.append(
            ("version", len(models()) - before, next(self.engine.refresh().parameters()).dtype)
        )
        return ask(self, *rest)

    def scored(scorer: Scorer, *rest: Any, **named: Any) -> Any:
        seen.append(
            ("judge", len(models()) - before, scorer.model.layers[0].mlp.up_proj.weight.dtype)
        )
        return judge(scorer, *rest, **named)

    monkeypatch.setattr(answers.Chat, "answer", asked)
    monkeypatch.setattr(answers, "score_rows", scored)
    loaded: list[Path] = []
    load = checkpoint.load_scorer
    monkeypatch.setattr(
        checkpoint,
        "load_scorer",
        lambda path, **kinds: (loaded.append(path), load(path, **kinds))[1],
    )
    assert llama2(*command(base, policy, scorers, prompts), "--out", tmp_path / "out") == 0
    assert {kind for kind, _, _ in seen} == {"version", "judge"}
    assert {(count, dtype) for _, count, dtype in seen} == {(1, torch.bfloat16)}
    assert loaded == list(scorers)  # each once


def test_equal_checkpoints_are_one(tmp_path, base, policy, tokenizer):
    plain = tmp_path / "plain"  # as another program writes it: no checksums
    plain.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        (plain / name).write_bytes((policy / name).read_bytes())

    assert answers.find_equals([base, policy, plain, base]) == [0, 1, 1, 0]
    (tmp_path / "elsewhere").mkdir()  # a server has the weights
    (tmp_path / "elsewhere/config.json").write_bytes((base / "config.json").read_bytes())
    tokenizer.save(tmp_path / "elsewhere")
    assert answers.find_equals([base, tmp_path / "elsewhere"]) == [0, 1]


def test_a_judge_reads_what_was_sampled(base):
    tokenizer = Tokenizer.load(base)
    prompt = Prompt((Message("user", "Name two fruits."),), "p")
    start, words = encode_prompt(tokenizer, prompt.messages), tokenizer.encode("The apple")
    ended = Answer("The apple", Completion((), (*words, tokenizer.eos), (), "stop"))
    cut = Answer("The apple", Completion((), tuple(words), (), "length"))
    assert encode_judged(tokenizer, prompt, ended, same=True) == [*start, *words, tokenizer.eos]
    # no end that nobody said
    assert encode_judged(tokenizer, prompt, cut, same=True) == [*start, *words]
    talk = (*prompt.messages, Message("assistant", "The apple"))
    assert encode_judged(tokenizer, prompt, ended, same=False) == encode_dialog(tokenizer, talk)[0]
    assert encode_judged(tokenizer, prompt, cut, same=False) == [*start, *words]


def test_scores_are_those_of_the_whole_model(tmp_path, policy, scorers, prompts):
    """The probability in samples.jsonl, worked out by hand in fp32."""
    assert (
        llama2(
            "evaluate",
            "--versions.SFT",
            policy,
            "--rewards.safe",
            scorers[1],
            "--prompts",
            prompts,
            "--max-tokens",
            3,
            "--precision",
            "fp32",
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert {row["finish"] for row in rows} >= {"length"}
    tokenizer, scorer = Tokenizer.load(policy), checkpoint.load_scorer(scorers[1]).eval()
    asked = list(records.read(Prompt, prompts))

    for row, prompt in zip(rows, asked, strict=True):
        if row["finish"] == "length":
            ids = [*encode_prompt(tokenizer, prompt.messages), *tokenizer.encode(row["answer"])]
            if len(tokenizer.encode(row["answer"])) != row["tokens"]:
                continue  # white space at its ends was sampled too

            (raw,) = score.score_rows(scorer, [ids], "fp32")
            assert row["reward_safe"] == pytest.approx(
                1 / (1 + pow(2.718281828459045, -raw)), abs=2e-5
            )


def test_prompts_left_out_are_counted(tmp_path, base, policy, scorers, capsys):
    long = Prompt((Message("user", "word " * 400),), "long")
    records.write(tmp_path / "prompts.jsonl", [Prompt((Message("user", "Hi."),), "short"), long])
    capsys.readouterr()
    assert (
        llama2(
            *selection(base, policy, scorers, tmp_path / "prompts.jsonl"), "--out", tmp_path / "out"
        )
        == 0
    )
    said = capsys.readouterr().err
    assert (
        "prompts: read 2, kept 1, left out 1: too long for the context of a version 1 (give shorter prompts)"
        in said
    )


def test_equal_answers_have_equal_scores_whatever_stands_beside_them(
    tmp_path, base, scorers, monkeypatch
):
    """Batches of other shapes round otherwise, as one more call does here, and a comparison must
    not be won by that."""
    tokenizer = Tokenizer.load(base)
    judge, calls = answers.score_rows, []

    def rounded(*rest: Any, **named: Any) -> list[float]:
        calls.append(len(rest[1]))
        return [mark + 1e-5 * len(calls) for mark in judge(*rest, **named)]

    monkeypatch.setattr(answers, "score_rows", rounded)
    asked = [
        Prompt((Message("user", f"Name {number} fruits."),), str(number)) for number in range(24)
    ]

    def said(text: str) -> Answer:
        return Answer(text, Completion((), (*tokenizer.encode(text), tokenizer.eos), (), "stop"))

    ours = [said("The apple " * (1 + number % 5)) for number in range(24)]
    theirs = [
        said("A long answer, " * 8) if number % 3 == 0 else one for number, one in enumerate(ours)
    ]
    cut = [
        Answer(one.text, Completion((), one.completion.tokens[:-1], (), "length")) for one in ours
    ]
    run = Run(tmp_path, False)
    marks = answers.judge_answers(
        run, "judge", scorers[0], "fp32", asked, {0: ours, 1: theirs, 2: cut}, [base] * 3
    )
    assert [a == b for a, b in zip(marks[0], marks[1])] == [number % 3 != 0 for number in range(24)]
    # an answer without an end is another
    assert not any(a == b for a, b in zip(marks[0], marks[2]))
    assert calls == [24, 8, 24]
    rows = [encode_judged(tokenizer, prompt, one, same=True) for prompt, one in zip(asked, theirs)]
    assert marks[1] == pytest.approx(
        judge(answers.load_judge(scorers[0], "fp32", run.ranks.device), rows, "fp32"), abs=1e-4
    )


def test_prompts_that_ask_nothing_are_counted(base, tmp_path):
    some, tally = [Prompt((Message("user", said),), said) for said in ("Hi", "", " ")], Tally()
    assert answers.keep_fitting([base], some, 8, tally, tmp_path) == some[:1]
    assert tally.line() == "read 3, kept 1, left out 2: empty turn 2"

    with pytest.raises(UserError, match="it holds no prompt; give prompts"):
        answers.keep_fitting([base], some[1:], 8, tally, tmp_path)
