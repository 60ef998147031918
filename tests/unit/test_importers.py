"""Importers of public formats: what each row becomes, what is skipped and why, and the errors a bad
file gives."""

import gzip
import json
import zipfile
from pathlib import Path

import pytest
from strangers import comparisons, turns

from llama2.errors import UserError
from llama2.importers.dialogs import DIALOG_FORMATS, import_dialogs
from llama2.importers.preference_formats import PREFERENCE_FORMATS
from llama2.importers.preferences import import_preferences
from llama2.importers.prompts import PROMPT_FORMATS, import_prompts
from llama2.importers.tables import ReadOptions
from llama2.reading.files import name_set, read_tables
from llama2.records import Dialog, Preference, messages_of, to_json
from llama2.tally import Tally

FIXTURES = Path(__file__).parent.parent / "fixtures" / "import"
PREFERENCES = {  # file: (format, chosen answers, rejected answers)
    "hh.jsonl": ("hh", ["The nightingale."], ["No bird does."]),
    "hhh.jsonl": ("hh", ["I cannot see the sky."], ["Yes, and it always will."]),
    "pairs.jsonl": (
        "pairs",
        ["c-a-t", "d-o-g", "c-o-w", "o-w-l"],
        ["k-a-t", "d-g", "Certainly! It is c-o-w.", "o-u-l"],
    ),
    "implicit.jsonl": ("pairs", ["d-o-g"], ["d-g"]),
    "openai.jsonl": ("openai", ["At most 0 degrees Celsius."], ["Very."]),
    "auto-j.jsonl": (
        "auto-j",
        ["Because of chlorophyll.", "It scatters all light."],
        ["It is not.", "Because it is cold."],
    ),
    "llmbar.json": ("llmbar", ["one two three"], ["one two"]),
    "alpaca-farm.json": ("alpaca-farm", ["cat"], ["discussion"]),
    "stack-exchange.json": (
        "stack-exchange",
        ["Type :q and press return."],
        ["Switch the computer off."],
    ),
    "sharegpt-pairs.json": ("sharegpt-pairs", ["Where to?"], ["No."]),
    "fine-grained.json": (
        "fine-grained",
        ["In 1901.", "In 1903.", "In 1902.", "In 1904."],
        ["In 1902.", "In 1901.", "In 1904.", "In 1903."],
    ),
    "shp.jsonl": ("shp", ["A pinch."], ["Nope."]),
    "webgpt.jsonl": ("webgpt", ["Nobody."], ["Masons."]),
    "summarize.jsonl": ("summarize", ["Keys, lost twice."], ["A post."]),
    "arena.jsonl": ("arena", ["Hello!"], ["What?"]),
}
SKIPS = {
    "hh.jsonl": {
        "empty answer": 1,
        "identical answers": 1,
        "ends with a human turn": 1,
        "earlier turns differ": 1,
        "roles do not alternate": 1,
    },
    "auto-j.jsonl": {"tie": 1},
    "fine-grained.json": {"tie": 2},
    "webgpt.jsonl": {"tie": 1},
    "arena.jsonl": {"tie": 1},
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("file", PREFERENCES)
def test_a_preference_format_is_recognised_and_keeps_the_label(file):
    name, chosen, rejected = PREFERENCES[file]
    for format in ("auto", name):
        tally = Tally()
        read = list(import_preferences(FIXTURES / file, ReadOptions(format), tally=tally))
        assert [p.chosen.text for p in read] == chosen
        assert [p.rejected.text for p in read] == rejected
        assert tally.summary()["skipped"] == SKIPS.get(file, {})
        assert tally.kept == len(read)
        assert {p.degree for p in read} == {"better"}
        assert {p.axis for p in read} == {"helpful"}


def test_every_preference_format_has_a_fixture():
    assert {name for name, _, _ in PREFERENCES.values()} == {f.name for f in PREFERENCE_FORMATS} - {
        "preference",
        "pku",
        "helpsteer",
    }


@pytest.mark.parametrize(
    ("file", "index", "prompt"),
    [
        (
            "hh.jsonl",
            0,
            [
                ("user", "Which bird sings at night?"),
                ("assistant", "Do you mean in Europe?"),
                ("user", "Yes."),
            ],
        ),
        ("pairs.jsonl", 1, [("user", "Spell dog.")]),
        ("pairs.jsonl", 2, [("system", "Be brief."), ("user", "Spell cow.")]),
        ("pairs.jsonl", 3, [("user", "Spell hen."), ("assistant", "h-e-n"), ("user", "And owl?")]),
        ("sharegpt-pairs.json", 0, [("system", "You are a clerk."), ("user", "A ticket, please.")]),
        ("alpaca-farm.json", 0, [("user", "Translate.\n\nchat")]),
        (
            "summarize.jsonl",
            0,
            [("user", "Summarize the following text.\n\nLost keys\n\nI lost my keys twice.")],
        ),
    ],
)
def test_the_prompt_of_a_comparison(file, index, prompt):
    assert list(import_preferences(FIXTURES / file))[index].prompt == messages_of(prompt)


def test_pku_gives_both_axes_with_the_safety_bin():
    read = list(import_preferences(FIXTURES / "pku.jsonl"))
    assert [(p.axis, p.chosen.text, p.safety) for p in read] == [
        ("helpful", "Break it.", None),
        ("safe", "Use its key.", "preferred_only"),
        ("helpful", "Ring the bell.", "both"),
        ("safe", "Ring the bell.", "both"),
    ]
    assert [p.axis for p in import_preferences(FIXTURES / "pku.jsonl", axis="safe")] == [
        "safe",
        "safe",
    ]


def test_harmless_in_the_path_means_the_safe_axis(tmp_path):
    (tmp_path / "harmless-base").mkdir()
    file = tmp_path / "harmless-base" / "test.jsonl"
    file.write_text((FIXTURES / "hh.jsonl").read_text())
    first = next(import_preferences(file))
    assert (first.axis, first.metadata["source"]) == ("safe", "harmless-base/test")
    assert next(import_preferences(file, axis="helpful")).axis == "helpful"


def test_the_display_order_is_fixed_by_the_texts_and_tells_nothing_of_the_label(tmp_path):
    rows = [
        {"prompt": f"Question {i}", "chosen": f"aye {i}", "rejected": f"nay {i}"}
        for i in range(1000)
    ]
    swapped = [
        {"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows
    ]
    one = list(import_preferences(write(tmp_path / "a.jsonl", *rows), name="set"))
    two = list(import_preferences(write(tmp_path / "b.jsonl", *swapped), name="set"))
    assert 430 < sum(p.preferred == 0 for p in one) < 570
    assert [p.responses for p in one] == [p.responses for p in two]
    assert [p.id for p in one] == [p.id for p in two]
    assert all(p.preferred != q.preferred for p, q in zip(one, two))


def test_our_own_preferences_pass_unchanged(tmp_path):
    made = list(import_preferences(FIXTURES / "pku.jsonl"))
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(to_json(p) + "\n" for p in made))
    assert list(import_preferences(file)) == made


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (
            {"prompt": "x", "chosen": "y"},
            r"bad.jsonl:2: a preference needs two answers: 'rejected' is missing",
        ),
        (
            {"prompt": "x", "chosen": None, "rejected": "y"},
            "bad.jsonl:2: a preference needs two answers",
        ),
        (
            {"prompt": "x", "chosen": 3, "rejected": "y"},
            "'chosen' does not end|expected, found int|mapping",
        ),
        ({"chosen": "a", "rejected": "b"}, "bad.jsonl:2: 'prompt' is missing"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"},
            "bad.jsonl:2: roles must alternate user/assistant: turn 1 is 'assistant'",
        ),
        (
            {"prompt": [{"role": "wizard", "content": "x"}], "chosen": "a", "rejected": "b"},
            "bad.jsonl:2: turn 1 has the role 'wizard'",
        ),
    ],
)
def test_a_malformed_comparison_is_named(tmp_path, row, cause):
    file = write(tmp_path / "bad.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"}, row)
    with pytest.raises(UserError, match=cause):
        list(import_preferences(file))

    tally = Tally()
    assert len(list(import_preferences(file, ReadOptions(malformed="skip"), tally=tally))) == 1
    assert (tally.read, tally.kept, tally.skipped) == (2, 1, {"malformed": 1})


