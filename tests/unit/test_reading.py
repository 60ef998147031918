"""How bytes become text, and text becomes rows: what is told apart, and what is bad and passed
over."""

import gzip
import json
import lzma
import math

import pytest

from llama2.errors import UserError
from llama2.importers.dialogs import import_dialogs
from llama2.importers.tables import ReadOptions
from llama2.reading.files import BadRow, read_tables
from llama2.tally import Tally


def read(path, content, **encoding):
    """The values of a file's rows, and of its bad ones the line and the cause."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode(**encoding))
    return [
        (int(row.where.rpartition(":")[2]), row.cause) if isinstance(row, BadRow) else row.value
        for rows in read_tables(path)
        for row in rows
    ]


# --- text ---


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.jsonl", '{"a": "é"}@\n@{"a": "x"}', [{"a": "é"}, {"a": "x"}]),
        ("a.json", '[{"a": "é"},@\n@{"a": "x"}]', [{"a": "é"}, {"a": "x"}]),
        ("a.csv", "a@b,c", None),
        ("a.txt", "é@x", ["é", "x"]),
    ],
)
def test_encodings_with_a_mark_and_every_line_end(tmp_path, encoding, end, name, content, rows):
    content = content.replace("@\n@", "@").replace("@", end)
    found = read(
        tmp_path / name,
        content if name != "a.csv" else f'a,b{end}é,"1{end}2"{end}',
        encoding=encoding,
    )
    assert found == (rows or [{"a": "é", "b": "1\n2"}])


def test_a_mark_within_a_file_is_none_of_its_text(tmp_path):
    assert read(tmp_path / "a.jsonl", '\ufeff{"a": 1}\n\ufeff{"a": 2}\n') == [{"a": 1}, {"a": 2}]


def test_utf16_without_a_mark_is_named(tmp_path):
    for encoding in ("utf-16-le", "utf-16-be"):
        with pytest.raises(UserError, match="it looks like UTF-16 without a byte order mark"):
            read(tmp_path / "a.txt", "a text", encoding=encoding)

    with pytest.raises(UserError, match="not UTF-16, as its first bytes say"):
        read(tmp_path / "a.txt", b"\xff\xfea\0b\0\0\xd8")


def test_only_line_ends_end_lines(tmp_path):
    text = "one\u2028two\u0085three\u2029\x0b\x0c\x1c"
    line = json.dumps({"a": text}, ensure_ascii=False).replace("\\u001c", "\\u001c")
    for name in ("a.jsonl", "a.json"):
        assert read(tmp_path / name, f"{line}\n{line}\n") == [{"a": text}] * 2

    assert read(tmp_path / "a.csv", "a\none\u2028two\u0085\n") == [{"a": "one\u2028two\u0085"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_line_ends_inside_values_become_one(tmp_path, name):
    row = json.dumps({"a": ["x\r\ny\rz", {"b": "\r"}], "c": "\\r"})
    rows = read(tmp_path / name, f"[{row}]" if name == "a.json" else row)
    assert rows == [{"a": ["x\ny\nz", {"b": "\n"}], "c": "\\r"}]


def test_bytes_that_are_no_text_spoil_their_line_alone(tmp_path):
    said = "not UTF-8 (invalid start byte at byte 0)"
    assert read(tmp_path / "a.txt", b"one\n\xff\ntwo") == ["one", (2, said), "two"]
    assert read(tmp_path / "a.jsonl", b'{"a": 1}\n\xff\n{"a": 2}') == [
        {"a": 1},
        (2, said),
        {"a": 2},
    ]
    assert read(tmp_path / "a.csv", b"a\nx\n\xff\ny\n") == [{"a": "x"}, (3, said), {"a": "y"}]

    with pytest.raises(UserError, match=r"a.json:2: not UTF-8"):
        read(tmp_path / "a.json", b'[1,\n"\xff"]')


# --- JSON ---


@pytest.mark.parametrize("half", ["\\ud83d end", "\\udc00", "\\ud83d\\u0041", "\\uD800"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_of_a_surrogate_pair_spoils_its_row_alone(tmp_path, name, half):
    rows = ['{"a": "\\ud83d\\ude00"}', f'{{"a": ["{half}"]}}', f'{{"{half}": 1}}']
    content = "\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]".replace(", ", ",\n")
    cause = "half of a surrogate pair, which is no character"
    assert read(tmp_path / name, content) == [{"a": "\N{GRINNING FACE}"}, (2, cause), (3, cause)]


def test_a_line_that_is_no_json_is_passed_over(tmp_path):
    deep = "[" * 100_000
    found = read(tmp_path / "a.jsonl", f'{{"a": 1}}\n{{"a": \n{deep}\n{{"a": "\0"}}\n{{"a": 2}}\n')
    assert found[0] == {"a": 1}
    assert [item[0] for item in found[1:4]] == [2, 3, 4]
    assert found[4] == {"a": 2}
    tally = Tally()
    (tmp_path / "b.jsonl").write_text('{"instruction": \n{"instruction": "a", "output": "b"}\n')
    assert (
        len(list(import_dialogs(tmp_path / "b.jsonl", ReadOptions(malformed="skip"), tally=tally)))
        == 1
    )
    assert tally.line().startswith("read 2, kept 1, left out 1: malformed 1")

    with pytest.raises(
        UserError,
        match=r"b.jsonl:1: not valid JSON .* mend the line, or import with malformed: skip",
    ):
        list(import_dialogs(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("depth", [300, 900])
def test_an_element_that_is_nested_too_deeply_spoils_itself_alone(tmp_path, depth):
    for deep in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        assert read(tmp_path / "a.json", f'[{{"a": 1}},\n{{"a": {deep}}},\n{{"a": 2}}]') == [
            {"a": 1},
            (2, "nested more than 200 levels deep"),
            {"a": 2},
        ]


@pytest.mark.parametrize(
    ("content", "cause"),
    [('[\n{"a": 1}\n]', "name the file .json"), ('[{"a": 1}]', "name the file .json")],
)
def test_a_list_under_the_name_of_json_lines_is_named(tmp_path, content, cause):
    (tmp_path / "a.jsonl").write_text(content)
    bad = next(row for rows in read_tables(tmp_path / "a.jsonl") for row in rows)
    assert isinstance(bad, BadRow)
    assert bad.cure == cause


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (
            '{"instruction": ["a", "b"], "output": ["c", "d"]}',
            [{"instruction": "a", "output": "c"}, {"instruction": "b", "output": "d"}],
        ),
        (
            '{"text": {"0": "a", "1": "b"}, "id": {"0": 1, "1": 2}}',
            [{"text": "a", "id": 1}, {"text": "b", "id": 2}],
        ),
        (
            '{"messages": [[{"role": "user"}], []]}',
            [{"messages": [{"role": "user"}]}, {"messages": []}],
        ),
        ('{"messages": [{"role": "user"}]}', [{"messages": [{"role": "user"}]}]),
        (
            '{"prompt": [{"role": "user"}], "chosen": [{}], "rejected": [{}]}',
            [{"prompt": [{"role": "user"}], "chosen": [{}], "rejected": [{}]}],
        ),
        (
            '{"instructions": ["a", "b"], "tags": ["x"]}',
            [{"instructions": ["a", "b"], "tags": ["x"]}],
        ),
        ('{"theft": {"cars": ["a"]}}', [{"theft": {"cars": ["a"]}}]),
        ('{"a": 1,\n "b": 2}', [{"a": 1, "b": 2}]),
        ('["a", "b"]', ["a", "b"]),
        ("\n[\n]\n", None),
        ("[]", None),
    ],
)
def test_json_of_every_shape(tmp_path, content, rows):
    if rows is None:
        with pytest.raises(UserError, match=r"a.json: the file is empty"):
            read(tmp_path / "a.json", content)
    else:
        assert read(tmp_path / "a.json", content) == rows


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (
            '{"data": [{"a": 1}], "version": 1}',
            r"a.json:1: the records lie below 'data'; keep that list alone \(jq .data\)",
        ),
        ("[1, 2]\n[3]", "a.json:2: there is text behind the JSON list"),
        ("[1, 2,]", "a.json:1: not valid JSON"),
        ('{"a": 1,\n"b"\n}', r"a.json:3: not valid JSON \(Expecting ':' delimiter at column 1\)"),
        ("[" * 100_000, "a.json:1: not valid JSON"),
    ],
)
def test_json_that_is_refused(tmp_path, content, cause):
    with pytest.raises(UserError, match=cause):
        read(tmp_path / "a.json", content)


def test_json_lines_with_a_bad_first_line_under_the_name_of_json(tmp_path):
    found = read(tmp_path / "a.json", '{"a": \n{"a": 1}\n{"a": 2}\n')
    assert found[0][0] == 1
    assert found[1:] == [{"a": 1}, {"a": 2}]


# --- tables ---


def test_an_open_quote_is_found_where_it_opens_and_swallows_nothing(tmp_path):
    said = "a quote is opened here and never closed"
    good = [{"a": f"x{number}", "b": 'say ""'} for number in range(3)]
    lines = [f'x{number},"say """""' for number in range(3)]
    assert read(tmp_path / "a.csv", "a,b\n" + lines[0] + '\ny,"open\n' + "u,v\n" * 3)[1] == (
        3,
        said,
    )
    assert read(tmp_path / "a.csv", 'a,b\n"1\n2","open\nu,v\n')[:1] == [(3, said)]
    assert read(tmp_path / "a.csv", "a,b\n" + "\n".join(lines)) == good
    assert read(tmp_path / "a.csv", 'a,b\nu,"open\n' + "\n".join(lines))[1:] == good
    assert read(tmp_path / "a.csv", 'a,b\n5" screen,x\n') == [{"a": '5" screen', "b": "x"}]
    assert read(tmp_path / "a.csv", 'a,b\nu,"x"y\nu,v\n')[0][1].startswith(
        "a quoted cell goes on behind its quote"
    )


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("a,b,a\n1,2,3\n", "a.csv:1: two columns are called 'a'"),
        ("a;b\n1;2\n", "the cells are separated by semicolons, not by commas; save it with commas"),
        ("a\tb\n1\t2\n", "the cells are separated by tabs, not by commas; name the file .tsv"),
        ('a,"b\n1,2\n', "a.csv:1: a quote is opened here and never closed"),
        ("a,b\n", "a.csv: the file is empty"),
    ],
)
def test_a_table_that_is_refused(tmp_path, content, cause):
    with pytest.raises(UserError, match=cause):
        read(tmp_path / "a.csv", content)


