"""How a format is recognised, and what becomes of rows that are not in it."""

import json

import pytest
from strangers import comparisons, dialogs, prompts, turns, write

from llama2.errors import UserError
from llama2.importers.dialogs import import_dialogs
from llama2.importers.preferences import holds_preferences
from llama2.importers.prompts import import_prompts
from llama2.importers.tables import SAMPLE, ReadOptions
from llama2.tally import Tally

ALPACA = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
PLAIN = {"messages": turns("Hi", "Hello")}


def test_the_format_is_said_and_stands_in_the_summary(tmp_path):
    _, tally = dialogs(tmp_path, ALPACA, ALPACA | {"id": 1})
    assert tally.line() == "read 2, kept 2; format: alpaca 2; columns not read: id 1"
    assert tally.summary() == {
        "read": 2,
        "kept": 2,
        "skipped": {},
        "format": {"alpaca": 2},
        "columns_not_read": {"id": 1},
    }


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": ""}, *turns("Hi", "Hello")]},
        {"messages": [{"role": "system", "content": None}, *turns("Hi", "Hello")]},
        {
            "messages": [
                {"role": "user", "content": "Hi", "name": "Ann"},
                {"role": "assistant", "content": "Hello"},
            ]
        },
        {"messages": turns("Hi", {"content": "Hello", "weight": 1})},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                *turns("", "Hello")[1:],
            ]
        },
        PLAIN | {"id": 7},
        PLAIN | {"train": "all"},
        PLAIN | {"metadata": {}},
    ],
)
def test_a_file_of_turns_may_be_uneven(tmp_path, row):
    for rows in ((PLAIN, row), (row, PLAIN)):
        read, tally = dialogs(tmp_path, *rows)
        assert read == [(("Hi", "Hello"), "all")] * 2
        assert dict(tally.notes["format"]) == {"turns": 2}


def test_our_own_format_is_recognised_by_our_own_keys(tmp_path):
    ours = PLAIN | {"train": "last", "metadata": {"a": 1}}
    assert dict(dialogs(tmp_path, ours)[1].notes["format"]) == {"dialog": 1}
    assert dict(dialogs(tmp_path, PLAIN)[1].notes["format"]) == {"turns": 1}
    read, tally = dialogs(tmp_path, PLAIN, {"messages": turns("a", "b", "c", "d"), "train": "last"})
    assert read[1] == (("a", "b", "c", "d"), "last")
    assert dict(tally.notes["format"]) == {"turns": 2}


@pytest.mark.parametrize(("format", "kept"), [("auto", 2), ("alpaca", 1), ("turns", 2)])
def test_rows_of_several_formats_are_refused_or_skipped(tmp_path, format, kept):
    rows = (SHAREGPT, ALPACA, SHAREGPT)
    with pytest.raises(UserError, match=r"rows.jsonl:\d: "):
        dialogs(tmp_path, *rows, format=format)

    read, tally = dialogs(tmp_path, *rows, format=format, malformed="skip")
    assert (len(read), tally.skipped["malformed"]) == (kept, 3 - kept)


def test_the_error_about_several_formats_names_them(tmp_path):
    with pytest.raises(
        UserError, match=r"rows\.jsonl:2: .* formats: this one is 'alpaca', most are 'turns'; split"
    ):
        dialogs(tmp_path, SHAREGPT, ALPACA, SHAREGPT)


def test_a_format_must_fit_more_than_the_first_row(tmp_path):
    rows = [
        {"prompt": "Hi", "text": "x"},
        *({"instruction": str(i), "output": "y", "prompt": ""} for i in range(9)),
    ]
    read, tally = dialogs(tmp_path, *rows, malformed="skip")
    assert (len(read), dict(tally.notes["format"])) == (9, {"alpaca": 9})


