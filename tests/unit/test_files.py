"""What a path of data stands for: folders, globs, links, archives, and what is left out of them
aloud."""

import bz2
import gzip
import json
import lzma
import os
import zipfile
from pathlib import Path

import pytest

from llama2 import records
from llama2.data.documents import read_documents
from llama2.errors import UserError
from llama2.importers.dialogs import import_dialogs
from llama2.reading import files
from llama2.records import Dialog
from llama2.tally import Tally

LINE = (
    json.dumps(
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello."},
            ]
        }
    )
    + "\n"
)


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(LINE)

    return folder


def found(path, use="rows"):
    tally = Tally()
    return [
        file.label.removeprefix(f"{path}/") for file in files.find_files(path, use, tally)
    ], dict(tally.files)


def test_a_folder_is_searched_in_order_whatever_the_case_of_its_endings(tmp_path):
    fill(tmp_path, "b/c.ndjson", "b.JSONL", "a.Json", "z.jsonl.GZ", "q.TXT")
    assert found(tmp_path) == (["a.Json", "b/c.ndjson", "b.JSONL", "q.TXT", "z.jsonl.GZ"], {})


def test_what_is_no_data_is_left_out_and_counted(tmp_path):
    fill(
        tmp_path,
        "a.jsonl",
        ".hidden.jsonl",
        "._a.jsonl",
        ".ipynb_checkpoints/a.jsonl",
        "__MACOSX/a.jsonl",
        "README.txt",
        "readme_zh.md",
        "LICENSE",
        "dataset_infos.json",
        "picture.png",
        "other.PNG",
        "deep/README.txt",
        "x.tar.gz",
    )
    os.symlink(tmp_path / "nowhere", tmp_path / "broken.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert found(tmp_path) == (
        ["a.jsonl"],
        {
            "hidden": 4,
            "README.txt": 2,
            "readme_zh.md": 1,
            "LICENSE": 1,
            "dataset_infos.json": 1,
            "of another kind (.png)": 2,
            "tar archive (x.tar.gz)": 1,
            "broken link": 1,
            "no regular file": 1,
        },
    )


def test_an_archive_that_is_not_read_says_so(tmp_path):
    fill(tmp_path, "x.tar.gz", "y.tgz")
    for name in ("x.tar.gz", "y.tgz"):
        with pytest.raises(UserError, match=f"{name}: a tar archive, which is not read; unpack it"):
            files.find_files(tmp_path / name)

    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("inner.zip", b"")

    with pytest.raises(
        UserError, match=r"only archive inside an archive \(inner.zip\); unpack the archives inside"
    ):
        files.find_files(tmp_path / "outer.zip")


def test_the_parts_of_a_set_that_are_read_together_are_said(tmp_path):
    fill(
        tmp_path,
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/my_test.jsonl.gz",
    )
    tally = Tally()
    files.find_files(tmp_path, tally=tally)
    assert tally.line() == "read 0, kept 0; splits read alike: train 2, test 1"
    tally = Tally()
    files.find_files(tmp_path / "data" / "train*", tally=tally)
    assert tally.notes == {}


def test_data_that_is_named_like_a_notice_is_read(tmp_path):
    fill(tmp_path, "license_questions.jsonl", "authors.jsonl", "readme.jsonl")
    assert len(found(tmp_path)[0]) == 3
    fill(tmp_path, "README.txt")
    assert [file.kind for file in files.find_files(tmp_path / "README.txt")] == [".txt"]


def test_links_are_followed_once(tmp_path):
    fill(tmp_path, "disk/x.jsonl", "data/a.jsonl")
    os.symlink(tmp_path / "disk", tmp_path / "data/linked")
    os.symlink(tmp_path / "disk", tmp_path / "data/linked again")
    os.symlink(tmp_path / "data", tmp_path / "data/circle")
    os.symlink(tmp_path, tmp_path / "data/up")
    os.symlink(tmp_path / "data/self", tmp_path / "data/self")
    os.symlink(tmp_path / "data/a.jsonl", tmp_path / "data/b.jsonl")
    assert found(tmp_path / "data") == (
        ["a.jsonl", "linked/x.jsonl"],
        {"reached twice": 1, "folder reached twice": 3, "broken link": 1},
    )


def test_a_folder_of_links_alone_is_full(tmp_path):
    fill(tmp_path, "disk/x.jsonl")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "data/linked")
    assert found(tmp_path / "data")[0] == ["linked/x.jsonl"]


def test_globs_match_files_and_folders_each_once(tmp_path):
    fill(tmp_path, "a/x.jsonl", "a/README.txt", "b/y.jsonl", "c.jsonl")
    assert [file.label for file in files.find_files(tmp_path / "[ab]", tally=Tally())] == [
        f"{tmp_path}/a/x.jsonl",
        f"{tmp_path}/b/y.jsonl",
    ]
    assert len(files.find_files(f"{tmp_path}/**", tally=Tally())) == 3

    with pytest.raises(UserError, match=r"\*.csv: no file matches this pattern"):
        files.find_files(tmp_path / "*.csv")

    fill(tmp_path, "[1].jsonl")
    assert len(files.find_files(tmp_path / "[1].jsonl")) == 1