def test_rows_of_another_length_than_the_header_are_bad(tmp_path):
    assert read(tmp_path / "a.csv", " a ,b,\n1,2,3\n\n1,2\n1,2,3,4\n") == [
        {"a": "1", "b": "2", "column 3": "3"},
        (4, "this row has fewer cells than the header (2, not 3)"),
        (5, "this row has more cells than the header (4, not 3)"),
    ]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (
            "instruction\tinput\toutput\nAdd.\t2\t5\n",
            [{"instruction": "Add.", "input": "2", "output": "5"}],
        ),
        ('id\tText\n1\t"a ""b""\tc"\n', [{"id": "1", "Text": 'a "b"\tc'}]),
        ("text\none\n", [{"text": "one"}]),
        ('What is tea?\t"A" drink\tIt is.\n', [["What is tea?", '"A" drink', "It is."]]),
        ("source\tWhat is it?\n", [["source", "What is it?"]]),
    ],
)
def test_a_tsv_with_and_without_a_header(tmp_path, content, rows):
    assert read(tmp_path / "a.tsv", content) == rows


def test_parquet_gives_whole_numbers_back(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table({"label": [1.0, math.nan, 0.5], "text": ["a\r\nb", None, "c"]}),
        tmp_path / "a.parquet",
    )
    rows = [row.value for rows in read_tables(tmp_path / "a.parquet") for row in rows]
    assert rows == [
        {"label": 1, "text": "a\nb"},
        {"label": None, "text": None},
        {"label": 0.5, "text": "c"},
    ]
    assert type(rows[0]["label"]) is int


