"""Ghost Attention: where the instruction stands in sampling and in training, and where the loss
is."""

import json

import pytest
from answers import prompt
from commands import llama2

from llama2 import records
from llama2.errors import UserError
from llama2.evaluate.constraints import Check
from llama2.generate.dialogue import Answer
from llama2.generate.generator import Completion
from llama2.records import Dialog, Prompt, messages_of
from llama2.runs import Run
from llama2.stages import ghost
from llama2.stages.common.instructions import Conversation, compose
from llama2.stages.common.sampling import Sample, load_chat
from llama2.tally import Tally
from llama2.tokenizer.template import encode_dialog, encode_prompt

TALK = Conversation(("One?", "Two?", "Three?"), "Always speak Solish.", "Language: Solish.")
CONFIG = ghost.Config(out="x", policy="p", conversations="c")


def test_every_user_turn_carries_the_instruction_when_sampling():
    messages = ghost._make_prompt(TALK, ["first", "second"])
    assert [m.content for m in messages] == [
        "Always speak Solish. One?",
        "first",
        "Always speak Solish. Two?",
        "second",
        "Always speak Solish. Three?",
    ]
    assert len(ghost._make_prompt(TALK, [])) == 1


@pytest.mark.parametrize(
    ("short", "instruction"), [(False, "Always speak Solish."), (True, "Language: Solish.")]
)
def test_only_the_first_turn_carries_it_when_training(short, instruction):
    dialogs = ghost.make_dialogs(TALK, ["first", "second", "third"], CONFIG, short)
    assert [len(one.messages) for one in dialogs] == [2, 4, 6]
    for one in dialogs:
        users = [m.content for m in one.messages if m.role == "user"]
        assert users == [f"{instruction} One?", "Two?", "Three?"][: len(users)]
        assert one.train == "last"

    assert [one.metadata["depth"] for one in dialogs] == [1, 2, 3]


def test_a_conversation_that_ended_early_gives_what_it_has():
    assert ghost.make_dialogs(TALK, [], CONFIG, False) == []
    later = CONFIG.model_copy(update={"first_depth": 2})
    assert [len(one.messages) for one in ghost.make_dialogs(TALK, ["a", "b"], later, False)] == [4]


def test_loss_is_on_the_last_answer_alone_token_by_token(tokenizer):
    one = ghost.make_dialogs(TALK, ["first", "second", "third"], CONFIG, False)[-1]
    ids, mask = encode_dialog(tokenizer, one.messages, one.train)
    before = encode_prompt(tokenizer, one.messages[:-1])
    assert ids[: len(before)] == before
    assert mask == [False] * len(before) + [True] * (len(ids) - len(before))
    assert tokenizer.decode(token for token, learnt in zip(ids, mask) if learnt).strip() == "third"
    assert ids[-1] == tokenizer.eos
    assert sum(encode_dialog(tokenizer, one.messages, "all")[1]) > sum(mask)


def test_the_stage_writes_dialogs_and_shortens_some(tmp_path, policy, world, capsys):
    assert (
        llama2(
            "ghost",
            "--policy",
            policy,
            "--conversations",
            world / "ghost-train.jsonl",
            "--out",
            tmp_path / "out",
            "--sample.max-tokens",
            24,
        )
        == 0
    )
    asked = {one.questions[0]: one for one in ghost.read_conversations(world / "ghost-train.jsonl")}
    dialogs = list(records.read(Dialog, tmp_path / "out/dialogs.jsonl"))
    forms = set()

    for one in dialogs:
        first, *later = [m.content for m in one.messages if m.role == "user"]
        (source,) = [found for question, found in asked.items() if first.endswith(question)]
        instruction = first.removesuffix(source.questions[0]).strip()
        assert instruction in (source.text, source.short)
        assert later == list(source.questions[1 : len(later) + 1])
        forms.add(instruction == source.short)

    assert forms == {True, False}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["dialogs"] == len(dialogs) == summary["turns"]
    assert summary["conversations"] == len(asked)
    heard = capsys.readouterr().err
    given = len({one.metadata["instruction"] + one.messages[0].content for one in dialogs})
    assert f"out: conversations: read {len(asked)}, kept {given}" in heard