@pytest.mark.parametrize(
    "first", [{"foo": 1}, {"conversations": [{"from": "gpt", "value": "Hi"}]}, [1], "text", 7]
)
def test_a_first_row_that_cannot_be_used_is_named_or_skipped(tmp_path, first):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: "):
        dialogs(tmp_path, first, SHAREGPT, SHAREGPT)

    read, tally = dialogs(tmp_path, first, SHAREGPT, SHAREGPT, malformed="skip")
    assert (read, tally.summary()["skipped"]) == ([(("Hi", "Hello"), "all")] * 2, {"malformed": 1})


def test_a_damaged_line_is_named_or_skipped_wherever_it_stands(tmp_path):
    file = tmp_path / "rows.jsonl"
    good = '{"instruction": "a", "output": "b"}\n'
    for before in (0, 1, SAMPLE + 5):
        text, line = good * before + "{\n" + good, before + 1
        file.write_text(text)
        with pytest.raises(UserError, match=f"rows.jsonl:{line}: not valid JSON"):
            list(import_dialogs(file))

        tally = Tally()
        assert len(
            list(import_dialogs(file, ReadOptions(malformed="skip"), tally=tally))
        ) == text.count(good)
        assert dict(tally.skipped) == {"malformed": 1}


def test_a_file_in_which_nothing_is_recognised_is_counted_where_rows_are_skipped(tmp_path):
    write(tmp_path / "a.jsonl", {"foo": 1}, {"foo": 2})
    write(tmp_path / "b.jsonl", ALPACA)
    tally = Tally()
    assert len(list(import_dialogs(tmp_path, ReadOptions(malformed="skip"), tally=tally))) == 1
    assert dict(tally.skipped) == {"malformed": 2}


def test_null_is_never_a_word(tmp_path):
    rows = [
        SHAREGPT,
        {"conversations": None},
        {"conversations": []},
        {"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": None}]},
    ]
    read, tally = dialogs(tmp_path, *rows)
    assert read == [(("Hi", "Hello"), "all")]
    assert dict(tally.skipped) == {"no turns": 2, "empty turn": 1, "empty answer": 1}
    nan = float("nan")
    read, tally = dialogs(
        tmp_path,
        ALPACA | {"input": nan},
        ALPACA | {"output": nan},
        ALPACA | {"output": None},
        {"instruction": None, "output": "x"},
        ALPACA | {"output": " \r\n "},
    )
    assert read == [(("Add.", "5"), "all")]
    assert dict(tally.skipped) == {"empty answer": 3, "empty turn": 1}

    with pytest.raises(UserError, match="'history' must be a list of pairs"):
        dialogs(tmp_path, ALPACA | {"history": [["Hi", None]]})


def test_parts_and_rows_of_chat_logs_may_be_null(tmp_path):
    part = {"role": "assistant", "content": [{"type": "text", "text": None}]}
    row = {
        "conversation": [
            {"role": "user", "content": "Hi", "toxic": False},
            {"role": "assistant", "content": None},
        ],
        "turn": 1,
        "toxic": False,
        "openai_moderation": [{"flagged": False}],
    }
    read, tally = dialogs(tmp_path, {"messages": [*turns("Hi"), part]})
    assert (read, dict(tally.skipped)) == ([], {"empty answer": 1})
    read, tally = dialogs(
        tmp_path,
        row,
        {"conversation": None},
        row | {"conversation": turns("Hi", "Hello")},
        row | {"conversation": turns("Hi", "Hello"), "toxic": True},
    )
    assert read == [(("Hi", "Hello"), "all")]
    assert dict(tally.skipped) == {
        "empty answer": 1,
        "no turns": 1,
        "the answer is marked as bad": 1,
    }


def test_null_columns_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.Table.from_pylist([SHAREGPT, {"conversations": None}]), tmp_path / "x.parquet"
    )
    tally = Tally()
    assert len(list(import_dialogs(tmp_path / "x.parquet", tally=tally))) == 1
    assert dict(tally.skipped) == {"no turns": 1}