def test_parquet_with_a_text_that_is_none_spoils_its_row_alone(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    first, bad, last = (row for rows in read_tables(tmp_path / "a.parquet") for row in rows)
    assert (first.value, last.value) == ({"text": "a"}, {"text": "c"})
    assert bad.where == f"{tmp_path}/a.parquet:2"


def test_damaged_and_empty_parquet_is_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"text {number}" for number in range(3000)]}), path)
    whole = path.read_bytes()

    for broken in (whole[:-20], whole[:500] + b"\xff" * 200 + whole[700:], b"PAR1"):
        with pytest.raises(
            UserError, match=r"a.parquet:\d+: truncated or corrupt Parquet file .*; fetch"
        ) as error:
            read(path, broken)

        assert "\n" not in str(error.value)

    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(UserError, match="the file is empty"):
        list(read_tables(path))


def test_what_tables_of_text_write_for_nothing_is_nothing(tmp_path):
    assert read(tmp_path / "a.csv", "a,b\nNaN,x\n<NA>,None\n") == [
        {"a": "", "b": "x"},
        {"a": "", "b": "None"},
    ]
    assert read(tmp_path / "a.tsv", "question\tanswer\nx\tNULL\n") == [
        {"question": "x", "answer": ""}
    ]


def test_the_line_in_which_excel_names_the_comma_is_no_header(tmp_path):
    assert read(tmp_path / "a.csv", "sep=,\r\na,b\r\n1,2\r\n") == [{"a": "1", "b": "2"}]
    with pytest.raises(UserError, match="the cells are separated by semicolons, not by commas"):
        read(tmp_path / "a.csv", "sep=;\r\na;b\r\n1;2\r\n")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(b"{}"), "gzip data"),
        (lzma.compress(b"{}"), "xz data"),
        (b"PAR1\x15\0\x15\0", "Parquet data"),
        (b"PK\x03\x04\0\0\0\0", "a zip archive"),
    ],
)
def test_a_packed_file_with_the_name_of_text_is_told_apart(tmp_path, content, what):
    for name in ("a.jsonl", "a.csv", "a.json"):
        with pytest.raises(
            UserError, match=f"{name}: holds {what}, not text; give the file the ending"
        ):
            read(tmp_path / name, content)


