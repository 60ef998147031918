"""Fine-tuning: what is held out is never trained on, nothing is learnt from silence, every dialog
is accounted for."""

import json

import pytest
from commands import llama2

from llama2 import records
from llama2.config import build
from llama2.data.split import ENOUGH, choose_heldout, is_heldout, normalize_opening
from llama2.errors import UserError
from llama2.records import Dialog, messages_of
from llama2.runs import Run
from llama2.stages import sft
from llama2.tokenizer.template import encode_dialog


def dialog(*turns, train="all"):
    roles = ("user", "assistant") * len(turns)
    return Dialog(messages_of(list(zip(roles, turns))), train)


def write(path, dialogs):
    records.write(path, dialogs)
    return path


def config(directory, sets, **changes):
    made = {
        name: {"path": write(directory / f"{name}.jsonl", found), **more}
        for name, (found, more) in sets.items()
    }
    return build(sft.Config, {"out": directory / "out", "model": "m", "dialogs": made, **changes})


def split(directory, sets, **changes):
    """Openings trained on, openings held out, and the run with its counts."""
    run = Run(directory, False)
    training, heldout = sft.read_dialogs(config(directory, sets, **changes), run)
    return (
        [normalize_opening(one.messages) for found in training.values() for one in found],
        heldout,
        run,
    )


# --- the split ---


@pytest.mark.parametrize("weight", [1, 1.5, 3])
def test_no_held_out_conversation_is_trained_on_whatever_its_weight(tmp_path, tokenizer, weight):
    dialogs = [dialog(f"Question {n}", f"Answer {n}") for n in range(60)]
    made = config(tmp_path, {"a": (dialogs, {"weight": weight})}, heldout=0.2)
    run = Run(tmp_path, False)
    training, heldout = sft.read_dialogs(made, run)
    sets = {"a": sft.encode(tokenizer, training["a"], 64, 256, run.tally("dialogs.a"))}
    trained = {tuple(segment.ids.tolist()) for segment in sft.mix(made, sets, run)}
    assert 5 <= len(heldout) <= 20
    assert len(sft.mix(made, sets, run)) == round(weight * (60 - len(heldout)))

    for one in heldout:
        assert is_heldout(one.messages, 0.2)
        assert tuple(encode_dialog(tokenizer, one.messages)[0]) not in trained

    assert (run.tally("dialogs.a").read, run.tally("dialogs.a").kept) == (60, 60 - len(heldout))


def test_copies_depths_and_answers_to_one_prompt_lie_on_one_side(tmp_path):
    pool = [dialog(f"Question {n}", f"Answer {n}") for n in range(200)]
    # the same prompts, in other letters
    distilled = [dialog(f"question  {n} ", "No.") for n in range(0, 200, 2)]
    depths = [
        dialog(*(f"Question {n}", "a", "b", "c")[: 2 * depth], train="last")
        for n in range(100)
        for depth in (1, 2)
    ]
    trained, heldout, run = split(
        tmp_path,
        {
            "pool": (pool + pool[:50], {}),
            "distilled": (distilled, {"weight": 2}),
            "ghost": (depths, {}),
        },
        heldout=0.1,
    )
    aside = {normalize_opening(one.messages) for one in heldout}
    assert 5 <= len(aside) <= 40
    assert not aside & set(trained)
    assert len(aside) + len(set(trained)) == 200
    assert len({one.messages for one in heldout}) == len(heldout)  # each is measured once
    assert (
        sum(
            run.tally(f"dialogs.{name}").skipped["held out"]
            for name in ("pool", "distilled", "ghost")
        )
        == run.tally("held out").read
    )


def test_at_least_one_conversation_is_held_out_where_there_are_enough():
    few = [f"question {n}" for n in range(ENOUGH)]
    assert len(choose_heldout(few, 1e-6)) == 1
    assert choose_heldout(few[1:], 1e-6) == set()
    assert choose_heldout(few, 0.0) == set()
    assert choose_heldout(["the same"] * 500, 0.02) in (set(), {"the same"})


def test_an_earlier_split_does_not_leave_the_later_one_without_dialogs():
    """`prepare` has taken the share already: then those follow that it would have taken next."""
    left = [
        said
        for said in (f"question {n}" for n in range(2000))
        if not is_heldout(messages_of([("user", said)]), 0.05)
    ]
    chosen = choose_heldout(left, 0.02)
    assert len(chosen) == round(0.02 * len(left))
    assert all(is_heldout(messages_of([("user", said)]), 0.1) for said in chosen)