def test_answers_depend_on_the_place_of_a_conversation_alone(policy, tmp_path, world):
    """Not on those beside it, so parts of any size give the same."""
    talks = ghost.read_conversations(world / "ghost-train.jsonl")[:6]
    config = CONFIG.model_copy(
        update={"policy": policy, "sample": Sample(max_tokens=24, precision="fp32")}
    )
    chat = load_chat(policy, config.sample, Run(tmp_path, False))
    whole = ghost.converse(chat, talks, config)
    assert [
        *ghost.converse(chat, talks[:1], config),
        *ghost.converse(chat, talks[1:], config, 1),
    ] == whole
    assert len({text for mine in whole for text in mine}) > 3


def test_conversations_are_made_of_any_questions(prompts):
    config = CONFIG.model_copy(update={"conversations": None, "questions": prompts, "turns": 2})
    tally = Tally()
    made = compose(prompts, 2, config.instructions, config.seed, tally)
    questions = [question for one in made for question in one.questions]
    assert len(questions) == len(set(questions)) == 2 * len(made) > 0
    assert compose(prompts, 2, None, config.seed, Tally()) == made
    assert all(1 <= one.short.count(":") <= 2 for one in made)
    assert all(len(one.short) < len(one.text) + 10 for one in made)


def test_questions_that_cannot_be_asked_are_counted(tmp_path, policy, one_line, capsys):
    some = [
        prompt("What is this?"),
        prompt("How?", True),
        prompt(" "),
        prompt("Why?"),
        prompt("Where?"),
        Prompt(messages_of([("user", "Hi"), ("assistant", "Hello."), ("user", "Who?")])),
    ]
    records.write(tmp_path / "some.jsonl", some)
    words = [
        "ghost",
        "--policy",
        policy,
        "--questions",
        tmp_path / "some.jsonl",
        "--sample.max-tokens",
        8,
    ]
    assert llama2(*words, "--turns", 3, "--out", tmp_path / "out") == 0
    left = "left out 3: tagged for safety 1, empty 1, of several turns, or with a system turn 1"
    assert f"out: questions: read 6, kept 3, {left}" in capsys.readouterr().err
    assert one_line(*words, "--turns", 4, "--out", tmp_path / "none") == (
        f"{tmp_path}/some.jsonl: 3 questions for conversations of 4 turns (read 6, kept 3, {left}); give more "
        "questions, or fewer turns"
    )


CHECKED = Conversation(
    ("One?", "Two?", "Three?"), "Say ahoy first.", "Ahoy.", (Check("starts", "Ahoy"),), "greeting"
)


def reply(text, finish="stop"):
    return Answer(text, Completion((), (1,), (), finish))


def test_the_first_reply_that_obeys_is_taken():
    replies = ["No.", "", "Ahoy! One.", "Ahoy! Two."]
    assert ghost.choose_reply(CHECKED, 0, replies) == "Ahoy! One."
    assert ghost.choose_reply(CHECKED, 0, replies[:2]) == "No."
    assert ghost.choose_reply(CHECKED, 0, ["", "No."]) == "No."
    assert ghost.choose_reply(CHECKED, 0, ["No."]) == "No."
    assert ghost.choose_reply(CHECKED, 0, [""]) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes. It rains! And then the", "Yes. It rains!"),
        ('He said "no." Then', 'He said "no."'),
        ("It costs 3.50 euros in", ""),
        ("1. Flour\n2. Wat", ""),
        ("Done.", "Done."),
        ("", ""),
    ],
)
def test_an_answer_that_was_cut_off_is_trimmed_where_that_is_asked_for(text, expected):
    trim = CONFIG.model_copy(update={"unfinished": "trim"})
    assert ghost.read_reply(reply(text, "length"), trim) == expected
    assert ghost.read_reply(reply(text, "length"), CONFIG) == ""
    assert ghost.read_reply(reply(text), CONFIG) == ghost.read_reply(reply(text), trim) == text


def test_a_conversation_ends_before_its_first_answer_that_disobeys():
    assert ghost.count_obeyed(CHECKED, ["Ahoy! One.", "No.", "Ahoy! Three."]) == 1
    assert ghost.count_obeyed(CHECKED, ["Ahoy! One."]) == 1
    assert ghost.check_turns(CHECKED, ["Ahoy! One.", "Ahoy ahoy ahoy ahoy ahoy ahoy"]) == [
        True,
        False,
    ]
    assert ghost.check_turns(TALK, ["first"]) == []


