"""Records and their files: what is read back is what was written, and each bad line is named."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2 import records
from llama2.errors import UserError
from llama2.records import Dialog, Document, Message, Preference, Prompt, Response, messages_of

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
ASKED = messages_of([("system", "S"), ("user", "Hi"), ("assistant", "Hello."), ("user", "And?")])
PREFERENCE = Preference(
    "a",
    ASKED,
    (Response("x", "v1", 0.7), Response("y")),
    1,
    "better",
    "preferred_only",
    "safe",
    "me",
    3,
    {"family": "fact"},
)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_files_give_back_what_was_written(tmp_path, suffix):
    if suffix == ".zst":
        pytest.importorskip("zstandard")

    file = tmp_path / f"deep/records.jsonl{suffix}"
    for kind, made in (
        (Preference, PREFERENCE),
        (Prompt, Prompt(ASKED, "p", True, {"a": [1]})),
        (Dialog, Dialog((*ASKED, Message("assistant", "No.")), "last")),
        (Document, Document("Café \u2028 \n 日本", "d", {"source": "web"})),
    ):
        assert records.write(file, [made, made]) == 2
        assert list(records.read(kind, file)) == [made, made]

    assert [path.name for path in (tmp_path / "deep").iterdir()] == [file.name]


@given(TEXT, TEXT)
def test_any_text_survives(question, answer):
    made = Dialog((Message("user", question), Message("assistant", answer)))
    assert records.parse(Dialog, records.to_json(made), "here") == made
    assert "\n" not in records.to_json(made)


def test_what_a_preference_says_follows_from_what_was_shown():
    assert (PREFERENCE.chosen.text, PREFERENCE.rejected.text) == ("y", "x")
    assert (PREFERENCE.chosen_safe, PREFERENCE.rejected_safe) == (True, False)
    for label, safe in (("both", (True, True)), ("neither", (False, False)), (None, (None, None))):
        made = Preference("a", ASKED, PREFERENCE.responses, 0, "better", label)
        assert (made.chosen_safe, made.rejected_safe) == safe


@pytest.mark.parametrize(
    ("roles", "last", "message"),
    [
        (["user", "user"], "user", "turn 2 is 'user', expected 'assistant'"),
        (["assistant"], "assistant", "turn 1 is 'assistant', expected 'user'"),
        (["system"], "user", "at least one user turn"),
        (["user", "system"], "user", "turn 2 is 'system'"),
        (["user", "assistant"], "user", "the last turn must be 'user', it is 'assistant'"),
        (["system", "user"], "assistant", "the last turn must be 'assistant'"),
    ],
)
def test_roles_alternate(roles, last, message):
    with pytest.raises(ValueError, match=message):
        records.check_roles(messages_of([(role, "x") for role in roles]), last)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (Document, {"text": 5}, "x:7: text: Input should be a valid string"),
        (Document, {"text": "a", "txt": "b"}, "x:7: txt: Unexpected"),
        (
            Prompt,
            {"messages": [{"role": "user", "content": "a", "name": "b"}]},
            "x:7: messages.0.name: Unexpected",
        ),
        (
            Prompt,
            {"messages": [{"role": "user", "content": "a"}], "safety": "yes"},
            "x:7: safety: Input should be a valid",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_field(kind, row, message):
    with pytest.raises(UserError, match=message) as error:
        records.parse(kind, json.dumps(row), "x:7")

    assert error.value.cure == f"each line must be one {kind.__name__} record (docs/formats.md)"


def test_blank_lines_count_but_hold_no_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n   \n{"text": 1}\n')
    reader = records.read(Document, tmp_path / "a.jsonl")
    assert next(reader).text == "a"

    with pytest.raises(UserError, match=r"a.jsonl:5: "):
        next(reader)


def test_an_empty_file_is_an_error_unless_expected(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(
        UserError, match=r"a.jsonl: the file is empty; it should hold Document records"
    ):
        list(records.read(Document, tmp_path / "a.jsonl"))

    assert list(records.read(Document, tmp_path / "a.jsonl", may_be_empty=True)) == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_that_was_cut_off_is_named(tmp_path, suffix):
    if suffix == ".zst":
        pytest.importorskip("zstandard")

    file = tmp_path / f"a.jsonl{suffix}"
    records.write(file, (Document(f"text {index}") for index in range(999)))
    file.write_bytes(file.read_bytes()[:-20])

    with pytest.raises(UserError, match=r"truncated or corrupt archive .*; fetch it again"):
        list(records.read(Document, file))

    file.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r":1: truncated or corrupt archive"):
        list(records.read(Document, file))


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "\xff"}\n'))
    with pytest.raises(
        UserError, match=r"a.jsonl.gz:2: not UTF-8 \(invalid start byte at byte 10\); convert"
    ):
        list(records.read(Document, file))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.jsonl"
    records.write(file, [Document("old")])

    def some():
        yield Document("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="no space left"):
        records.write(file, some())

    assert [one.text for one in records.read(Document, file)] == ["old"]


def test_a_file_of_other_kinds_is_told_how_to_become_records(tmp_path):
    (tmp_path / "a.txt").write_text("What is tea?\n")
    (tmp_path / "a.jsonl").write_text("What is tea?\n")
    cure = f"`llama2 prepare --kind prompts --sources.NAME.path {tmp_path}/a.txt --out DIR` makes them of other formats"

    for name, more in (("a.txt", f"; {cure}"), ("a.jsonl", "")):
        with pytest.raises(UserError, match=f"{name}:1: not valid JSON") as error:
            list(records.read(Prompt, tmp_path / name))

        assert error.value.cure == f"mend the line{more}"