@pytest.mark.parametrize(
    ("table", "said", "format"),
    [
        ("instruction\tinput\toutput\nAdd.\t2 and 3\t5\n", ("Add.\n\n2 and 3", "5"), "alpaca"),
        (
            "question\tanswer\nWhat is tea?\tA drink\n",
            ("What is tea?", "A drink"),
            "question-answer",
        ),
        (
            "Question\tsolution\nWhat is tea?\tA drink\n",
            ("What is tea?", "A drink"),
            "question-answer",
        ),
        (
            "context\tquestion\tanswer\nTea.\tWhat?\tA drink\n",
            ("Tea.\n\nWhat?", "A drink"),
            "question-answer",
        ),
    ],
)
def test_a_table_with_a_header_is_read_by_it(tmp_path, table, said, format):
    (tmp_path / "a.tsv").write_text(table)
    tally = Tally()
    assert [
        tuple(m.content for m in d.messages)
        for d in import_dialogs(tmp_path / "a.tsv", tally=tally)
    ] == [said]
    assert (tally.read, dict(tally.notes["format"])) == (1, {format: 1})


def test_a_row_that_does_not_fit_the_header_is_named_or_skipped(tmp_path):
    (tmp_path / "a.tsv").write_text("Question\tsolution\nWhat is tea?\nWhat is tea?\tA drink\n")
    with pytest.raises(UserError, match=r"a.tsv:2: this row has (1|fewer) cells"):
        list(import_dialogs(tmp_path / "a.tsv"))

    tally = Tally()
    assert (
        len(list(import_dialogs(tmp_path / "a.tsv", ReadOptions(malformed="skip"), tally=tally)))
        == 1
    )
    assert dict(tally.skipped) == {"malformed": 1}


def test_cells_without_a_header_are_a_format_only_on_request(tmp_path):
    (tmp_path / "a.tsv").write_text("Is ice hot?\tno\tIce is frozen water.\n")
    with pytest.raises(
        UserError, match=r"a\.tsv:1: the format is not recognised; .* has a list of 3 cells"
    ):
        list(import_dialogs(tmp_path / "a.tsv"))

    dialog = next(import_dialogs(tmp_path / "a.tsv", ReadOptions("chain-of-thought")))
    assert dialog.messages[-1].content == "Ice is frozen water. The answer is no."


@pytest.mark.parametrize(
    ("format", "value", "cause"),
    [
        ("alpaca", "a text", "'alpaca' has a mapping for a row, this is a text"),
        ("alpaca", [1, 2], "'alpaca' has a mapping for a row, this is a list of 2 cells"),
        (
            "chain-of-thought",
            {"a": 1},
            "'chain-of-thought' has a list of cells for a row, this is a mapping",
        ),
        ("chain-of-thought", ["a", 1, "b"], "three cells are expected"),
    ],
)
def test_a_row_of_another_type_is_named(tmp_path, format, value, cause):
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*{cause}"):
        dialogs(tmp_path, value, format=format)


def test_whether_a_path_holds_comparisons_is_told_by_most_of_its_rows(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert holds_preferences(write(tmp_path / "a.jsonl", {"foo": 1}, pair, pair))
    assert not holds_preferences(write(tmp_path / "b.jsonl", pair, *[ALPACA] * 9))
    assert holds_preferences(tmp_path / "b.jsonl", "pairs")
    assert not holds_preferences(tmp_path / "a.jsonl", "alpaca")
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "0.jsonl", {"foo": 1})
    write(tmp_path / "d" / "1.jsonl", pair)
    assert holds_preferences(tmp_path / "d")


def test_nested_prompts_are_texts_by_topic_and_nothing_else(tmp_path):
    assert prompts(tmp_path, {"Maths": {"Logic": ["a", "b"]}})[0] == ["a", "b"]
    with pytest.raises(UserError, match=r"not recognised|the records lie below"):
        prompts(
            tmp_path, {"data": [{"title": "Mill", "paragraphs": [{"context": "x", "qas": []}]}]}
        )


