"""Which version is kept, and why."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import llama2

from llama2 import records
from llama2.formats import checkpoint
from llama2.microworld.annotators import SimulatedAnnotators
from llama2.records import Prompt
from llama2.stages import select

CONFIG = select.Config(out="x", candidate="c", predecessor="p", prompts="q")


def of(kind, count):
    return [kind] * count


@pytest.mark.parametrize(
    ("outcome", "kept", "reason"),
    [
        ([1.0] * 12 + [-1.0] * 8, "candidate", "it beats its predecessor"),
        (
            [1.0] * 10 + [-1.0] * 10,
            "predecessor",
            "it wins 50% of decided comparisons, 50% are needed",
        ),
        # ties do not count
        ([0.0] * 15 + [1.0] * 3 + [-1.0] * 2, "candidate", "it beats its predecessor"),
        ([0.0] * 20, "predecessor", "all 20 comparisons are ties"),
    ],
)
def test_the_candidate_must_win_more_than_half(outcome, kept, reason):
    found = select.judge(CONFIG, of("helpful", 20), outcome)
    assert (found.kept, found.reason) == (kept, reason)
    assert found.win_rate["all"].ties == outcome.count(0.0)


def test_a_kind_of_prompt_that_gets_worse_stops_the_candidate():
    asked = of("helpful", 90) + of("unsafe", 30) + of("borderline", 10)
    found = select.judge(CONFIG, asked, [1.0] * 90 + [1.0] * 6 + [-1.0] * 24 + [1.0] * 10)
    assert found.kept == "predecessor"
    assert found.reason == "on unsafe prompts it wins 20%, 40% are needed"
    assert set(found.win_rate) == {"all", "helpful", "unsafe", "borderline"}
    few = select.judge(
        CONFIG, of("helpful", 30) + of("unsafe", 10), [1.0] * 30 + [1.0] * 3 + [-1.0] * 7
    )
    assert few.kept == "candidate"  # as likely by chance


@pytest.mark.parametrize(
    ("kinds", "wins", "losses", "kept"),
    [
        # 25 % [11, 47] alone; the interval that holds for four kinds together reaches 53 %
        (4, 5, 15, "candidate"),
        (4, 4, 16, "predecessor"),
        (4, 0, 7, "predecessor"),
    ],
)
def test_more_kinds_find_more_by_chance(kinds, wins, losses, kept):
    asked, outcome = of("borderline", wins + losses), [1.0] * wins + [-1.0] * losses
    for kind in ("helpful", "unsafe", "ghost")[: kinds - 1]:
        asked, outcome = asked + [kind] * 20, [*outcome, *[1.0] * 20]

    assert select.judge(CONFIG, asked, outcome).kept == kept


def test_scores_become_preferences():
    assert select.compare_scores([[1.0, 2.0, 3.0], [2.0, 2.0, 1.0]]) == [-1.0, 0.0, 1.0]


def test_equal_texts_are_ties(world):
    asked = list(records.read(Prompt, world / "prompts-validation.jsonl"))
    assert select.compare_texts(SimulatedAnnotators(1), asked, [["same"] * len(asked)] * 2) == [
        0.0
    ] * len(asked)
    good = ["The job of nobody."] * len(asked)
    forwards = select.compare_texts(SimulatedAnnotators(1), asked, [good, ["."] * len(asked)])
    backwards = select.compare_texts(SimulatedAnnotators(1), asked, [["."] * len(asked), good])
    assert forwards == [-value for value in backwards]  # no favour to either side
    assert set(forwards) <= {-1.0, 0.0, 1.0}


def test_what_nobody_has_judged_yet_is_a_tie(world, monkeypatch):
    asked = list(records.read(Prompt, world / "prompts-validation.jsonl"))
    monkeypatch.setattr(SimulatedAnnotators, "judge", lambda self, comparison: "pending")
    texts = [["The job of nobody."] * len(asked), ["."] * len(asked)]
    assert select.compare_texts(SimulatedAnnotators(1), asked, texts) == [0.0] * len(asked)


def test_the_run_directory_becomes_the_version_kept(tmp_path, policy, base, scorers, prompts):
    words = [
        "select",
        "--predecessor",
        base,
        "--candidate",
        policy,
        "--prompts",
        prompts,
        "--sample.max-tokens",
        16,
    ]
    assert llama2(*words, "--win-rate", 1, "--out", tmp_path / "never") == 0
    verdict = json.loads((tmp_path / "never/verdict.json").read_text())
    assert (verdict["kept"], verdict["predecessor"], verdict["candidate"]) == (
        "predecessor",
        "base",
        "policy",
    )
    assert (tmp_path / "never/model.safetensors").read_bytes() == (
        base / "model.safetensors"
    ).read_bytes()
    checkpoint.load(tmp_path / "never")
    judged = [
        *words,
        "--rewards.helpful",
        scorers[0],
        "--rewards.safe",
        scorers[1],
        "--win-rate",
        0,
        "--worst-kind",
        0,
    ]
    assert llama2(*judged, "--out", tmp_path / "judged") == 0
    verdict = json.loads((tmp_path / "judged/verdict.json").read_text())
    rate = verdict["win_rate"]["all"]
    assert rate["wins"] + rate["losses"] + rate["ties"] == 16
    assert verdict["kept"] == ("candidate" if rate["wins"] else "predecessor")
    chosen = policy if verdict["kept"] == "candidate" else base

    for name in ("config.json", "tokenizer.model", "model.safetensors", "tokenizer_config.json"):
        assert (tmp_path / "judged" / name).read_bytes() == (chosen / name).read_bytes()

    assert not (tmp_path / "judged/summary.json").exists()  # that of another stage

    # dialogs under a lasting instruction, made of the same prompts, are comparisons too
    talks = ["--ghost", prompts, "--ghost-turns", 2, "--ghost-instructions", "brief", "case"]
    assert llama2(*judged, *talks, "--ghost-limit", 3, "--out", tmp_path / "talks") == 0
    verdict = json.loads((tmp_path / "talks/verdict.json").read_text())
    rate = verdict["win_rate"]["ghost"]
    assert rate["wins"] + rate["losses"] + rate["ties"] == 3


def test_prompts_without_truth_need_reward_models(
    tmp_path, policy, base, scorers, prompts, one_line, monkeypatch
):
    asked = list(records.read(Prompt, prompts))
    records.write(
        tmp_path / "plain.jsonl", [Prompt(one.messages, one.id, one.safety) for one in asked]
    )
    words = ["select", "--predecessor", base, "--candidate", policy, "--sample.max-tokens", 8]
    plain = [*words, "--prompts", tmp_path / "plain.jsonl"]

    with monkeypatch.context() as patched:
        patched.setattr(
            select, "load_chat", lambda *rest: pytest.fail("it samples before it refuses")
        )
        assert "no prompt carries the ground truth (metadata.gold)" in one_line(
            *plain, "--out", tmp_path / "refused"
        )
        said = one_line(*plain, "--rewards.helpful", base, "--out", tmp_path / "no")
        assert "not a reward model" in said
        said = one_line(
            *plain,
            "--rewards.helpful",
            scorers[0],
            "--rewards.rule",
            "min",
            "--out",
            tmp_path / "no",
        )
        assert "needs a safety reward model" in said

    assert llama2(*plain, "--rewards.helpful", scorers[0], "--out", tmp_path / "judged") == 0
    assert (
        json.loads((tmp_path / "judged/verdict.json").read_text())["win_rate"]["all"]["ties"] <= 16
    )


def test_prompts_with_truth_on_some_are_judged_on_those(tmp_path, policy, base, prompts, capsys):
    asked = list(records.read(Prompt, prompts))
    half = [one if index % 2 else Prompt(one.messages, one.id) for index, one in enumerate(asked)]
    records.write(tmp_path / "half.jsonl", half)
    capsys.readouterr()
    assert (
        llama2(
            "select",
            "--predecessor",
            base,
            "--candidate",
            policy,
            "--sample.max-tokens",
            8,
            "--prompts",
            tmp_path / "half.jsonl",
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    assert "read 16, kept 8, left out 8: without ground truth 8" in capsys.readouterr().err
    found = json.loads((tmp_path / "out/verdict.json").read_text())["win_rate"]["all"]
    assert found["wins"] + found["losses"] + found["ties"] == 8


def test_pickled_weights_are_kept_too(tmp_path, base):
    """A directory as others have it, with `pytorch_model.bin`, and one whose files are links into a
    store."""
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    model = checkpoint.load(base)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")

    for name in ("config.json", "tokenizer.model"):
        (pickled / name).write_bytes((base / name).read_bytes())

    linked = tmp_path / "linked"
    linked.mkdir()
    for path in pickled.iterdir():
        (linked / path.name).symlink_to(path)

    for source in (pickled, linked):
        target = tmp_path / f"kept-{source.name}"
        target.mkdir()
        select.copy(source, target)
        assert not any(path.is_symlink() for path in target.iterdir())
        found = checkpoint.load(target)
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters()))


def test_all_that_makes_up_a_model_is_kept_and_nothing_else(tmp_path, base):
    source = Path(shutil.copytree(base, tmp_path / "source"))
    beside = (
        "generation_config.json",
        "tokenizer.json",
        "added_tokens.json",
        "chat_template.jinja",
    )
    for name in (*beside, "README.md", "optimizer.pt"):
        (source / name).write_text("{}")

    target = tmp_path / "target"
    target.mkdir()
    select.copy(source, target)
    assert {path.name for path in target.iterdir()} == {
        *(path.name for path in base.iterdir()),
        *beside,
    }


def test_equal_versions_are_answered_once(tmp_path, policy, prompts, monkeypatch):
    calls = []
    load = select.load_chat
    monkeypatch.setattr(
        select, "load_chat", lambda path, *rest: (calls.append(path), load(path, *rest))[1]
    )
    assert (
        llama2(
            "select",
            "--predecessor",
            policy,
            "--candidate",
            policy,
            "--sample.max-tokens",
            8,
            "--prompts",
            prompts,
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    assert len(calls) == 1
    verdict = json.loads((tmp_path / "out/verdict.json").read_text())
    assert (verdict["kept"], verdict["win_rate"]["all"]["ties"]) == ("predecessor", 16)
