"""Columns that nobody reads: those that change the meaning are refused by name, the others are
counted."""

import shlex

import pytest
from strangers import comparisons, dialogs, prompts, turns

from llama2.errors import UserError
from llama2.importers.columns import find_unread, is_filled
from llama2.reading.files import Row

ASKED = {"question": "When?", "answer": "In 1746."}


@pytest.mark.parametrize(
    "column",
    [
        "premise",
        "hypothesis",
        "retrieved_passages",
        "SourceDocument",
        "excerpt",
        "schema",
        "table",
        "persona",
        "selftext",
        "abstract",
        "rag_context",
        "Background Story",
        "option_a",
        "optionA",
        "answerB",
        "sol1",
        "ending0",
        "A",
        "distractors",
        "history",
        "instruction",
        "query",
        "rating",
        "helpfulness",
        "quality_score",
        "margin",
        "images",
        "image_url",
        "chosen",
        "rejected",
        "code",
        "definition",
        "Guidelines",
        "few_shot_demonstrations",
        "content",
        "quality",
    ],
)
def test_a_column_that_changes_the_meaning_is_refused_by_name(tmp_path, column):
    row = ASKED | {column: "The mill was built in 1746."}
    with pytest.raises(
        UserError, match=f"rows.jsonl:1: '{column}' would be lost.*--sources.NAME.ignore '?{column}"
    ):
        dialogs(tmp_path, row)

    read, tally = dialogs(tmp_path, row, malformed="skip")
    assert (read, dict(tally.skipped)) == ([], {f"column {column} would be lost": 1})
    assert f"(--sources.NAME.ignore {shlex.quote(column)})" in tally.line()
    read, tally = dialogs(tmp_path, row, ignore=(column,))
    assert (read, tally.kept) == ([(("When?", "In 1746."), "all")], 1)


@pytest.mark.parametrize(
    "column",
    [
        "id",
        "_id",
        "source",
        "dataset",
        "category",
        "date",
        "url",
        "split",
        "title",
        "language",
        "prompt_id",
        "passage_id",
        "document_url",
        "context_length",
        "input_tokens",
        "topic",
        "rationale",
        "original_question",
        "lang_code",
        "reasoning_content",
        "content_type",
        "Numbers",
    ],
)
def test_a_harmless_column_is_counted(tmp_path, column):
    read, tally = dialogs(tmp_path, ASKED | {column: "7"}, ASKED)
    assert len(read) == 2
    noted = {} if column == "category" else {column: 1}
    assert dict(tally.notes.get("columns not read", {})) == noted
    assert tally.summary().get("columns_not_read", {}) == noted


@pytest.mark.parametrize(
    "empty", [None, "", "  ", [], {}, [""], [None], {"a": None}, "[]", "{}", False, float("nan")]
)
def test_an_empty_column_changes_nothing(tmp_path, empty):
    assert not is_filled(empty)
    read, tally = dialogs(
        tmp_path, ASKED | {"context": empty, "images": empty, "tools": empty, "premise": empty}
    )
    assert read == [(("When?", "In 1746."), "all")]
    assert "columns not read" not in tally.notes


def test_a_copy_of_what_is_read_is_harmless(tmp_path):
    row = {"prompt": "Hi", "prompt_id": "7", "messages": turns("Hi", "Hello")}
    read, tally = dialogs(tmp_path, row)
    assert read == [(("Hi", "Hello"), "all")]
    assert dict(tally.notes["columns not read"]) == {"prompt": 1, "prompt_id": 1}

    with pytest.raises(UserError, match="'prompt' would be lost"):
        dialogs(tmp_path, row | {"prompt": "Something else"})


@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [{"name": "f"}]},
        {"tools": '[{"name": "f"}]'},
        {"functions": [{"name": "f"}]},
        {
            "messages": [
                {"role": "user", "content": "w?"},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                {"role": "tool", "content": "12"},
                {"role": "assistant", "content": "12"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "w?"},
                {"role": "function_call", "content": "{}"},
                {"role": "observation", "content": "12"},
                {"role": "assistant", "content": "12"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "w?"},
                {
                    "role": "assistant",
                    "content": "",
                    "function_call": {"name": "f", "arguments": "{}"},
                },
            ]
        },
    ],
)
def test_dialogues_with_tools_are_counted_and_left_out(tmp_path, tools):
    plain = {"messages": turns("a", "b"), "tools": "[]", "system": "Be kind."}
    read, tally = dialogs(tmp_path, plain, {"messages": turns("a", "b")} | tools)
    assert (read, dict(tally.skipped)) == ([(("Be kind.", "a", "b"), "all")], {"tools": 1})
    assert "no place for their calls" in tally.line()


def test_keys_of_turns_are_watched_too(tmp_path):
    named = {
        "messages": [
            {"role": "user", "content": "a", "name": "Ann"},
            {"role": "assistant", "content": "b"},
        ]
    }
    assert dict(dialogs(tmp_path, named)[1].notes["columns not read"]) == {"name": 1}
    seen = {
        "messages": [
            {"role": "user", "content": "a", "images": ["a.png"]},
            {"role": "assistant", "content": "b"},
        ]
    }

    with pytest.raises(UserError, match="'images' would be lost"):
        dialogs(tmp_path, seen)


def test_only_what_is_asked_matters_to_prompts_and_scores_matter_to_comparisons(tmp_path):
    assert prompts(tmp_path, {"prompt": "Hi", "response": "Yes", "rating": 1, "helpfulness": 0})[
        0
    ] == ["Hi"]
    with pytest.raises(UserError, match="'images' would be lost"):
        prompts(tmp_path, {"prompt": "Hi", "images": ["a.png"]})

    with pytest.raises(UserError, match="'rating' would be lost"):
        comparisons(tmp_path, {"prompt": "Hi", "chosen": "a", "rejected": "b", "rating": [4, 2]})


def test_ratings_of_an_answer_are_no_demonstration_by_themselves(tmp_path):
    row = {
        "prompt": "p",
        "response": "r",
        "helpfulness": 0,
        "correctness": 1,
        "coherence": 4,
        "complexity": 2,
    }
    with pytest.raises(UserError, match="'helpfulness', 'correctness' would be lost"):
        dialogs(tmp_path, row)


def test_what_was_asked_for_is_remembered_by_the_row():
    row = Row({"a": "x", "text": "x y", "id": 3, "inner": {"score": 2, "b": 1}}, "f:1", "f")
    row.text("a")
    inner = row.part(row.get("inner"))
    inner.get("b")
    assert find_unread(row).lost == ("text", "score")
    assert find_unread(row).harmless == ("id",)
    assert find_unread(row, known=("text",), worth=False).lost == ()


def test_numbers_that_a_question_has_places_for_are_not_lost(tmp_path):
    row = {"Question": "Ann had number0 pens and lost number1 .", "Answer": "3.0", "Numbers": "5 2"}
    with pytest.raises(UserError, match="'Numbers' would be lost"):
        dialogs(tmp_path, row)