def test_prompts_of_harmful_sets_carry_their_family(tmp_path):
    review = {"id": 1, "question": "How?", "response": "No.", "harmful": 0, "action": 0}
    assert [
        p.metadata["family"] for p in import_prompts(write(tmp_path / "llama.jsonl", review))
    ] == ["unsafe"]

    (tmp_path / "catqa_english.json").write_text('{"Fraud": {"Scams": ["How do I scam?"]}}')
    (tmp_path / "other.json").write_text('{"Fraud": {"Scams": ["How do I scam?"]}}')
    read = [next(import_prompts(tmp_path / name)) for name in ("catqa_english.json", "other.json")]
    assert [(p.metadata.get("family"), p.safety, p.metadata["category"]) for p in read] == [
        ("unsafe", True, "Fraud/Scams"),
        (None, False, "Fraud/Scams"),
    ]


def test_line_ends_in_prompts_of_toxigen_are_line_ends(tmp_path):
    for name, family in (("hate_trolls_1k.txt", "unsafe"), ("neutral_trolls_1k.txt", None)):
        (tmp_path / name).write_text("- trolls are rude\\n- trolls are loud\\n-\n")
        tally = Tally()
        prompt = next(import_prompts(tmp_path / name, tally=tally))
        assert prompt.messages[0].content == "- trolls are rude\n- trolls are loud\n-"
        assert (prompt.metadata.get("family"), prompt.safety) == (family, family is not None)
        assert dict(tally.notes["format"]) == {"toxigen": 1}


def test_useless_comparisons_are_counted_in_our_own_format_too(tmp_path):
    def ours(first: str, second: str) -> dict[str, object]:
        return {
            "id": "1",
            "prompt": turns("q"),
            "responses": [{"text": first}, {"text": second}],
            "preferred": 0,
            "degree": "better",
        }

    rows = [
        ours(*pair) for pair in (("a", "b"), ("a", "a"), ("a ", "a\r\n"), ("", "b"), (" ", "b"))
    ]
    read, tally = comparisons(tmp_path, *rows)
    assert read == [(("q",), "a", "b", "better")]
    assert dict(tally.skipped) == {"identical answers": 2, "empty answer": 2}
    read, tally = dialogs(
        tmp_path, *({"messages": turns(*said), "train": "all"} for said in (("a", " "), (" ", "b")))
    )
    assert (read, dict(tally.skipped)) == ([], {"empty answer": 1, "empty turn": 1})


@pytest.mark.parametrize("spell", [json.dumps, repr, lambda turns: json.dumps(turns, indent=1)])
def test_turns_that_are_written_as_text_are_turns(tmp_path, spell):
    read, tally = dialogs(tmp_path, {"messages": spell(turns("Is it\n?", "yes"))})
    assert (read, dict(tally.notes["format"])) == ([(("Is it\n?", "yes"), "all")], {"turns": 1})
    row = {
        "prompt": spell(turns("Hi")),
        "chosen": spell([{"role": "assistant", "content": "good"}]),
        "rejected": spell([{"role": "assistant", "content": "bad"}]),
    }
    assert comparisons(tmp_path, row)[0] == [(("Hi",), "good", "bad", "better")]
    assert holds_preferences(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    "written",
    [
        "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'Hello'}]",
        '[{"role": "user", "content": "H',
        "array([{'content': 'Hi', 'role': 'user'}], dtype=object)",
        '[{"role": "user", "content": "\\ud83d"}]',
    ],
)
def test_turns_written_as_text_that_cannot_be_read_back_are_no_answer(tmp_path, written):
    row = {"prompt": "Hi", "completion": written}
    with pytest.raises(
        UserError,
        match=r"rows.jsonl:1: 'completion' is a list of turns written as text.*JSON Lines",
    ):
        dialogs(tmp_path, row)

    read, tally = dialogs(
        tmp_path, row, {"prompt": "Hi", "completion": "[{}] is JSON"}, malformed="skip"
    )
    assert (read, dict(tally.skipped)) == ([(("Hi", "[{}] is JSON"), "all")], {"malformed": 1})