def test_held_out_dialogs_may_be_given(tmp_path):
    other = dialog("Another", "y")
    file = write(tmp_path / "heldout.jsonl", [dialog("QUESTION 3", "x"), other, other])
    trained, heldout, run = split(
        tmp_path,
        {"a": ([dialog(f"Question {n}", "z") for n in range(20)], {})},
        heldout_dialogs=file,
    )
    assert trained == [f"question {n}" for n in range(20) if n != 3]
    assert [one.messages[0].content for one in heldout] == ["QUESTION 3", "Another"]
    assert run.tally("dialogs.a").summary() == {"read": 20, "kept": 0, "skipped": {"held out": 1}}
    assert run.tally("held out").skipped == {"duplicate": 1}


# --- what is learnt ---


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (dialog("Hi", "Hello."), ""),
        (dialog("Hi", ""), "empty answer"),
        (dialog("Hi", " \n"), "empty answer"),
        (dialog("Hi", "Hello.", "And?", ""), "empty answer"),
        # silence that carries no loss teaches none
        (dialog("Hi", "", "And?", "Yes.", train="last"), ""),
        (dialog("Hi", "", "And?", "Yes.", train=(False, True)), ""),
        (dialog("Hi", "Yes.", "And?", "No.", train=(False, False)), "no answer to learn"),
        (dialog("", "Hello."), "empty user turn"),
    ],
)
def test_nothing_is_learnt_from_silence(one, reason):
    assert sft.explain_useless(one) == reason


def tune(base, out, file, *more):
    return (
        "sft",
        "--model",
        base,
        "--dialogs.mine.path",
        file,
        "--out",
        out,
        "--sequence-length",
        128,
        "--training.optimizer.learning-rate",
        1e-3,
        *more,
    )


def read(out, name):
    return json.loads((out / name).read_text())


def test_every_dialog_is_accounted_for_and_tokens_are_counted(tmp_path, base, tokenizer, capsys):
    dialogs = [dialog(f"Question {n}?", f"The answer is {n}.") for n in range(12)]
    dialogs += [dialog("Hi", ""), dialog("why " * 200, "yes"), dialog("Say much.", "yes " * 200)]
    out = tmp_path / "out"
    assert (
        llama2(
            *tune(base, out, write(tmp_path / "d.jsonl", dialogs), "--heldout", 0, "--epochs", 3)
        )
        == 0
    )
    ids = [encode_dialog(tokenizer, one.messages) for one in dialogs]
    inputs = [min(len(one) - 1, 128) for one, _ in ids]
    learnt = [sum(mask[:129]) for _, mask in ids]
    used = [*range(12), 14]
    summary = read(out, "summary.json")
    assert summary["tokens"] == 3 * sum(inputs[n] for n in used)
    assert summary["trained"] == 3 * sum(learnt[n] for n in used)
    longest = len(ids[13][0]) - 1
    assert longest > 256  # beyond the context of this model
    assert {
        name: summary.get(name) for name in ("dialogs", "cut", "dropped", "heldout", "validation")
    } == {"dialogs": 13, "cut": 1, "dropped": 1, "heldout": 0, "validation": None}
    assert not any(
        name.startswith("validation")
        for row in (out / "metrics.jsonl").read_text().splitlines()
        for name in json.loads(row)
    )
    heard = capsys.readouterr().err
    assert (
        f"{out}: dialogs.mine: read 15, kept 13, cut 1, left out 2: empty answer 1, no answer within a row 1 "
        f"(--sequence-length 256 is the most in the model's context, the longest has {longest} tokens)"
    ) in heard
    assert (
        f"{summary['tokens']:,} tokens read, {summary['trained']:,} of them learnt; no validation"
        in heard
    )


def test_a_small_set_is_warned_of(tmp_path, base):
    file = write(tmp_path / "d.jsonl", [dialog("Hi", "Hello."), dialog("Bye", "Goodbye.")])
    assert llama2(*tune(base, tmp_path / "out", file)) == 0
    few, padding, heldout = read(tmp_path / "out", "warnings.json")
    assert few.startswith(
        "2 updates from 1 row in 2 epochs: fewer than 50 teach little; --batch-size 1 --epochs 50"
    )
    assert "of the places in a row are padding, computed for nothing; --sequence-length " in padding
    assert heldout.startswith(
        "no dialog is held out, so there is no validation loss; give --heldout-dialogs FILE"
    )


def test_answers_of_which_none_ends_are_warned_of(tmp_path, base):
    file = write(
        tmp_path / "d.jsonl", [dialog(f"Why {n}", "yes it is so " * 20) for n in range(20)]
    )
    one = ("--training.plan.max-steps", 1, "--sequence-length")
    assert llama2(*tune(base, tmp_path / "out", file, *one, 32)) == 0
    (line,) = [line for line in read(tmp_path / "out", "warnings.json") if "cut off" in line]
    assert line.startswith(
        "all answers are cut off at 32 tokens, so the model does not learn to end one; "
    )
    assert read(tmp_path / "out", "summary.json")["cut"] == 19  # one is held out
    length = line.split("--sequence-length ")[1].split()[0]
    assert llama2(*tune(base, tmp_path / "long", file, *one, length)) == 0
    assert read(tmp_path / "long", "summary.json")["cut"] == 0


