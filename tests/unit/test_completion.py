"""Finished runs vouch for what they hold: a changed file is named before it is used, a faithful
copy is not."""

import json
import os
import shutil
from pathlib import Path

import pytest

from llama2 import runs
from llama2.atomic import write_atomic
from llama2.config import StageConfig
from llama2.errors import UserError
from llama2.runs import completion

SIZE = 1000


class Make(StageConfig):
    pass


class Use(StageConfig):
    data: Path


def make(out):
    with runs.open_run("make", Make(out=out)) as run:
        if not run.finished:
            write_atomic(run.path / "pool.jsonl", "x" * SIZE)
            write_atomic(run.path / "deep/shard.bin", "y" * SIZE)
            run.log(1, {"loss": 2.0})
            run.warn("be careful")

        return not run.finished


def use(data, out):
    with runs.open_run("use", Use(out=out, data=data)) as run:
        return run.finished


@pytest.fixture
def made(tmp_path):
    make(tmp_path / "made")
    return tmp_path / "made"


def flip(path, place=SIZE // 2):
    """One bit, as a disk does it: neither size nor time tells."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


DAMAGES = {
    "emptied": (lambda path: path.write_bytes(b""), r"it has 0 bytes, and this run wrote"),
    "halved": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        r"and this run wrote",
    ),
    "edited": (
        lambda path: path.write_bytes(b"z" + path.read_bytes()[1:]),
        "its content is not what this run wrote",
    ),
    "flipped": (
        lambda path: flip(path, path.stat().st_size // 2),
        "its content is not what this run wrote",
    ),
    "deleted": (Path.unlink, "missing, though this run wrote it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["pool.jsonl", "deep/shard.bin"])
def test_a_damaged_output_is_named_before_it_is_used(tmp_path, made, name, damage):
    change, cause = DAMAGES[damage]
    change(made / name)
    with pytest.raises(UserError, match=cause) as error:
        use(made, tmp_path / "used")

    assert error.value.cause.startswith(f"{made / name}:")
    assert f"delete {made} and repeat the command that made it" in error.value.cure
    assert "copy it out, and name the copy" in error.value.cure
    assert not (tmp_path / "used").exists()

    with pytest.raises(UserError, match=cause):
        make(made)  # a finished step is not skipped either


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "metrics.jsonl", "warnings.json"])
def test_damage_to_what_a_run_says_about_itself_is_named(made, name, damage):
    DAMAGES[damage][0](made / name)
    with pytest.raises(UserError) as error:
        make(made)

    assert error.value.cause.startswith(f"{made / name}:")
    assert f"delete {made} and repeat" in error.value.cure


@pytest.mark.parametrize("damage", ["emptied", "halved", "edited", "flipped"])
def test_a_damaged_completion_mark_is_named_and_never_believed(tmp_path, made, damage):
    DAMAGES[damage][0](made / "COMPLETE")
    for work in (lambda: make(made), lambda: use(made / "pool.jsonl", tmp_path / "used")):
        with pytest.raises(UserError, match="COMPLETE:") as error:
            work()

        assert f"restore it, or delete {made}" in error.value.cure


def test_every_digit_of_the_completion_mark_counts(made):
    mark = made / "COMPLETE"
    mark.write_text(mark.read_text().replace('"seconds": 0', '"seconds": 9'))
    with pytest.raises(UserError, match="COMPLETE: damaged: its content does not fit its checksum"):
        make(made)


def test_a_copy_with_other_times_is_the_run_itself(tmp_path, made):
    shutil.copytree(made, tmp_path / "copy", copy_function=shutil.copyfile)
    assert (tmp_path / "copy/pool.jsonl").stat().st_mtime_ns != (
        made / "pool.jsonl"
    ).stat().st_mtime_ns
    assert runs.fingerprint(tmp_path / "copy") == runs.fingerprint(made)
    flip(tmp_path / "copy/pool.jsonl")

    with pytest.raises(UserError, match=r"copy/pool.jsonl: its content"):
        runs.fingerprint(tmp_path / "copy")


def test_a_file_copied_out_of_a_run_is_data_of_ones_own(tmp_path, made):
    mine = tmp_path / "mine.jsonl"
    mine.write_text((made / "pool.jsonl").read_text() + "more")
    assert not use(mine, tmp_path / "used")
    assert runs.read_fingerprint(made) == runs.fingerprint(made)


def test_only_what_is_read_must_be_whole(tmp_path, made):
    (made / "deep/shard.bin").write_text("")
    assert not use(made / "pool.jsonl", tmp_path / "used")


def test_a_file_added_among_the_outputs_is_named(tmp_path, made):
    (made / "notes.md").write_text("mine")  # nobody reads it
    assert runs.fingerprint(made)
    (made / "deep/more.bin").write_text("")

    with pytest.raises(
        UserError, match=r"more.bin: the run in .* did not write this file; take it out"
    ):
        use(made / "deep", tmp_path / "used")

    assert not make(made)  # what it wrote is all there


def test_a_file_put_into_a_run_is_known_by_its_content(tmp_path, made):
    (made / "mine.txt").write_text("one")
    use(made / "mine.txt", tmp_path / "used")
    (made / "mine.txt").write_text("two")

    with pytest.raises(UserError, match=r"made from other inputs; changed: data \(.*mine.txt\)"):
        use(made / "mine.txt", tmp_path / "used")


def test_what_lies_beside_a_run_is_none_of_it(tmp_path, made, monkeypatch):
    (tmp_path / "mine.txt").write_text("one")
    monkeypatch.chdir(made)
    assert completion.find_run(Path("../mine.txt")) is None
    assert completion.find_run(Path("../made/pool.jsonl")) == Path("../made")
    assert completion.find_run(Path("pool.jsonl")) == Path()
    assert not runs.is_output(Path("../mine.txt"))


def test_large_files_are_read_when_a_time_differs_or_it_is_asked_for(made, monkeypatch):
    monkeypatch.setattr(completion, "CHEAP", SIZE + 500)
    flip(made / "pool.jsonl")
    flip(made / "deep/shard.bin")
    assert len(list(completion.find_faults(made, completion.read_hashes(made)))) == 1
    assert len(list(completion.find_faults(made, completion.read_hashes(made), thorough=True))) == 2
    os.utime(made / "pool.jsonl")
    os.utime(made / "deep/shard.bin")
    assert len(list(completion.find_faults(made, completion.read_hashes(made)))) == 2


def test_a_large_copy_is_read_once(tmp_path, made, monkeypatch):
    monkeypatch.setattr(completion, "CHEAP", 0)
    for path in (made / "pool.jsonl", made / "deep/shard.bin", made / "manifest.json"):
        os.utime(path)

    read, hashed = [], completion.hash_file
    monkeypatch.setattr(
        completion, "hash_file", lambda path: (read.append(path.name), hashed(path))[1]
    )
    completion.check(made)
    assert sorted(read) == ["manifest.json", "pool.jsonl", "shard.bin"]
    completion.check(made)
    assert len(read) == 3
    os.utime(made / "pool.jsonl")
    completion.check(made)
    assert read[3:] == ["pool.jsonl"]


def test_runs_of_before_are_compared_by_content(made):
    said = json.loads((made / "COMPLETE").read_text())
    (made / "COMPLETE").write_text(json.dumps({"outputs": said["outputs"], "seconds": 1}))
    assert runs.fingerprint(made)
    flip(made / "pool.jsonl")

    with pytest.raises(UserError, match=r"pool.jsonl: its content is not"):
        runs.fingerprint(made)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("COMPLETE", "outputs", {"pool.jsonl": 7}),
        ("COMPLETE", "outputs", ["pool.jsonl"]),
        ("COMPLETE", "seconds", "1"),
        ("COMPLETE", "seconds", -1),
        ("COMPLETE", "seconds", float("inf")),
        ("COMPLETE", "records", None),
        ("COMPLETE", "files", {"pool.jsonl": [1]}),
        ("COMPLETE", "files", {"pool.jsonl": 1}),
        ("manifest.json", "config", []),
        ("manifest.json", "inputs", {"a": None}),
        ("manifest.json", "ranks", "2"),
        ("manifest.json", "threads", 0),
        ("manifest.json", "device", {}),
        ("manifest.json", "verb", None),
    ],
)
def test_runs_of_before_have_no_sum_and_are_held_to_their_shape(made, name, key, value):
    file = made / name
    said = json.loads(file.read_text())
    del said["sum"]
    said.pop("schema", None)
    file.write_text(json.dumps(said))
    read = {"COMPLETE": completion.read_mark, "manifest.json": completion.read_manifest}[name]
    assert read(made) == said
    file.write_text(json.dumps(said | {key: value}))

    with pytest.raises(UserError, match=rf"{name}: damaged: .*{key}"):
        read(made)


def test_every_file_and_directory_is_on_the_disk_before_the_completion_mark(tmp_path, monkeypatch):
    """Also those which a stage wrote without a thought."""
    events, flush = [], os.fsync

    def noted(descriptor):
        flush(descriptor)
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    replace = os.replace
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(
        os, "replace", lambda old, new: (replace(old, new), events.append(f"named {new}"))[0]
    )
    out = tmp_path / "new/out"

    with runs.open_run("make", Make(out=out)) as run:
        (run.path / "a/b").mkdir(parents=True)
        (run.path / "a/b/plain.txt").write_text("plain")
        run.log(1, {"loss": 1.0})

    end = events.index(f"named {out / 'COMPLETE'}")
    flushed = set(events[:end])
    assert {
        out / "a/b/plain.txt",
        out / "a/b",
        out / "a",
        out,
        out / "metrics.jsonl",
        out.parent,
        tmp_path,
    } <= flushed
    assert out in events[end:]  # the mark's own name


def test_the_command_line_names_a_damaged_model_before_it_talks(tmp_path, policy, one_line):
    shutil.copytree(policy, tmp_path / "model")
    flip(tmp_path / "model/tokenizer.model")
    refusal = one_line("chat", tmp_path / "model")
    assert refusal.startswith(
        f"{tmp_path / 'model/tokenizer.model'}: its content is not what this run wrote; "
    )


def test_a_copy_whose_times_are_whole_seconds_is_not_read(made, monkeypatch):
    monkeypatch.setattr(completion, "CHEAP", 0)
    shard = made / "deep/shard.bin"
    seconds = shard.stat().st_mtime_ns // 10**9 * 10**9
    shard.write_bytes(shard.read_bytes().replace(b"y", b"z"))  # its content would tell
    os.utime(shard, ns=(seconds, seconds))
    completion.check_whole(made)
    os.utime(shard, ns=(seconds + 1, seconds + 1))

    with pytest.raises(UserError, match="its content is not what this run wrote"):
        completion.check_whole(made)