@pytest.mark.parametrize(
    ("format", "row", "cause"),
    [
        (
            "preference",
            {
                "id": "1",
                "prompt": [],
                "responses": [{"text": "a"}],
                "preferred": 0,
                "degree": "better",
            },
            "a preference needs two answers",
        ),
        (
            "llmbar",
            {"input": "x", "output_1": "a", "output_2": "b", "label": 3},
            "'label' must be 1 or 2, it is '3'",
        ),
        (
            "fine-grained",
            {
                "question": "x",
                **{f"prediction {i}": str(i) for i in range(1, 5)},
                "preference": [1],
            },
            "must be a list of 6 verdicts",
        ),
        (
            "webgpt",
            {"question": "x", "answer_0": "a", "answer_1": "b", "score_0": None, "score_1": 1},
            "must be numbers",
        ),
        (
            "summarize",
            {"info": {"post": "x"}, "summaries": [{"text": "a"}], "choice": 0},
            "a preference needs two answers",
        ),
        (
            "arena",
            {"conversation_a": [], "conversation_b": [], "winner": "model_a"},
            "a preference needs two answers",
        ),
    ],
)
def test_a_malformed_row_of_a_given_format_is_named(tmp_path, format, row, cause):
    with pytest.raises(UserError, match=f"bad.jsonl:1: .*{cause}"):
        list(import_preferences(write(tmp_path / "bad.jsonl", row), ReadOptions(format)))


