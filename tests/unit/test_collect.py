"""Comparisons: who is compared, on which axis, what is swapped, preprompted and held out."""

import itertools
import json
from dataclasses import replace

import pytest
from answers import prompt
from commands import llama2

from llama2 import records
from llama2.data.split import is_heldout
from llama2.evaluate.judges import classify
from llama2.microworld.annotators import SimulatedAnnotators
from llama2.records import Pair, Preference, Prompt, Response
from llama2.stages import collect
from llama2.tally import Tally


@pytest.fixture
def words(policy, prompts):
    return ["collect", "--policies", policy, "--prompts", prompts, "--sample.max-tokens", 24]


@pytest.fixture
def prompts(world):
    """All of the small world: the tiny policy's answers are often empty, and make no comparison
    then."""
    return world / "prompts-train.jsonl"


def read(out):
    kept = list(records.read(Preference, out / "preferences.jsonl", may_be_empty=True))
    return kept, list(records.read(Preference, out / "heldout.jsonl", may_be_empty=True))


def test_every_prompt_is_compared_on_its_axis(tmp_path, words, prompts):
    assert llama2(*words, "--heldout", 0.3, "--round", 2, "--out", tmp_path / "out") == 0
    kept, aside = read(tmp_path / "out")
    kinds = {one.messages: classify(one) for one in records.read(Prompt, prompts)}
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
    assert (
        llama2(
            *words,
            "--heldout",
            0.2,
            "--round",
            2,
            "--seed",
            3,
            "--both-axes",
            1,
            "--out",
            tmp_path / "few",
        )
        == 0
    )
    (kept, more), (later, fewer) = read(tmp_path / "all"), read(tmp_path / "few")
    assert all(is_heldout(one.prompt, 0.5) for one in more)
    assert not any(is_heldout(one.prompt, 0.5) for one in kept)
    assert all(is_heldout(one.prompt, 0.2) for one in fewer)
    assert not any(is_heldout(one.prompt, 0.2) for one in later)
    assert not {one.prompt for one in fewer} & {one.prompt for one in (*kept, *later)}


def test_safety_prompts_may_be_judged_on_helpfulness_too():
    config = collect.Config(out="x", policies=["p"], prompts="q")
    unsafe, kind, borderline = (
        prompt("x", safety=safety, **family)
        for safety, family in ((True, {}), (False, {}), (True, {"family": "borderline"}))
    )
    assert {collect.choose_axes(config, unsafe, place) for place in range(50)} == {("safe",)}
    both = config.model_copy(update={"both_axes": 0.5})
    share = sum(
        collect.choose_axes(both, unsafe, place) == ("safe", "helpful") for place in range(400)
    )
    assert 160 < share < 240
    assert collect.choose_axes(both, kind, 0) == ("helpful",)
    assert collect.choose_axes(config, borderline, 0) == ("safe", "helpful")


def test_swapped_answers_belong_to_other_prompts(tmp_path, words):
    assert llama2(*words, "--heldout", 0, "--noise", 0, "--out", tmp_path / "plain") == 0
    assert (
        llama2(
            *words, "--heldout", 0, "--noise", 0, "--swapped", 0.5, "--out", tmp_path / "swapped"
        )
        == 0
    )

    def by_prompt(name):
        return {
            one.prompt: {r.temperature: r.text for r in one.responses}
            for one in read(tmp_path / name)[0]
        }

    plain, swapped = by_prompt("plain"), by_prompt("swapped")
    both = plain.keys() & swapped.keys()
    assert all(plain[asked][1.0] == swapped[asked][1.0] for asked in both)  # the first answer stays
    moved = [asked for asked in both if plain[asked][0.7] != swapped[asked][0.7]]
    assert len(both) / 5 < len(moved) < len(both) * 4 / 5
    texts = {answers[0.7] for answers in plain.values()}
    known = sum(swapped[asked][0.7] in texts for asked in moved)
    assert known > len(moved) / 2  # the others belong to prompts that made no comparison


def test_two_policies_answer_side_by_side(tmp_path, words, base, policy):
    assert llama2(words[0], words[1], policy, base, *words[3:], "--out", tmp_path / "out") == 0
    kept, aside = read(tmp_path / "out")
    for one in kept + aside:
        assert {response.temperature: response.model for response in one.responses} == {
            1.0: "policy",
            0.7: "base",
        }


def test_answers_under_a_preprompt_are_recorded_as_answers_to_the_bare_prompt(
    tmp_path, words, prompts
):
    assert llama2(*words, "--heldout", 0, "--noise", 0, "--out", tmp_path / "plain") == 0
    assert (
        llama2(
            *words,
            "--heldout",
            0,
            "--noise",
            0,
            "--preprompted",
            1,
            "--preprompts",
            "Be a {a} and {b} assistant.",
            "--out",
            tmp_path / "under",
        )
        == 0
    )
    plain, under = (
        {
            one.prompt: {r.temperature: r.text for r in one.responses}
            for one in read(tmp_path / name)[0]
        }
        for name in ("plain", "under")
    )
    kinds = {one.messages: classify(one) for one in records.read(Prompt, prompts)}
    changed = {
        asked for asked in plain.keys() & under.keys() if plain[asked][0.7] != under[asked][0.7]
    }
    assert changed
    assert all(kinds[asked] != "helpful" for asked in changed)


def test_one_to_two_policies_are_compared(one_line, tmp_path):
    heard = one_line("collect", "--policies", "[]", "--prompts", "q", "--out", tmp_path / "x")
    assert heard.startswith("'--policies': needs at least 1")
    heard = one_line(
        "collect", "--policies", "a", "b", "c", "--prompts", "q", "--out", tmp_path / "x"
    )
    assert heard.startswith("'--policies': takes at most 2")


