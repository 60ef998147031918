"""A question is joined with what it is about; SQuAD-, BoolQ-, SVAMP-, SocialIQa-, PIQA- and
RAG-like rows."""

import pytest
from strangers import comparisons, dialogs, prompts, turns, write

from llama2.errors import UserError
from llama2.importers.prompts import import_prompts

MILL = "The mill was built in 1746 by Jo."


def test_reading_comprehension_puts_the_passage_before_the_question(tmp_path):
    squad = {
        "id": "1",
        "title": "Mill",
        "context": MILL,
        "question": "Who?",
        "answers": {"text": ["Jo", "by Jo"], "answer_start": [30, 27]},
    }
    read, tally = dialogs(
        tmp_path, squad, squad | {"question": "When?", "answers": {"text": [], "answer_start": []}}
    )
    assert read == [((f"{MILL}\n\nWho?", "Jo"), "all")]
    assert dict(tally.skipped) == {"empty answer": 1}
    assert prompts(tmp_path, squad)[0] == [f"{MILL}\n\nWho?"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "Is it old", "passage": MILL, "answer": True}, f"{MILL}\n\nIs it old"),
        ({"question": "Is it new", "passage": MILL, "answer": False}, f"{MILL}\n\nIs it new"),
        (
            {
                "Body": "Ann had 3 pens.",
                "Question": "How many?",
                "Equation": "3",
                "Answer": 3.0,
                "Type": "x",
            },
            "Ann had 3 pens.\n\nHow many?",
        ),
        (
            {
                "passage": MILL,
                "question": "Who?",
                "options": ["(A)Jo", "(B)Al"],
                "label": "A",
                "answer": None,
                "other": None,
            },
            f"{MILL}\n\nWho?\n\n(A)Jo\n(B)Al",
        ),
        (
            {
                "context": "Ann fell.",
                "question": "Why?",
                "options": ["ice", "wind"],
                "answer": "ice",
            },
            "Ann fell.\n\nWhy?\n\nA. ice\nB. wind",
        ),
        (
            {
                "question": "Why?",
                "choices": {"text": ["ice", "wind"], "label": ["1", "2"]},
                "answerKey": "1",
            },
            "Why?\n\n1. ice\n2. wind",
        ),
        (
            {
                "query": "Who?",
                "documents": [{"title": "Mill", "text": MILL}, {"text": "Al?"}],
                "response": "Jo",
            },
            f"Mill\n\n{MILL}\n\nAl?\n\nWho?",
        ),
        ({"question": "Who?", "contexts": [MILL, ""], "answer": "Jo"}, f"{MILL}\n\nWho?"),
        ({"instruction": "Who?", "context": MILL}, f"Who?\n\n{MILL}"),
        ({"instruction": "Sum up.", "input": MILL}, f"Sum up.\n\n{MILL}"),
        ({"instruction": "", "input": "Only an input."}, "Only an input."),
        ({"instruction": "What rhymes with cat?", "input": "cat"}, "What rhymes with cat?\n\ncat"),
        ({"question": "What rhymes with cat?", "context": "cat"}, "cat\n\nWhat rhymes with cat?"),
        ({"prompt": f"Read: {MILL} Who?", "context": MILL}, f"Read: {MILL} Who?"),
    ],
)
def test_a_prompt_holds_all_that_is_asked(tmp_path, row, said):
    assert prompts(tmp_path, row)[0] == [said]


def test_inputs_tell_prompts_apart(tmp_path):
    rows = [{"instruction": "Sum up.", "input": text} for text in ("One.", "Two.")]
    assert prompts(tmp_path, *rows)[0] == ["Sum up.\n\nOne.", "Sum up.\n\nTwo."]


def test_a_passage_alone_asks_nothing(tmp_path):
    for question in ("", None):
        read, tally = prompts(tmp_path, {"question": question, "passage": MILL})
        assert (read, dict(tally.skipped)) == ([], {"empty turn": 1})


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (
            {"context": "Ann fell.", "question": "Why?", "answerA": "ice", "answerB": "wind"},
            "'answerA', 'answerB' would be lost",
        ),
        ({"goal": "Open a jar", "sol1": "twist", "sol2": "smash"}, "'sol1', 'sol2' would be lost"),
        (
            {"question": "Why?", "context": {"title": ["a"], "sentences": [["b"]]}},
            "'title' must be text",
        ),
        (
            {"question": "Why?", "documents": [["a", "b"]]},
            "'documents' must be text, or a list of texts",
        ),
        ({"question": {"stem": "Why?"}}, "'question' must be text, it is dict"),
        ({"question": "Why?", "choices": [1, 2]}, "'choices' must be a list of texts"),
    ],
)
def test_what_cannot_be_joined_is_refused_by_name(tmp_path, row, cause):
    with pytest.raises(UserError, match=f"rows.jsonl:1: {cause}"):
        prompts(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input": "Is it?", "output": "yes"}, ("Is it?", "yes")),
        ({"prompt": "Add.", "input": "2 and 3", "output": "5"}, ("Add.\n\n2 and 3", "5")),
        ({"problem": "2 + 3", "solution": "It is 5.", "answer": "5"}, ("2 + 3", "It is 5.")),
    ],
)
def test_questions_and_answers_have_many_names(tmp_path, row, said):
    assert dialogs(tmp_path, row)[0] == [(said, "all")]


