"""Comparisons: who is compared, on which axis, what is swapped, preprompted and held out."""

import json

import pytest
from answers import prompt
from commands import llama2

from llama2 import records
from llama2.data.split import is_heldout
from llama2.evaluate.judges import kind_of
from llama2.records import Preference, Prompt, Response
from llama2.stages import collect


@pytest.fixture
def words(policy, prompts):
    return ["collect", "--policies", policy, "--prompts", prompts, "--sample.max-tokens", 24]


def read(out):
    kept = list(records.read(Preference, out / "preferences.jsonl", may_be_empty=True))
    return kept, list(records.read(Preference, out / "heldout.jsonl", may_be_empty=True))


def test_every_prompt_is_compared_on_its_axis(tmp_path, words, prompts):
    assert llama2(*words, "--heldout", 0.3, "--round", 2, "--out", tmp_path / "out") == 0
    kept, aside = read(tmp_path / "out")
    kinds = {one.messages: kind_of(one) for one in records.read(Prompt, prompts)}
    axes = {"helpful": {"helpful"}, "unsafe": {"safe"}, "borderline": {"helpful", "safe"}}
    for one in kept + aside:
        assert one.axis in axes[kinds[one.prompt]]
        assert (one.safety is not None) == (one.axis == "safe")
        assert one.round == 2
        assert sorted(response.temperature for response in one.responses) == [0.7, 1.0]
        assert {response.model for response in one.responses} == {"policy"}
        assert one.responses[0].text != one.responses[1].text
    assert {one.axis for one in kept} == {"helpful", "safe"}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["pairs"], summary["heldout"]) == (len(kept), len(aside))
    assert sum(summary["degrees"].values()) == len(kept) + len(aside)
    assert aside


def test_held_out_comparisons_are_chosen_by_their_question(tmp_path, words):
    """A question held out once is held out always, on both axes and in every round."""
    assert llama2(*words, "--heldout", 0.5, "--out", tmp_path / "all") == 0
    assert llama2(*words, "--heldout", 0.2, "--round", 2, "--seed", 3, "--both-axes", 1, "--out", tmp_path / "few") == 0
    (kept, more), (later, fewer) = read(tmp_path / "all"), read(tmp_path / "few")
    assert all(is_heldout(one.prompt, 0.5) for one in more)
    assert not any(is_heldout(one.prompt, 0.5) for one in kept)
    assert {one.prompt for one in fewer} <= {one.prompt for one in more}
    assert not {one.prompt for one in fewer} & {one.prompt for one in (*kept, *later)}


def test_safety_prompts_may_be_judged_on_helpfulness_too():
    pairs = [(prompt(str(index), safety=index % 2 == 0), (Response("a"), Response("b"))) for index in range(400)]
    config = collect.Config(out="x", policies=["p"], prompts="q")
    some = list(collect.helpful(config, pairs))
    assert [one[0].safety for one in some] == [False] * 200
    some = list(collect.helpful(config.model_copy(update={"both_axes": 0.5}), pairs))
    assert 70 < sum(one[0].safety for one in some) < 130
    assert sum(not one[0].safety for one in some) == 200


def test_swapped_answers_belong_to_other_prompts(tmp_path, words):
    assert llama2(*words, "--heldout", 0, "--noise", 0, "--out", tmp_path / "plain") == 0
    assert llama2(*words, "--heldout", 0, "--noise", 0, "--swapped", 0.5, "--out", tmp_path / "swapped") == 0

    def by_prompt(name):
        return {one.prompt: {r.temperature: r.text for r in one.responses} for one in read(tmp_path / name)[0]}

    plain, swapped = by_prompt("plain"), by_prompt("swapped")
    both = plain.keys() & swapped.keys()
    assert all(plain[asked][1.0] == swapped[asked][1.0] for asked in both)  # the first answer stays
    moved = [asked for asked in both if plain[asked][0.7] != swapped[asked][0.7]]
    assert 3 <= len(moved) <= 13
    texts = {answers[0.7] for answers in plain.values()}
    assert all(swapped[asked][0.7] in texts for asked in moved)


def test_two_policies_answer_side_by_side(tmp_path, words, base, policy):
    assert llama2(words[0], words[1], policy, base, *words[3:], "--out", tmp_path / "out") == 0
    kept, aside = read(tmp_path / "out")
    for one in kept + aside:
        assert {response.temperature: response.model for response in one.responses} == {1.0: "policy", 0.7: "base"}


def test_answers_under_a_preprompt_are_recorded_as_answers_to_the_bare_prompt(tmp_path, words, prompts):
    assert llama2(*words, "--heldout", 0, "--noise", 0, "--out", tmp_path / "plain") == 0
    assert llama2(*words, "--heldout", 0, "--noise", 0, "--preprompted", 1, "--out", tmp_path / "under") == 0
    plain, under = ({one.prompt: {r.temperature: r.text for r in one.responses} for one in read(tmp_path / name)[0]}
                    for name in ("plain", "under"))
    kinds = {one.messages: kind_of(one) for one in records.read(Prompt, prompts)}
    changed = {asked for asked in plain.keys() & under.keys() if plain[asked][0.7] != under[asked][0.7]}
    assert changed
    assert all(kinds[asked] != "helpful" for asked in changed)


def test_one_to_two_policies_are_compared(one_line, tmp_path):
    heard = one_line("collect", "--policies", "[]", "--prompts", "q", "--out", tmp_path / "x")
    assert heard.startswith("'policies': Tuple should have at least 1 item")
    heard = one_line("collect", "--policies", "a", "b", "c", "--prompts", "q", "--out", tmp_path / "x")
    assert heard.startswith("'policies': Tuple should have at most 2 items")