def test_home_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(fill(tmp_path, "a.jsonl")))
    assert len(list(records.read(Dialog, "~/a.jsonl"))) == 1
    with pytest.raises(UserError, match="there is no such home directory"):
        files.find_files("~nobody-of-this-name/a.jsonl")


def test_what_is_held_out_of_a_run_is_left_out_of_its_folder(tmp_path):
    fill(
        tmp_path,
        "dialogs.jsonl",
        "heldout-dialogs.jsonl",
        "heldout/web.jsonl",
        "manifest.json",
        "config.yaml",
        "summary.json",
        "metrics.jsonl",
    )
    names, left = found(tmp_path)
    assert names == ["dialogs.jsonl"]
    assert left["held out"] == 2


@pytest.mark.parametrize(
    "read",
    [
        lambda path, tally: import_dialogs(path, tally=tally),
        lambda path, tally: records.read(Dialog, path, tally=tally),
    ],
)
def test_an_empty_file_is_named_and_in_a_folder_counted(tmp_path, read):
    fill(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n \n")
    tally = Tally()
    assert len(list(read(tmp_path, tally))) == 1
    assert dict(tally.files) == {"empty": 1}

    with pytest.raises(UserError, match=r"b.jsonl: the file is empty; it should hold"):
        list(read(tmp_path / "b.jsonl", Tally()))

    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="all 2 files are empty"):
        list(read(tmp_path, Tally()))


def test_what_nobody_counts_is_said(tmp_path, capsys):
    fill(tmp_path, "a.jsonl", "README.md")
    list(records.read(Dialog, tmp_path))
    assert capsys.readouterr().err == f"{tmp_path}: files left out 1: README.md 1\n"


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("packing", [*PACK, "zst"])
def test_packed_files_and_members_of_archives(tmp_path, packing):
    pack = PACK.get(packing) or pytest.importorskip("zstandard").ZstdCompressor().compress
    packed, name = pack(LINE.encode()) + pack(LINE.encode()), f"a.jsonl.{packing}"
    (tmp_path / name).write_bytes(packed)

    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr(f"deep/{name}", packed)

    for path in (tmp_path / name, tmp_path / "z.zip"):
        assert len(list(import_dialogs(path))) == len(list(records.read(Dialog, path))) == 2

    (tmp_path / name).write_bytes(packed[:-9])
    with pytest.raises(UserError, match=rf"a.jsonl.{packing}:\d: truncated or corrupt archive"):
        list(import_dialogs(tmp_path / name))


def test_archives_hold_tables_of_every_kind_and_say_what_they_leave_out(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(LINE)]), tmp_path / "b.parquet")
    with zipfile.ZipFile(tmp_path / "Z.ZIP", "w") as archive:
        archive.writestr("deep/", "")
        archive.writestr("deep/a.jsonl", LINE)
        archive.write(tmp_path / "b.parquet", "b.parquet")
        archive.writestr("__MACOSX/deep/._a.jsonl", LINE)
        archive.writestr("README.md", LINE)
        archive.writestr("inner.zip", LINE)

    tally = Tally()
    assert len(list(import_dialogs(tmp_path / "Z.ZIP", tally=tally))) == 2
    assert (
        tally.left_out()
        == "files left out 3: README.md 1, hidden 1, archive inside an archive (inner.zip) 1"
    )

    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass

    with pytest.raises(UserError, match=r"empty.zip: there is no file of a known kind"):
        list(import_dialogs(tmp_path / "empty.zip"))


def test_an_encrypted_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", LINE)

    content = bytearray((tmp_path / "a.zip").read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + flags] |= 1

    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(
        UserError, match=r"a.zip!a.jsonl: is encrypted; unpack the archive with its password"
    ):
        list(import_dialogs(tmp_path / "a.zip"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.zip", "a.txt"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(
            UserError, match=rf"{name}: a pointer of Git LFS, .*; fetch it: git lfs pull"
        ):
            list(read_documents(path))


def test_names_that_are_no_text_do_not_spoil_records(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    try:
        (tmp_path / name).write_text("A text.")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")

    (document,) = read_documents(tmp_path)
    assert document.id == f"{tmp_path}/caf\ufffd.txt"
    records.write(tmp_path / "out.jsonl", [document])


def test_a_file_that_holds_other_records_names_the_command_that_makes_ours(tmp_path):
    (tmp_path / "chats.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    with pytest.raises(
        UserError,
        match=r"chats.json:1: messages: Field required; .* `llama2 prepare --kind dialogs "
        r"--sources.NAME.path .*chats.json --out DIR`",
    ):
        list(records.read(Dialog, tmp_path / "chats.json"))


def test_records_may_lie_in_a_file_of_any_name(tmp_path):
    for name in ("chat", "chat.txt", "chat.jsonl.bak"):
        fill(tmp_path, name)
        assert len(list(records.read(Dialog, Path(tmp_path / name)))) == 1
