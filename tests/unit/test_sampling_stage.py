"""What stages that sample share: seeds, prompts that fit, progress, and answers that do not depend
on parts."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from answers import prompt
from commands import llama2

from llama2 import records
from llama2.errors import UserError
from llama2.records import Prompt
from llama2.runs import Run
from llama2.stages.common import meter
from llama2.stages.common.sampling import (
    Sample,
    answer,
    keep_fitting,
    keep_scorable,
    load_chat,
    make_dialog,
    sample_in_parts,
    seed_use,
)
from llama2.tally import Tally
from llama2.tokenizer.template import encode_prompt


def test_two_uses_never_share_a_seed():
    """Where the seed plus a number named the use, seed 1's first turn was seed 0's second."""
    found = {
        seed_use(seed, *use)
        for seed in range(50)
        for use in (
            ("samples",),
            ("search",),
            *(("turn", turn) for turn in range(20)),
            *(("side", side, 0) for side in range(2)),
        )
    }
    assert len(found) == 50 * 24
    assert all(0 <= seed < 2**63 for seed in found)
    assert seed_use(0, "turn", 1) == seed_use(0, "turn", 1)


def test_prompts_without_room_are_counted_with_a_cure(policy, tmp_path):
    chat = load_chat(policy, Sample(), Run(tmp_path, False))
    tally = Tally()
    some = [prompt("Hi"), prompt("many words " * 400), prompt("Hello")]
    assert keep_fitting(chat, some, tally=tally) == [some[0], some[2]]
    assert tally.line() == (
        "read 3, kept 2, left out 1: longer than the context leaves room for 1 (shorten them, or "
        "take a model with a longer context)"
    )

    with pytest.raises(UserError, match="none of 1 prompts leaves 8 tokens"):
        keep_fitting(chat, some[1:2])


def test_prompts_that_ask_nothing_are_counted(policy, tmp_path):
    chat = load_chat(policy, Sample(), Run(tmp_path, False))
    some, tally = [prompt("Hi"), prompt(""), prompt(" \n")], Tally()
    assert keep_fitting(chat, some, tally=tally) == some[:1]
    assert tally.line() == "read 3, kept 1, left out 2: empty turn 2"

    with pytest.raises(UserError, match="none of 2 prompts asks anything"):
        keep_fitting(chat, some[1:])


def test_answers_depend_on_the_place_of_a_prompt_not_on_its_part(policy, prompts, tmp_path):
    some = [one.messages for one in records.read(Prompt, prompts)]
    sample = Sample(max_tokens=16, slots=4, precision="fp32")
    chat = load_chat(policy, sample, Run(tmp_path, False))
    whole = answer(chat, some, sample, n=3, seed=5)
    parts = [
        *answer(chat, some[:5], sample, n=3, seed=5, indices=range(5)),
        *answer(chat, some[5:], sample, n=3, seed=5, indices=range(5, 16)),
    ]
    assert [[one.completion.tokens for one in row] for row in parts] == [
        [one.completion.tokens for one in row] for row in whole
    ]
    other = answer(chat, some, sample, n=3, seed=5, indices=range(16, 32))
    assert other != whole


def test_answers_do_not_outgrow_the_reward_models(policy, tmp_path):
    """They may read less than the policy: found in the middle of a run, that would be its end."""
    sample, tally = Sample(max_tokens=20), Tally()
    chat = load_chat(policy, sample, Run(tmp_path, False))
    some = keep_fitting(
        chat, [prompt("Hi"), prompt("many words " * 4), prompt("Hello")], tally=tally
    )
    lengths = [len(encode_prompt(chat.tokenizer, one.messages)) for one in some]
    reads = SimpleNamespace(context=lengths[1] + 19)
    assert max(lengths[0], lengths[2]) < lengths[1]
    assert keep_scorable(chat, reads, some, sample, tally) == [some[0], some[2]]
    assert tally.line() == (
        "read 3, kept 2, left out 1: longer with an answer than the reward models read 1 (lower "
        "sample.max_tokens, or name reward models with a longer context)"
    )
    assert keep_scorable(chat, reads, some, Sample(max_tokens=19), Tally()) == some
    assert (
        keep_scorable(chat, SimpleNamespace(context=256), some, Sample(max_tokens=1000), Tally())
        == some
    )

    with pytest.raises(
        UserError,
        match="the reward models read 8 tokens: less than each of 3 prompts with an answer",
    ):
        keep_scorable(chat, SimpleNamespace(context=8), some, sample, Tally())


def test_a_new_answer_is_not_cut_off_because_another_was():
    """What a prompt was made of may have said so of an answer that is gone; `sft` would give this
    one no end."""
    made = make_dialog(prompt("Hi", cut=True, reward="high", family="a"), "Hello.", reward=1.0)
    assert made.metadata == {"family": "a", "reward": 1.0}
    assert make_dialog(prompt("Hi"), "Hel", cut=True).metadata == {"cut": True}


@pytest.mark.parametrize(
    ("part", "slots", "answers", "sizes"),
    [(1, 4, 2, [2, 2, 2, 1]), (64, 4, 2, [7]), (1, 1, 9, [1] * 7), (3, 1, 1, [3, 3, 1])],
)
def test_a_part_is_measured_in_answers(tmp_path, part, slots, answers, sizes):
    found = []

    def work(some, first):
        found.append(len(some))
        return [first + place for place in range(len(some))]

    sample = Sample(part=part, slots=slots)
    assert list(
        sample_in_parts(Run(tmp_path, False), [], "x", range(7), work, sample, answers)
    ) == list(range(7))
    assert found == sizes


def test_a_stage_says_how_far_it_is(policy, scorers, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(meter.Meter.__init__, "__defaults__", (0, 0.0))  # at every step
    assert (
        llama2(
            "rejection",
            "--policy",
            policy,
            "--rewards.helpful",
            scorers[0],
            "--prompts",
            prompts,
            "--k",
            2,
            "--temperatures",
            1.0,
            "--sample.max-tokens",
            8,
            "--sample.slots",
            4,
            "--sample.part",
            2,
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    said = re.findall(r"out: (\d+) of 32 answers", capsys.readouterr().err)
    counts = list(map(int, said))
    assert counts == sorted(counts)
    assert counts[-1] > 24


def test_a_policy_that_says_nothing_is_refused_before_it_is_asked(
    ruined, prompts, tmp_path, one_line
):
    said = "ruined: the model's log-probabilities are not finite; its weights are damaged"
    for words in (
        ("ghost", "--policy", ruined, "--questions", prompts),
        ("collect", "--policies", ruined, "--prompts", prompts),
        ("evaluate", "--versions.one", ruined, "--prompts", prompts),
    ):
        assert said in one_line(*words, "--out", tmp_path / f"out-{words[0]}")


def test_answers_end_at_every_id_that_the_policy_names(policy, tmp_path):
    several = tmp_path / "several"
    shutil.copytree(policy, several)
    (several / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, *range(5, 420)]})
    )
    (several / "checksums.json").unlink()
    chat = load_chat(several, Sample(), Run(tmp_path, False))
    ((found,),) = answer(chat, [prompt("Hi").messages], Sample(max_tokens=9))
    assert found.completion.finish == "stop"
    assert len(found.completion.tokens) == 1