@pytest.fixture
def plain(tmp_path, prompts):
    """Sixty prompts of which nobody knows the truth."""
    # what others call gold
    golds = itertools.cycle([{}, {"gold": "42"}, {"gold": None}, {"gold": {"answer": "42"}}])
    some = [
        replace(one, metadata={k: v for k, v in one.metadata.items() if k != "gold"} | gold)
        for one, gold in zip(records.read(Prompt, prompts), golds)
    ][:60]
    records.write(tmp_path / "plain.jsonl", some)

    return tmp_path / "plain.jsonl"


def test_pairs_of_prompts_without_truth_wait_for_people(tmp_path, policy, plain, capsys):
    words = ["collect", "--policies", policy, "--prompts", plain, "--sample.max-tokens", 24]
    assert llama2(*words, "--round", 3, "--out", tmp_path / "out") == 0
    heard = capsys.readouterr().err
    pairs = list(records.read(Pair, tmp_path / "out/pairs.jsonl"))
    assert f"not judged yet {len(pairs)} (they are in pairs.jsonl, for people to judge)" in heard
    assert not (tmp_path / "out/preferences.jsonl").exists()
    assert len(pairs) >= 20
    known = {one.id: one for one in records.read(Prompt, plain)}
    firsts = set()

    for one in pairs:
        asked = known[one.metadata["prompt"]]
        assert one.prompt == asked.messages
        assert one.round == 3
        axes = {"helpful": {"helpful"}, "unsafe": {"safe"}, "borderline": {"helpful", "safe"}}
        assert one.axis in axes[classify(asked)]
        assert {answer.model for answer in one.responses} == {"policy"}
        assert {answer.temperature for answer in one.responses} == {0.7, 1.0}
        assert one.responses[0].text != one.responses[1].text
        firsts.add(one.responses[0].temperature)

    assert firsts == {0.7, 1.0}  # the order shown tells nothing
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["pairs"], summary["unjudged"]) == (0, len(pairs))


def test_judged_pairs_are_preferences_and_others_are_counted(tmp_path, policy, plain, capsys):
    assert (
        llama2(
            "collect",
            "--policies",
            policy,
            "--prompts",
            plain,
            "--sample.max-tokens",
            24,
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    for row in rows[2:]:
        row |= {"preferred": 1, "degree": "slightly", "annotator": "ann"}

    file = tmp_path / "judged.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        llama2(
            "prepare",
            "--kind",
            "preferences",
            "--sources.mine.path",
            file,
            "--out",
            tmp_path / "prepared",
        )
        == 0
    )
    found = {
        one.id: one for one in records.read(Preference, tmp_path / "prepared/preferences.jsonl")
    }
    assert found.keys() == {row["id"] for row in rows[2:]}
    one = found[rows[-1]["id"]]
    assert (one.chosen.text, one.degree, one.annotator) == (
        rows[-1]["responses"][1]["text"],
        "slightly",
        "ann",
    )
    assert "not judged yet" in capsys.readouterr().err


def test_prompts_with_and_without_truth(tmp_path, policy, plain, prompts):
    mixed = [*list(records.read(Prompt, prompts))[60:], *records.read(Prompt, plain)]
    records.write(tmp_path / "mixed.jsonl", mixed)
    assert (
        llama2(
            "collect",
            "--policies",
            policy,
            "--prompts",
            tmp_path / "mixed.jsonl",
            "--sample.max-tokens",
            24,
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    kept, aside = read(tmp_path / "out")
    pairs = list(records.read(Pair, tmp_path / "out/pairs.jsonl"))
    judged = {one.prompt for one in (*kept, *aside)}
    assert judged
    assert pairs
    assert judged <= {one.messages for one in mixed[:-60]}
    assert {one.prompt for one in pairs} <= {one.messages for one in mixed[-60:]}


class Later(SimulatedAnnotators):
    """People who have answered when they are asked again."""

    def __init__(self):
        super().__init__()
        self.enqueued = set()

    def compare(self, comparisons):
        for comparison, outcome in super().compare(comparisons):
            yield comparison, outcome if comparison.id in self.enqueued else "pending"
            self.enqueued.add(comparison.id)


def test_what_is_not_judged_yet_waits_in_pairs_and_is_a_preference_later(
    tmp_path, words, monkeypatch
):
    annotators = Later()
    monkeypatch.setattr(collect, "make_annotators", lambda seed, noise: annotators)
    assert llama2(*words, "--out", tmp_path / "asked") == 0
    assert read(tmp_path / "asked") == ([], [])
    pairs = list(records.read(Pair, tmp_path / "asked/pairs.jsonl"))
    assert len(pairs) >= 20
    assert json.loads((tmp_path / "asked/summary.json").read_text())["unjudged"] == len(pairs)

    assert llama2(*words, "--out", tmp_path / "answered") == 0
    kept, aside = read(tmp_path / "answered")
    judged = {(one.prompt, one.axis, frozenset(one.responses)) for one in (*kept, *aside)}
    assert judged
    assert judged <= {(one.prompt, one.axis, frozenset(one.responses)) for one in pairs}
    assert not (tmp_path / "answered/pairs.jsonl").exists()


def test_equal_and_empty_answers_are_no_comparison():
    config = collect.Config(out="x", policies=["p"], prompts="q")
    tally = Tally()
    desk = collect.Desk(config, SimulatedAnnotators(), tally)

    for texts in (("same", "same"), ("", "x"), ("", "")):
        pairs = [(prompt("x"), (Response(texts[0]), Response(texts[1])))]
        assert list(desk.compare(pairs)) == []

    assert tally.line() == "read 3, kept 0, left out 3: equal answers 2, an empty answer 1"