def test_a_key_that_stands_twice_is_no_choice_of_ours(tmp_path):
    good = '{"a" :"x\\": y", "b": [{"a": 1}, {"a": 2}], "c": {"a": 3}}'
    value = {"a": 'x": y', "b": [{"a": 1}, {"a": 2}], "c": {"a": 3}}
    for bad in ('{"a": 1, "a": 1}', '{"b": [{"a":1, "x": {"a": 2}, "a" :3}]}'):
        cause = "the key 'a' stands twice in a mapping"
        assert read(tmp_path / "a.jsonl", f"{good}\n{bad}\n{good}\n") == [value, (2, cause), value]
        assert read(tmp_path / "a.json", f"[{good},\n{bad}]") == [value, (2, cause)]

        with pytest.raises(UserError, match=f"a.json:1: {cause}"):
            read(tmp_path / "a.json", bad)


def test_a_changed_byte_in_a_parquet_page_with_a_checksum_is_noticed(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"text": ["the old mill"]}),
        path,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    assert [row.value for rows in read_tables(path) for row in rows] == [{"text": "the old mill"}]
    path.write_bytes(path.read_bytes().replace(b"the old mill", b"the new mill"))

    with pytest.raises(
        UserError, match=r"a\.parquet:1: truncated or corrupt Parquet file .*; fetch it again"
    ):
        [row for rows in read_tables(path) for row in rows]
