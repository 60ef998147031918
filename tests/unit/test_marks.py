"""Marks of bad answers and loss flags: the same rule in every format, whatever it is called."""

import pytest
from strangers import dialogs, prompts, turns

from llama2.errors import UserError
from llama2.importers.dialogs import DIALOG_FORMATS

ROWS = {  # format: a row whose answer is "yes"
    "turns": {
        "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]
    },
    "open-assistant": {
        "message_tree_id": "t",
        "prompt": {
            "role": "prompter",
            "text": "Is it?",
            "replies": [{"role": "assistant", "text": "yes", "rank": 0, "replies": []}],
        },
    },
    "self-instruct": {"instruction": "Is it?", "instances": [{"input": "", "output": "yes"}]},
    "xstest-answers": {
        "prompt": "Is it?",
        "type": "homonyms",
        "completion": "yes",
        "final_label": "1_full_compliance",
    },
    "alpaca": {"instruction": "Is it?", "output": "yes"},
    "question-answer": {"prompt": "Is it?", "completion": "yes"},
}
LEARNT = [(("Is it?", "yes"), "all")]
FALSE = [False, "False", "false", 0, 0.0, "0", "0.0", "bad", "no", "undesirable", "rejected", -1]
TRUE = [True, "True", "true", 1, 1.0, "1", "good", "yes", "desirable", "chosen", "", None]


def test_every_format_that_strangers_write_is_here():
    assert {*ROWS} == {f.name for f in DIALOG_FORMATS} - {"dialog", "chain-of-thought"}


@pytest.mark.parametrize("format", ROWS)
def test_an_answer_that_is_marked_as_bad_is_left_out_of_every_format(tmp_path, format):
    for value in FALSE:
        read, tally = dialogs(tmp_path, ROWS[format] | {"label": value})
        assert (read, dict(tally.skipped)) == ([], {"the answer is marked as bad": 1}), value

    for value in TRUE:
        assert dialogs(tmp_path, ROWS[format] | {"label": value})[0] == LEARNT, value


@pytest.mark.parametrize(
    "mark",
    [
        {"kto_tag": False},
        {"is_safe": False},
        {"is_safe": "0"},
        {"is_good": 0},
        {"is_correct": "False"},
        {"harmful": 1},
        {"harmful": "1"},
        {"harmful": True},
        {"is_bad": 1.0},
        {"toxic": True},
        {"unsafe": "yes"},
        {"thumbs_down": 1},
        {"kto_label": False},
        {"isSafe": False},
        {"answer_is_correct": 0},
        {"is_approved": False},
        {"valid": "false"},
        {"passed": 0},
        {"Liked": False},
        {"response_wrong": True},
        {"is_flagged": True},
        {"discarded": 1},
    ],
)
def test_marks_have_many_names(tmp_path, mark):
    read, tally = dialogs(tmp_path, ROWS["alpaca"] | mark)
    assert (read, dict(tally.skipped)) == ([], {"the answer is marked as bad": 1})
    opposite = {key: str(value).lower() in ("0", "false") for key, value in mark.items()}
    assert dialogs(tmp_path, ROWS["alpaca"] | opposite)[0] == LEARNT


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("thumbs_down", "thumbs_up"),
        ("Thumbs-Down", "Thumbs-Up"),
        ("\N{THUMBS DOWN SIGN}", "\N{THUMBS UP SIGN}"),
        ("dispreferred", "preferred"),
        ("FAIL", "PASS"),
        ("invalid", "valid"),
        ("unacceptable", "acceptable"),
    ],
)
def test_marks_have_many_spellings(tmp_path, bad, good):
    read, tally = dialogs(
        tmp_path, ROWS["alpaca"] | {"feedback": bad}, ROWS["alpaca"] | {"feedback": good}
    )
    assert (read, dict(tally.skipped)) == (LEARNT, {"the answer is marked as bad": 1})


def test_the_letter_of_a_right_answer_is_no_mark(tmp_path):
    read, tally = dialogs(tmp_path, ROWS["alpaca"] | {"answer_label": 0, "tag": 0})
    assert (read, tally.skipped) == (LEARNT, {})


def test_the_layouts_of_kto_are_read_as_texts_and_as_turns(tmp_path):
    good = {
        "prompt": turns("a"),
        "completion": [{"role": "assistant", "content": "b"}],
        "label": True,
    }
    bad = good | {"label": False}
    plain = {"prompt": "a", "completion": "b", "label": False}
    read, tally = dialogs(tmp_path, good, bad, plain, plain | {"label": True})
    assert read == [(("a", "b"), "all")] * 2
    assert dict(tally.skipped) == {"the answer is marked as bad": 2}


def test_a_label_that_is_no_mark_is_left_unread_and_a_number_between_is_refused(tmp_path):
    read, tally = dialogs(tmp_path, ROWS["alpaca"] | {"label": "sports"})
    assert (read, dict(tally.notes["columns not read"])) == (LEARNT, {"label": 1})
    with pytest.raises(
        UserError,
        match=r"rows.jsonl:1: 'label' is 0.5, neither good nor bad; .*--sources.NAME.ignore",
    ):
        dialogs(tmp_path, ROWS["alpaca"] | {"label": 0.5})

    assert dialogs(tmp_path, ROWS["alpaca"] | {"label": 0.5}, ignore=("label",))[0] == LEARNT