def test_answers_are_begun_with_what_is_asked_for_at_the_start(tmp_path, policy):
    begun = CONFIG.model_copy(update={"begin": True, "tries": 2, "unfinished": "trim"})
    assert ghost.find_beginning(CHECKED, CONFIG) == ghost.find_beginning(TALK, begun) == ""
    assert ghost.find_beginning(CHECKED, begun) == "Ahoy"
    assert ghost.read_reply(reply("Go on. And"), begun, "Ahoy") == "Ahoy Go on. And"
    assert ghost.read_reply(reply("Go on. And", "length"), begun, "Ahoy") == "Ahoy Go on."
    assert ghost.read_reply(reply("", "length"), begun, "Ahoy") == ""

    file = write_checked(tmp_path / "checked.jsonl", [["starts", "Ahoy there"]])
    words = ["ghost", "--policy", policy, "--conversations", file, "--sample.max-tokens", 8]
    words += ["--unfinished", "trim", "--sample.temperature", 1]
    assert llama2(*words, "--begin", "--tries", 2, "--out", tmp_path / "out") == 0
    dialogs = list(records.read(Dialog, tmp_path / "out/dialogs.jsonl"))
    answers = [turn.content for dialog in dialogs for turn in dialog.messages[1::2]]
    assert answers
    assert all(answer.startswith("Ahoy there ") for answer in answers)


def write_checked(path, checks):
    instruction = {"text": "Say ahoy first.", "checks": checks, "kind": "greeting"}
    metadata = {"instruction": instruction, "questions": ["One?", "Two?"]}
    records.write(path, [Prompt(messages_of([("user", "One?")]), "g", False, metadata)] * 3)
    return path


def test_real_instructions_are_drawn_tried_and_kept(tmp_path, policy, capsys):
    records.write(tmp_path / "q.jsonl", [prompt(f"What of {number}?") for number in range(12)])
    words = ["ghost", "--policy", policy, "--questions", tmp_path / "q.jsonl", "--turns", 2]
    words += ["--sample.max-tokens", 12, "--instructions", "brief", "greeting"]
    assert llama2(*words, "--tries", 3, "--keep", "adherent", "--out", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["conversations"] == 6
    assert 0 < summary["adherence"]["n"] <= 12
    obedient = round(summary["adherence"]["rate"] * summary["adherence"]["n"])
    assert summary["dialogs"] <= obedient
    assert "sampled answers obey" in capsys.readouterr().err

    # a choice without checks is refused, before anything is sampled
    file = write_checked(tmp_path / "none.jsonl", [])
    words = ["ghost", "--policy", policy, "--conversations", file, "--out", tmp_path / "no"]
    assert llama2(*words, "--keep", "adherent") == 2
    assert "nothing can" in capsys.readouterr().err
    assert llama2(*words, "--begin") == 2
    assert "nothing can" in capsys.readouterr().err
    assert llama2(*words, "--instructions", "brief") == 2
    assert "conversations bring their own" in capsys.readouterr().err
    file = write_checked(tmp_path / "wrong.jsonl", [["begins", "Ahoy"]])
    assert llama2(*words[:4], file, *words[5:]) == 2
    assert "prompt 'g': there is no check 'begins'" in capsys.readouterr().err


def test_checks_of_a_file_are_read(tmp_path):
    file = write_checked(tmp_path / "checked.jsonl", [["starts", "Ahoy"]])
    conversation, *_ = ghost.read_conversations(file)
    assert (conversation.checks, conversation.kind) == ((Check("starts", "Ahoy"),), "greeting")


def test_mistakes_are_named(tmp_path, prompts, one_line):
    with pytest.raises(
        UserError,
        match=r"prompts.jsonl: prompt '.*' lacks metadata.questions or metadata.instruction",
    ):
        ghost.read_conversations(prompts)

    heard = one_line("ghost", "--policy", "p", "--out", tmp_path / "x")
    assert heard == "give either conversations or questions; mend the value"