def test_comparisons_have_inputs_and_contexts_too(tmp_path):
    pair = {"chosen": "a", "rejected": "b"}
    for row, said in (
        ({"instruction": "Add.", "input": "2 and 3"}, "Add.\n\n2 and 3"),
        ({"input": "Add."}, "Add."),
        ({"question": "Who?", "context": MILL}, f"{MILL}\n\nWho?"),
    ):
        assert comparisons(tmp_path, row | pair)[0] == [((said,), "a", "b", "better")]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"question": "Is it", "answer": True}, "'answer' must be text, it is bool"),
        ({"question": "Is it", "answer": False}, "'answer' must be text, it is bool"),
        (
            {"question": "Who?", "choices": ["Jo", "Al"], "answer": 1},
            "'answer' must be text, it is int",
        ),
        (
            {"question": "Who?", "answer": ["Jo", "Al"]},
            "'answer' must be text or a list of turns, it is list",
        ),
    ],
)
def test_an_answer_that_is_no_text_is_refused(tmp_path, row, cause):
    with pytest.raises(UserError, match=f"rows.jsonl:1: {cause}"):
        dialogs(tmp_path, row)


@pytest.mark.parametrize("value", [{"violence": True}, 7, ["a"]])
def test_a_category_that_is_no_text_is_left_unread(tmp_path, value):
    for row in ({"prompt": "q", "response": "r"}, {"instruction": "q", "output": "r"}):
        read, tally = dialogs(tmp_path, row | {"category": value})
        assert (read, dict(tally.notes["columns not read"])) == (
            [(("q", "r"), "all")],
            {"category": 1},
        )

    assert prompts(tmp_path, {"prompt": "q", "category": value})[0] == ["q"]


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_the_system_turn_is_read_in_every_layout(tmp_path, key):
    for row in (
        {"question": "q", "response": "r"},
        {"instruction": "q", "output": "r"},
        {"messages": turns("q", "r")},
    ):
        assert dialogs(tmp_path, row | {key: "Be kind."})[0] == [(("Be kind.", "q", "r"), "all")]
        assert dialogs(tmp_path, row | {key: None})[0] == [(("q", "r"), "all")]

    row = {"question": "q", "chosen": "r", "rejected": "s", key: "Be kind."}
    assert comparisons(tmp_path, row)[0] == [(("Be kind.", "q"), "r", "s", "better")]


def test_two_system_turns_that_differ_are_refused(tmp_path):
    row = {
        "system": "Be kind.",
        "messages": [{"role": "system", "content": "Be rude."}, *turns("q", "r")],
    }
    with pytest.raises(UserError, match="the column 'system' and the system turn differ"):
        dialogs(tmp_path, row)

    assert dialogs(tmp_path, row | {"system": "Be rude."})[0] == [(("Be rude.", "q", "r"), "all")]


@pytest.mark.parametrize(
    ("tags", "safety", "family"),
    [
        ({"safety": True}, True, ""),
        ({"safety": "true"}, True, ""),
        ({"safety": 0}, False, ""),
        ({"safety": "S1"}, False, ""),
        ({"family": "borderline"}, True, "borderline"),
        ({"family": "unsafe", "safety": False}, False, "unsafe"),
        ({"metadata": {"family": "unsafe"}, "id": 7}, True, "unsafe"),
        ({"family": "Smith"}, False, ""),
        ({"family": ["a"]}, False, ""),
    ],
)
def test_a_prompt_keeps_the_tags_that_its_row_states(tmp_path, tags, safety, family):
    for row in ({"prompt": "q"}, {"messages": turns("q")}, {"question": "q", "answer": "a"}):
        found = list(import_prompts(write(tmp_path / "rows.jsonl", row | {"note": "x"} | tags)))
        assert [(one.safety, one.metadata.get("family", "")) for one in found] == [
            (safety, family)
        ], row


@pytest.mark.parametrize(
    ("mark", "unsafe"),
    [
        ({"label": "unsafe"}, True),
        ({"label": "Harmful"}, True),
        ({"label": "safe"}, False),
        ({"label": "sports"}, False),
        ({"unsafe": "1"}, True),
        ({"unsafe": 0}, False),
        ({"is_harmful": True}, True),
        ({"is_safe": False}, True),
        ({"is_safe": "yes"}, False),
        ({"label": 1}, False),
    ],
)
def test_a_mark_beside_a_prompt_without_an_answer_is_its_own(tmp_path, mark, unsafe):
    found = list(import_prompts(write(tmp_path / "rows.jsonl", {"prompt": "q"} | mark)))
    assert [(one.safety, one.metadata.get("family", "")) for one in found] == [
        (unsafe, "unsafe" if unsafe else "")
    ]
    found = list(
        import_prompts(write(tmp_path / "rows.jsonl", {"prompt": "q", "response": "r"} | mark))
    )
    assert [one.safety for one in found] == [False]  # it speaks of the answer


def test_options_may_be_a_mapping_of_letters(tmp_path):
    row = {"question": "Who?", "options": {"A": "Jo", "B": "Al", "C": None}, "answer": "Al"}
    assert dialogs(tmp_path, row)[0] == [(("Who?\n\nA. Jo\nB. Al", "Al"), "all")]


def test_two_lists_of_turns_that_differ_are_refused(tmp_path):
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]
    row = {"messages": turns("q", "r"), "conversations": sharegpt}
    assert dialogs(tmp_path, row)[0] == [(("q", "r"), "all")]

    with pytest.raises(UserError, match=r"rows.jsonl:1: 'conversations' and 'messages' differ"):
        dialogs(tmp_path, row | {"messages": turns("q", "s")})


def test_the_wrapping_of_alpaca_is_no_part_of_what_is_asked(tmp_path):
    said = (
        "Below is an instruction.\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:"
    )
    for key in ("prompt", "instruction"):
        assert dialogs(tmp_path, {key: said, "output": "5"})[0] == [
            (("Add.\n\n2 and 3", "5"), "all")
        ]