def test_a_prompt_is_a_prompt_whatever_its_answer_is_worth(tmp_path):
    for row in ({"label": False}, {"weight": 0}, {"rating": 2}):
        assert prompts(tmp_path, ROWS["turns"] | row)[0] == ["Is it?"]
        assert prompts(tmp_path, ROWS["question-answer"] | row)[0] == ["Is it?"]


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"weight": "0"},
        {"train": False},
        {"train": "false"},
        {"loss": False},
        {"loss_mask": 0},
        {"mask": 0},
        {"loss_scale": 0.0},
        {"masked": True},
        {"trainable": False},
    ],
)
@pytest.mark.parametrize("spelling", ["openai", "sharegpt"])
def test_a_turn_without_loss_is_not_learnt(tmp_path, flag, spelling):
    said = turns("hello", {"content": "bad", **flag}, "again", {"content": "good"})
    if spelling == "sharegpt":
        said = [
            {
                "from": {"user": "human", "assistant": "gpt"}[turn.pop("role")],
                "value": turn.pop("content"),
                **turn,
            }
            for turn in said
        ]

    row = {"conversations": said}
    assert dialogs(tmp_path, row)[0] == [(("hello", "bad", "again", "good"), (False, True))]


@pytest.mark.parametrize(
    "flag", [{"weight": 1}, {"train": True}, {"loss": 1}, {"masked": False}, {"weight": None}]
)
def test_a_turn_with_loss_is_learnt(tmp_path, flag):
    row = {"messages": turns("hello", {"content": "good", **flag})}
    assert dialogs(tmp_path, row)[0] == [(("hello", "good"), "all")]


def test_what_a_user_says_is_never_learnt_so_its_flags_change_nothing(tmp_path):
    row = {
        "messages": [
            {"role": "user", "content": "a", "train": True},
            {"role": "assistant", "content": "b"},
        ]
    }
    assert dialogs(tmp_path, row)[0] == [(("a", "b"), "all")]


def test_a_dialog_of_which_nothing_is_to_be_learnt_is_counted(tmp_path):
    one = {"messages": turns("a", {"content": "b", "weight": 0})}
    ours = {"messages": turns("a", "b"), "train": [False]}
    for row in (one, ours):
        read, tally = dialogs(tmp_path, row)
        assert (read, dict(tally.skipped)) == ([], {"no turn to learn from": 1})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"weight": 0}, []),
        ({"train": False}, []),
        ({"weight": 1}, "all"),
        ({"train": "last"}, "last"),
        ({"loss_mask": [0, 1]}, (False, True)),
        ({"loss_mask": [0, 1, 0, 1]}, "all"),
        ({"mask": [0, 0, 0, 1]}, (False, True)),
        ({"train": [True, False]}, (True, False)),
    ],
)
def test_flags_of_a_row_hold_for_its_turns(tmp_path, row, expected):
    read, tally = dialogs(tmp_path, {"id": 1, "messages": turns("a", "b", "c", "d")} | row)
    assert read == ([(("a", "b", "c", "d"), expected)] if expected else [])
    assert dict(tally.skipped) == ({} if expected else {"not to be learnt": 1})


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (
            {"messages": turns("a", {"content": "b", "weight": 0.5})},
            "turn 2: 'weight' is 0.5; a turn is learnt or",
        ),
        (
            {"messages": turns("a", {"content": "b", "weight": 2})},
            "turn 2: 'weight' is 2; a turn is learnt or it is not",
        ),
        (
            {"messages": turns("a", {"content": "b", "train_detail": [{"begin_offset": 0}]})},
            "turn 2: 'train_detail' marks",
        ),
        (
            {"messages": turns("a", "b"), "weight": 0.25},
            "'weight' is 0.25; a turn is learnt or it is not",
        ),
        ({"messages": turns("a", "b"), "loss_mask": [1, 0, 1]}, "3 flags for 1 answers in 2 turns"),
        (
            {"messages": turns("a", "b"), "loss_mask": [1], "mask": [0]},
            "its flags contradict one another",
        ),
        (ROWS["alpaca"] | {"weight": 0.5}, "'weight' is 0.5; a turn is learnt or it is not"),
    ],
)
def test_a_flag_that_no_record_can_keep_is_refused_by_name(tmp_path, row, cause):
    with pytest.raises(UserError, match=f"rows.jsonl:1: {cause}"):
        dialogs(tmp_path, row)

    read, tally = dialogs(tmp_path, row, malformed="skip")
    assert (read, dict(tally.skipped)) == ([], {"malformed": 1})


def test_turns_that_stand_in_the_prompt_are_not_learnt(tmp_path):
    row = {"prompt": turns("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}
    assert dialogs(tmp_path, row)[0] == [(("a", "b", "c", "d"), (False, True))]


def test_answers_to_xstest_are_learnt_by_their_verdict(tmp_path):
    row = ROWS["xstest-answers"]
    unsafe = row | {"type": "contrast_homonyms"}
    rows = [
        one | {"final_label": label}
        for one in (row, unsafe)
        for label in ("1_full_compliance", "2_full_refusal", "3_partial_refusal")
    ]
    read, tally = dialogs(tmp_path, *(one | {"prompt": str(i)} for i, one in enumerate(rows)))
    assert [texts[0] for texts, _ in read] == ["0", "4"]
    assert tally.skipped["the answer is marked as bad"] == 4