@pytest.mark.parametrize(
    ("dialogs", "weight", "why"),
    [
        (
            [dialog("why " * 60, "yes")] * 4,
            1,
            "left out 4: no answer within a row 4 (--sequence-length ",
        ),
        ([dialog("Hi", "")] * 4, 1, "left out 4: empty answer 4; "),
        (
            [dialog("Hi", "Hello.")] * 4,
            0.01,
            "left out 4: not drawn at weight 0.01 4 (raise --dialogs.mine.weight); ",
        ),
    ],
)
def test_nothing_left_is_an_error_with_its_numbers(tmp_path, base, one_line, dialogs, weight, why):
    heard = one_line(
        *tune(
            base,
            tmp_path / "out",
            write(tmp_path / "d.jsonl", dialogs),
            "--sequence-length",
            24,
            "--dialogs.mine.weight",
            weight,
        )
    )
    assert heard.startswith("nothing is left to train on: dialogs.mine: read 4, kept 0, ")
    assert why in heard


def test_a_set_of_which_nothing_is_drawn_is_warned_of(tmp_path, base):
    files = [
        write(tmp_path / f"{name}.jsonl", [dialog(f"{name} {n}", "Hello.") for n in range(4)])
        for name in "ab"
    ]
    assert (
        llama2(
            *tune(base, tmp_path / "out", files[0]),
            "--dialogs.b.path",
            files[1],
            "--dialogs.b.weight",
            0.1,
        )
        == 0
    )
    assert any(
        line.startswith(
            "dialogs.b gives nothing to train on: read 4, kept 0, left out 4: not drawn"
        )
        for line in read(tmp_path / "out", "warnings.json")
    )


def test_no_weight_is_infinite(tmp_path):
    with pytest.raises(UserError, match=r"dialogs\.a\.weight.*finite"):
        config(tmp_path, {"a": ([dialog("Hi", "Hello.")], {"weight": float("inf")})})


def test_an_answer_that_sampling_cut_off_has_no_end_to_learn(tokenizer):
    whole = dialog("Hi", "Hello there", train="last")
    cut = Dialog(whole.messages, "last", {"cut": True})
    ids, mask = sft.encode_for_training(tokenizer, whole)
    assert ids[-1] == tokenizer.eos
    assert mask[-1]
    short, learnt = sft.encode_for_training(tokenizer, cut)
    assert short == ids[: len(short)]
    assert tokenizer.eos not in [token for token, kept in zip(short, learnt) if kept]
    assert (
        tokenizer.decode([token for token, kept in zip(short, learnt) if kept]).strip()
        == "Hello there"
    )


@pytest.mark.parametrize(
    ("train", "flags"),
    [("all", (True, True)), ("last", (False, True)), ((True, False), (True, False))],
)
def test_what_train_names_is_learnt_of_a_dialog_that_was_cut_off_too(tokenizer, train, flags):
    one = Dialog(dialog("Hi.", "Yes.", "And now?", "The answer is").messages, train, {"cut": True})
    ids, mask = sft.encode_for_training(tokenizer, one)
    first, last = [*tokenizer.encode("Yes. "), tokenizer.eos], tokenizer.encode("The answer is")
    learnt = [index for index, flag in zip(ids, mask, strict=True) if flag]
    assert learnt == first * flags[0] + last * flags[1]
    assert ids[-len(last) :] == last


def test_a_question_held_out_is_not_trained_on_behind_an_instruction(tmp_path):
    questions = [f"What is number {number}?" for number in range(200)]
    plain = [dialog(question, "It is a number.") for question in questions]
    ghost = [
        Dialog(
            messages_of(
                [
                    ("user", f"Act as a king. {question}"),
                    ("assistant", "I, the king, know it."),
                    ("user", "And?"),
                    ("assistant", "No more."),
                ]
            ),
            "last",
            {"instruction": "Act as a king.", "depth": 2},
        )
        for question in questions
    ]
    made = config(tmp_path, {"plain": (plain, {}), "ghost": (ghost, {})}, heldout=0.2)
    training, heldout = sft.read_dialogs(made, Run(tmp_path, False))
    aside = {sft.find_opening(one) for one in heldout}
    assert 20 < len(aside) < 60
    assert len(heldout) == 2 * len(aside)
    assert not aside & {sft.find_opening(one) for found in training.values() for one in found}
    assert {sft.find_opening(one) for one in ghost} == {sft.find_opening(one) for one in plain}
