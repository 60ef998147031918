"""Reading documents: every format, and every way in which a file can be wrong."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from llama2.data.documents import read_documents
from llama2.errors import UserError
from llama2.reading.files import find_files
from llama2.reading.rows import read_lines
from llama2.records import Document, read, write


def texts(path: object, **options: object) -> list[str]:
    return [document.text for document in read_documents(path, **options)]  # type: ignore[arg-type]


def test_text_files_by_file_paragraph_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\none\n  two\n\n\nthree\n\n", "utf-8")
    assert texts(tmp_path / "a.txt") == ["one\n  two\n\n\nthree"]
    assert texts(tmp_path / "a.txt", split="paragraph") == ["one\n  two", "three"]
    assert texts(tmp_path / "a.txt", split="line") == ["one", "  two", "three"]
    ids = [document.id for document in read_documents(tmp_path / "a.txt", split="paragraph")]
    assert ids == [f"{tmp_path}/a.txt:2", f"{tmp_path}/a.txt:6"]


ROWS = [
    {"text": "one", "id": "x", "url": "u"},
    {"text": "two"},
    {"text": "", "metadata": {"a": 1}, "id": 7},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    content = "\n".join(json.dumps(row) for row in ROWS).encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(
        path.suffix, bytes
    )
    path.write_bytes(
        packed(content[:40]) + packed(content[40:]) if path.suffix in (".gz", ".zst") else content
    )
    assert list(read_documents(path)) == [
        Document("one", "x", {"url": "u"}),
        Document("two", f"{path}:2"),
        Document("", "7", {"a": 1}),
    ]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"text": ["one", "two"], "id": ["x", None], "n": [1, 2]}), path
    )
    assert list(read_documents(path)) == [
        Document("one", "x", {"n": 1}),
        Document("two", f"{path}:2", {"n": 2}),
    ]
    parquet.write_table(pyarrow.table({"content": ["one"]}), path)

    with pytest.raises(UserError, match=r"a.parquet:1: no 'text' among \['content'\]"):
        texts(path)

    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"truncated or corrupt Parquet"):
        texts(path)


def test_folders_globs_and_lists(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.bin").write_text("c")
    assert texts(tmp_path) == ["a", "b"]
    assert texts(f"{tmp_path}/**/*.md") == ["b"]
    assert texts([tmp_path / "deep", tmp_path / "a.txt"]) == ["b", "a"]


BAD = {
    "not_json.jsonl": (b'{"text": "a"}\n{"text"', r"not_json.jsonl:2: not valid JSON"),
    "list.jsonl": (b"[1]", r"list.jsonl:1: a list, not a JSON object"),
    "no_text.jsonl": (b'\n{"content": "a"}', r"no_text.jsonl:2: no 'text' among \['content'\]"),
    "null.jsonl": (b'{"text": null}', r"null.jsonl:1: 'text' is null"),
    "number.jsonl": (b'{"text": 3}', r"number.jsonl:1: 'text' is a int"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}', r"surrogate.jsonl:1: half of a surrogate pair"),
    "latin.txt": ("ok\nété".encode("latin-1"), r"latin.txt:2: not UTF-8"),
    "empty.txt": (b"", "the file is empty; it should hold documents"),
    "blank.jsonl": (b"\n \n", "the file is empty"),
    "short.jsonl.gz": (gzip.compress(b'{"text": "a"}' * 9)[:-4], "truncated or corrupt archive"),
    "broken.jsonl.gz": (b"no gzip at all", "truncated or corrupt archive"),
    "short.jsonl.zst": (
        zstandard.ZstdCompressor().compress(b'{"text": "abc"}\n' * 99)[:-4],
        "truncated or corrupt",
    ),
    "broken.jsonl.zst": (b"no archive at all", "truncated or corrupt archive"),
    "picture.png": (b"x", "cannot tell what kind of file this is"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path: Path, name: str) -> None:
    content, cause = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=cause):
        texts(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("missing.jsonl", "no such file"),
        ("*.jsonl", "no file matches this pattern"),
        (".", "no file of a known kind"),
    ],
)
def test_paths_that_name_nothing(tmp_path: Path, path: str, cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        texts(tmp_path / path)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_written_records_read_back(tmp_path: Path, suffix: str) -> None:
    path, documents = tmp_path / f"a{suffix}", [Document("one", "x", {"n": 1}), Document("été")]
    assert write(path, documents) == 2
    assert list(read(Document, path)) == documents
    assert (path.read_bytes()[:1] == b"{") == (suffix == ".jsonl")


@pytest.mark.parametrize(
    ("name", "library"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")]
)
def test_without_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        UserError, match=rf"needs the package '{library}'.*pip install 'llama2\[data\]'"
    ):
        texts(tmp_path / name)


def test_large_zst_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    written = [json.dumps({"text": str(number) * 50}) for number in range(20_000)]
    path.write_bytes(zstandard.ZstdCompressor().compress("\n".join(written).encode()))
    assert [line for _, line, _ in read_lines(find_files(path)[0])] == written
