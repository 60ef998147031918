"""What has its name is on the disk, content first, its directory's list of names afterwards."""

import errno
import os
from pathlib import Path

import pytest
import torch

from llama2 import atomic, records
from llama2.data.shards import write_shards
from llama2.errors import UserError
from llama2.formats import binary, checkpoint, gguf, hf, meta
from llama2.records import Document

FSYNC = os.fsync


class Disk:
    """Remembers what was flushed, and what got a name before it was."""

    def __init__(self, monkeypatch):
        self.flushed, self.named, self.early = set(), {}, []
        monkeypatch.setattr(os, "fsync", self.flush)
        for name in ("replace", "rename"):
            move = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda old, new, move=move: self.name(move, Path(old), Path(new))
            )

    @staticmethod
    def mark(status):
        return status.st_ino, status.st_size, status.st_mtime_ns

    def flush(self, descriptor):
        FSYNC(descriptor)
        status = os.fstat(descriptor)
        self.flushed.add(self.mark(status))
        here = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.named = {path: seen or path.parent == here for path, seen in self.named.items()}

    def name(self, move, old, new):
        inside = [path for path in ([old] if old.is_file() else old.rglob("*")) if path.is_file()]
        self.early += [path for path in inside if self.mark(path.stat()) not in self.flushed]
        move(old, new)
        self.named[new] = False

    def lost_by_a_power_cut(self, place):
        """Files whose content, or whose name, is not on the disk."""
        files = [path for path in [place, *place.rglob("*")] if path.is_file()]
        assert files
        return [
            *self.early,
            *(path for path, seen in self.named.items() if not seen and path.exists()),
            *(path for path in files if self.mark(path.stat()) not in self.flushed),
        ]


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def documents():
    return [Document("one two three"), Document("four")]


WRITERS = {
    "write_atomic": lambda out, base, tokenizer: atomic.write_atomic(out / "a/b.txt", "text"),
    "records": lambda out, base, tokenizer: records.write(out / "d.jsonl", documents()),
    "packed records": lambda out, base, tokenizer: records.write(out / "d.jsonl.gz", documents()),
    "tokenizer": lambda out, base, tokenizer: tokenizer.save(out / "t"),
    "shards": lambda out, base, tokenizer: write_shards(
        documents(), tokenizer, out / "s", shard_tokens=3
    ),
    "a checkpoint": lambda out, base, tokenizer: checkpoint.save(
        checkpoint.load(base), out / "m", shard_bytes=9000
    ),
    "a checkpoint over another": lambda out, base, tokenizer: [
        checkpoint.save(checkpoint.load(base), out / "m", shard_bytes=size)
        for size in (9000, 1 << 30)
    ],
    "meta": lambda out, base, tokenizer: meta.write(
        hf.read(base), out / "meta", dtype=torch.float32, shards=1
    ),
    "one file": lambda out, base, tokenizer: _one_file(out / "x/file.bin"),
    "gguf": lambda out, base, tokenizer: gguf.write(hf.read(base), out / "m.gguf", precision="f16"),
}


def _one_file(path):
    with binary.replace_file(path) as file:
        file.write(b"content")


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_writer_leaves_survives_a_power_cut(tmp_path, base, tokenizer, disk, writer):
    (tmp_path / "out").mkdir()
    if writer == "gguf":
        pytest.importorskip("gguf")

    WRITERS[writer](tmp_path / "out", base, tokenizer)
    assert disk.lost_by_a_power_cut(tmp_path / "out") == []


def test_the_judge_of_these_tests_sees_a_rename_that_comes_too_early(tmp_path, disk):
    (tmp_path / "a.tmp").write_text("text")
    os.replace(tmp_path / "a.tmp", tmp_path / "a")
    assert disk.lost_by_a_power_cut(tmp_path) == [
        tmp_path / "a.tmp",
        tmp_path / "a",
        tmp_path / "a",
    ]


def test_new_directories_are_on_the_disk_too(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(atomic, "flush", seen.append)
    atomic.make(tmp_path / "a/b")
    assert seen == [tmp_path / "a", tmp_path]
    atomic.make(tmp_path / "a/b")
    assert len(seen) == 2


def test_what_is_no_character_is_written_by_its_number(tmp_path):
    atomic.write_atomic(tmp_path / "file", "\u00e9 \ud800 of \udcff")
    assert (tmp_path / "file").read_text("utf-8") == "\u00e9 \\ud800 of \\udcff"


def test_a_file_system_that_flushes_no_directories_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

        FSYNC(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    atomic.write_atomic(tmp_path / "new/file", "text")
    assert (tmp_path / "new/file").read_text() == "text"

    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(UserError, match="file: input/output error"):
        atomic.write_atomic(tmp_path / "new/file", "more")

    assert (tmp_path / "new/file").read_text() == "text"


def test_a_pipe_and_a_broken_link_are_passed_over(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    atomic.flush_tree(tmp_path)


def test_what_gets_no_name_leaves_nothing(tmp_path, monkeypatch):
    """A full disk has room for what is tried next, and a run that goes on later holds no
    remains."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: atomic.write_atomic(tmp_path / "a.json", "{}"),
        lambda: records.write(tmp_path / "b.jsonl", documents()),
    ):
        with pytest.raises(UserError, match="no space left"):
            write()

    assert list(tmp_path.iterdir()) == []


def test_a_directory_takes_the_place_of_an_older_one_whole_or_not_at_all(tmp_path, disk):
    place = tmp_path / "place"
    for text in ("first", "second"):
        with atomic.new_directory(place) as work:
            (work / "deep").mkdir()
            (work / "deep" / text).write_text(text)

        assert [path.name for path in place.rglob("*") if path.is_file()] == [text]
        assert not disk.lost_by_a_power_cut(place)

    def interrupted():
        with atomic.new_directory(place) as work:
            (work / "third").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert [path.name for path in tmp_path.rglob("*")] == ["place", "deep", "second"]


def test_a_file_that_is_not_finished_leaves_the_older_one(tmp_path):
    atomic.write_atomic(tmp_path / "file", "old")

    def interrupted():
        with atomic.new_file(tmp_path / "file") as work:
            work.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