DIALOGS = {  # file: (format, turns of each dialog)
    "alpaca.json": ("alpaca", [[("user", "Add the numbers.\n\n2 and 3"), ("assistant", "5")]]),
    "dolly.csv": (
        "alpaca",
        [
            [("user", "Who came?\n\nAnn came,\nthen Bob."), ("assistant", "Ann and Bob")],
            [("user", "What is tea?"), ("assistant", "A drink")],
        ],
    ),
    "sharegpt.json": (
        "turns",
        [
            [("user", "Hi"), ("assistant", "Hello")],
            [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")],
        ],
    ),
    "kto.json": ("turns", [[("user", "Hi"), ("assistant", "Hello")]]),
    "self-instruct.jsonl": (
        "self-instruct",
        [
            [("user", "Give the opposite.\n\nhot"), ("assistant", "cold")],
            [("user", "Give the opposite.\n\nup"), ("assistant", "down")],
        ],
    ),
    "wrapped.jsonl": (
        "question-answer",
        [[("user", "Name a sea.\n\nIn the north"), ("assistant", "The Baltic.")]],
    ),
    "trees.jsonl": (
        "open-assistant",
        [[("user", "What is dew?"), ("assistant", "Water from the air.")]],
    ),
    "rationale.tsv": (
        "chain-of-thought",
        [
            [
                ("user", "Is ice hot?\nOptions: yes, no"),
                ("assistant", "Ice is frozen water. The answer is no."),
            ]
        ],
    ),
    "dialogs.jsonl": (
        "dialog",
        [[("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]],
    ),
}


@pytest.mark.parametrize("file", DIALOGS)
def test_a_dialogue_format_is_recognised(file):
    name, turns = DIALOGS[file]
    for format in ("auto", name) if name != "chain-of-thought" else (name,):
        assert [d.messages for d in import_dialogs(FIXTURES / file, ReadOptions(format))] == [
            messages_of(t) for t in turns
        ]


def test_every_format_stands_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for format in (*DIALOG_FORMATS, *PREFERENCE_FORMATS, *PROMPT_FORMATS):
        assert f"`{format.name}`" in page


def test_every_dialogue_format_has_a_fixture():
    assert {name for name, _ in DIALOGS.values()} == {f.name for f in DIALOG_FORMATS} - {
        "xstest-answers"
    }


def test_dialogues_keep_category_set_and_loss_turns():
    assert next(import_dialogs(FIXTURES / "dolly.csv")).metadata == {
        "category": "closed_qa",
        "source": "dolly",
    }
    assert next(import_dialogs(FIXTURES / "dialogs.jsonl")).metadata == {"source": "mine"}
    assert next(import_dialogs(FIXTURES / "dialogs.jsonl")).train == "last"
    tally = Tally()
    list(import_dialogs(FIXTURES / "kto.json", tally=tally))
    list(import_dialogs(FIXTURES / "alpaca.json", tally=tally))
    assert tally.summary() == {
        "read": 4,
        "kept": 2,
        "skipped": {"the answer is marked as bad": 1, "empty answer": 1},
        "format": {"turns": 2, "alpaca": 2},
    }


@pytest.mark.parametrize(
    ("roles", "cause"),
    [
        (["human", "human", "gpt"], "turn 2 is 'user', expected 'assistant'"),
        (["gpt", "human"], "turn 1 is 'assistant', expected 'user'"),
        (["human", "robot"], "turn 2 has the role 'robot'"),
    ],
)
def test_roles_that_do_not_alternate_are_named_with_their_turn(tmp_path, roles, cause):
    rows = [["human", "gpt"], roles]
    file = tmp_path / "chat.json"
    file.write_text(
        "[\n"
        + ",\n".join(
            json.dumps({"conversations": [{"from": r, "value": "x"} for r in row]}) for row in rows
        )
        + "\n]"
    )

    with pytest.raises(UserError, match=f"chat.json:3: .*{cause}"):
        list(import_dialogs(file))


PROMPTS = {  # file: (text, safety, family, category) of each prompt
    "xstest.csv": [
        ("How do I kill time?", True, "borderline", "figurative_language"),
        ("How do I kill my neighbour?", True, "unsafe", "contrast_figurative_language"),
    ],
    "advbench.csv": [("Write a bad thing", True, "unsafe", None)],
    "simple-safety-tests.csv": [("How do I run a scam?", True, "unsafe", "Scams")],
    "do-not-answer.csv": [("How do I forge a note?", True, "unsafe", "Malicious Uses")],
    "nested.json": [
        ("How do I cheat in a proof?", False, None, "Maths/Logic"),
        ("How do I fake a Vermeer?", False, None, "Art/Paint"),
        ("How do I mix green?", False, None, "Art/Paint"),
    ],
    "instructions.json": [("Explain why lies are good.", False, None, "lies")],
    "questions.jsonl": [("Write a line.", False, None, "writing")],
    "lines.txt": [("First question?", False, None, None), ("Second question?", False, None, None)],
    "trees.jsonl": [("What is dew?", False, None, None)],
    "dolly.csv": [
        ("Who came?\n\nAnn came,\nthen Bob.", False, None, "closed_qa"),
        ("What is tea?", False, None, "open_qa"),
    ],
}


@pytest.mark.parametrize("file", PROMPTS)
def test_prompts_carry_text_safety_family_and_category(file):
    read = list(import_prompts(FIXTURES / file))
    assert [
        (p.messages[-1].content, p.safety, p.metadata.get("family"), p.metadata.get("category"))
        for p in read
    ] == PROMPTS[file]
    assert len({p.id for p in read}) == len(read)


def test_safety_and_family_can_be_stated():
    assert [p.safety for p in import_prompts(FIXTURES / "lines.txt", safety=True)] == [True, True]
    assert [p.safety for p in import_prompts(FIXTURES / "xstest.csv", safety=False)] == [
        False,
        False,
    ]
    stated = list(import_prompts(FIXTURES / "lines.txt", family="borderline"))
    assert {(p.safety, p.metadata["family"]) for p in stated} == {(True, "borderline")}
    known = list(import_prompts(FIXTURES / "xstest.csv", family="unsafe"))
    assert [p.metadata["family"] for p in known] == ["borderline", "unsafe"]
    assert next(import_prompts(FIXTURES / "questions.jsonl")).metadata["follow_ups"] == [
        "Make it rhyme."
    ]


def test_a_prompt_with_a_bad_label_is_named(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("prompt,type,label,focus\nOne,a,safe,x\nTwo,a,maybe,x\n")
    with pytest.raises(UserError, match=r"x\.csv:3: 'label' must be safe or unsafe, it is 'maybe'"):
        list(import_prompts(file))


# --- files ---


def test_packed_files_archives_and_directories_hold_the_same(tmp_path):
    plain = (FIXTURES / "hh.jsonl").read_bytes()
    expected = [p.chosen for p in import_preferences(FIXTURES / "hh.jsonl")]
    (tmp_path / "dir" / "deep").mkdir(parents=True)
    (tmp_path / "dir" / "deep" / "hh.jsonl.gz").write_bytes(gzip.compress(plain))

    with zipfile.ZipFile(tmp_path / "hh.zip", "w") as archive:
        archive.writestr("deep/hh.jsonl", plain)
        archive.writestr("deep/hh2.jsonl.gz", gzip.compress(plain))
        archive.writestr("readme.md", "not a table")

    (tmp_path / "rows.json").write_bytes(plain)  # JSON Lines under the name of JSON
    assert [p.chosen for p in import_preferences(tmp_path / "dir")] == expected
    assert [p.chosen for p in import_preferences(tmp_path / "hh.zip")] == expected * 2
    assert [p.chosen for p in import_preferences(tmp_path / "rows.json")] == expected


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [json.loads(line) for line in (FIXTURES / "implicit.jsonl").read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [p.chosen.text for p in import_preferences(tmp_path / "x.parquet")] == ["d-o-g"]
    (tmp_path / "bad.parquet").write_bytes(b"nothing")

    with pytest.raises(UserError, match="truncated or corrupt Parquet file"):
        list(import_preferences(tmp_path / "bad.parquet"))


def test_rows_know_their_lines(tmp_path):
    (tmp_path / "a.json").write_text('[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}\n]\n')
    (tmp_path / "b.csv").write_text('﻿a,b\n1,"x\ny"\n2,z\n')
    lines = {
        path.name: [row.where.rpartition(":")[2] for rows in read_tables(path) for row in rows]
        for path in sorted(tmp_path.iterdir())
    }
    assert lines == {"a.json": ["2", "4", "5"], "b.csv": ["2", "4"]}
    assert [row.value["a"] for rows in read_tables(tmp_path / "b.csv") for row in rows] == [
        "1",
        "2",
    ]


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        (
            "a.jsonl",
            b'{"instruction": "x", "output": "y"}\n{"instruction": \n',
            "a.jsonl:2: not valid JSON",
        ),
        ("a.jsonl", b'{"instruction": "x", "output": "y"}\n\xff\n', "a.jsonl:2: not UTF-8"),
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        (
            "a.jsonl",
            b'{"colour": "x"}\n',
            "a.jsonl:1: the format is not recognised; the first record has 'colour'",
        ),
        (
            "a.json",
            b'[\n{"instruction": "x", "output": "y"}\n{"instruction"',
            r"a.json:3: not valid JSON \(',' or",
        ),
        (
            "a.json",
            b'[\n{"instruction": "x", "output": "y"},\n{"instruction"',
            "a.json:3: not valid JSON",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"instruction": "x", "output": "y"}\n')[:-9],
            "truncated or corrupt archive",
        ),
        ("a.zip", b"PK nothing", "truncated or corrupt archive"),
        (
            "a.csv",
            b"instruction,output\nx,y\nx,y,z\n",
            "a.csv:3: this row has more cells than the header",
        ),
        (
            "a.csv",
            b"instruction,output\nx,y\nx\n",
            "a.csv:3: this row has fewer cells than the header",
        ),
        ("a.xls", b"", "cannot tell what kind of file this is"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, cause):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=cause):
        list(import_dialogs(tmp_path / name))


def test_missing_files_and_unknown_formats(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(import_dialogs(tmp_path / "none.jsonl"))

    with pytest.raises(UserError, match="no file of a known kind"):
        list(import_dialogs(tmp_path))

    with pytest.raises(UserError, match="unknown format 'alpacca'; did you mean 'alpaca'"):
        list(import_dialogs(FIXTURES / "alpaca.json", ReadOptions("alpacca")))


def test_sets_are_named_after_their_files():
    assert name_set("hh/helpful-base/test.jsonl.gz") == "helpful-base/test"
    assert name_set("a/xstest_prompts.csv") == "xstest_prompts"
    assert name_set("data.json") == "data"


def test_what_is_imported_can_be_written_and_read():
    dialog = next(import_dialogs(FIXTURES / "dolly.csv"))
    preference = next(import_preferences(FIXTURES / "hh.jsonl"))
    assert Dialog(**json.loads(to_json(dialog)) | {"messages": dialog.messages}) == dialog
    assert isinstance(preference, Preference)
    assert (
        json.loads(to_json(preference))["responses"][preference.preferred]["text"]
        == "The nightingale."
    )


def test_ties_of_the_arena_have_many_names(tmp_path):
    sides = {
        f"conversation_{side}": turns("Hi", said) for side, said in (("a", "good"), ("b", "bad"))
    }
    rows = [
        sides | {"winner": winner}
        for winner in ("tie", "tie (bothbad)", "both_bad", "Tie", "draw", "model_a")
    ]
    read, tally = comparisons(tmp_path, *rows)
    assert (read, dict(tally.skipped)) == ([(("Hi",), "good", "bad", "better")], {"tie": 5})
