"""Which version is kept, and why."""

import json

import pytest
from commands import llama2

from llama2 import records
from llama2.model import checkpoint
from llama2.records import Prompt
from llama2.stages import select

CONFIG = select.Config(out="x", candidate="c", predecessor="p", prompts="q")


def of(kind, count):
    return [kind] * count


@pytest.mark.parametrize(("outcome", "kept", "reason"), [
    ([1.0] * 12 + [-1.0] * 8, "candidate", "it beats its predecessor"),
    ([1.0] * 10 + [-1.0] * 10, "predecessor", "it wins 50% of decided comparisons, 50% are needed"),
    ([0.0] * 15 + [1.0] * 3 + [-1.0] * 2, "candidate", "it beats its predecessor"),  # ties do not count
    ([0.0] * 20, "predecessor", "it wins 0% of decided comparisons, 50% are needed"),
])
def test_the_candidate_must_win_more_than_half(outcome, kept, reason):
    found = select.judge(CONFIG, of("helpful", 20), outcome)
    assert (found["kept"], found["reason"]) == (kept, reason)
    assert found["win_rate"]["all"]["ties"] == outcome.count(0.0)


def test_a_kind_of_prompt_that_gets_worse_stops_the_candidate():
    asked = of("helpful", 90) + of("unsafe", 30) + of("borderline", 10)
    found = select.judge(CONFIG, asked, [1.0] * 90 + [1.0] * 9 + [-1.0] * 21 + [1.0] * 10)
    assert found["kept"] == "predecessor"
    assert found["reason"] == "on unsafe prompts it wins 30%, 40% are needed"
    assert set(found["win_rate"]) == {"all", "helpful", "unsafe", "borderline"}
    few = select.judge(CONFIG, of("helpful", 30) + of("unsafe", 10), [1.0] * 30 + [1.0] * 3 + [-1.0] * 7)
    assert few["kept"] == "candidate"  # as likely by chance


def test_scores_become_preferences():
    assert select.compare_scores([[1.0, 2.0, 3.0], [2.0, 2.0, 1.0]]) == [-1.0, 0.0, 1.0]


def test_equal_texts_are_ties(world):
    asked = list(records.read(Prompt, world / "prompts-validation.jsonl"))
    assert select.compare_texts(CONFIG, asked, [["same"] * len(asked)] * 2) == [0.0] * len(asked)
    good = ["The job of nobody."] * len(asked)
    forwards = select.compare_texts(CONFIG, asked, [good, ["."] * len(asked)])
    backwards = select.compare_texts(CONFIG, asked, [["."] * len(asked), good])
    assert forwards == [-value for value in backwards]  # no favour to either side
    assert set(forwards) <= {-1.0, 0.0, 1.0}


def test_the_run_directory_becomes_the_version_kept(tmp_path, policy, base, scorers, prompts):
    words = ["select", "--predecessor", base, "--candidate", policy, "--prompts", prompts, "--sample.max-tokens", 16]
    assert llama2(*words, "--win-rate", 1, "--out", tmp_path / "never") == 0
    verdict = json.loads((tmp_path / "never/verdict.json").read_text())
    assert (verdict["kept"], verdict["predecessor"], verdict["candidate"]) == ("predecessor", "base", "policy")
    assert (tmp_path / "never/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    checkpoint.load(tmp_path / "never")
    judged = [*words, "--rewards.helpful", scorers[0], "--rewards.safe", scorers[1], "--win-rate", 0, "--worst-kind", 0]
    assert llama2(*judged, "--out", tmp_path / "judged") == 0
    verdict = json.loads((tmp_path / "judged/verdict.json").read_text())
    rate = verdict["win_rate"]["all"]
    assert rate["wins"] + rate["losses"] + rate["ties"] == 16
    assert verdict["kept"] == ("candidate" if rate["wins"] else "predecessor")
    chosen = policy if verdict["kept"] == "candidate" else base
    for name in ("config.json", "tokenizer.model", "model.safetensors", "tokenizer_config.json"):
        assert (tmp_path / "judged" / name).read_bytes() == (chosen / name).read_bytes()
    assert not (tmp_path / "judged/summary.json").exists()  # that of another stage
