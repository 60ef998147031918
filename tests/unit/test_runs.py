"""Run directories: what is skipped, resumed and refused; a process killed anywhere leaves nothing
half done."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from commands import llama2

from llama2 import atomic, runs
from llama2.config import Config, StageConfig
from llama2.errors import UserError
from llama2.hashing import hash_file
from llama2.recipe.workers import preload
from llama2.runs import completion, fingerprints, manifest, sealed


class Part(Config):
    source: Path
    weight: float = 1.0


class Work(StageConfig):
    parts: dict[str, Part] = {}
    after: tuple[Path, ...] = ()
    size: int = 1


def config(tmp_path, size=1, **parts):
    return Work(
        out=tmp_path / "out",
        size=size,
        parts={name: Part(source=path) for name, path in parts.items()},
    )


def work(settings, content="done"):
    """A stage that writes one file; True if it had to."""
    with runs.open_run("work", settings) as run:
        if not run.finished:
            atomic.write_atomic(run.path / "result.txt", content)

        return not run.finished


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source.txt").write_text("one")
    return tmp_path / "source.txt"


def test_a_finished_run_is_not_repeated(tmp_path, source, capsys):
    settings = config(tmp_path, a=source)
    assert work(settings)
    before = files(tmp_path / "out")
    assert not work(settings, "again")
    assert files(tmp_path / "out") == before
    assert capsys.readouterr().err == f"{tmp_path / 'out'}: already finished, skipped\n"
    assert runs.is_finished("work", settings)


def test_the_manifest_says_what_was_asked_and_made_from_what(tmp_path, source):
    work(config(tmp_path, size=3, a=source))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["verb"] == "work"
    assert manifest["config"] == {
        "seed": 0,
        "parts": {"a": {"source": str(source), "weight": 1.0}},
        "after": [],
        "size": 3,
    }
    assert manifest["inputs"] == {"parts.a.source": hash_file(source)}
    assert manifest["code"] == runs.read_code_version()
    complete = json.loads((tmp_path / "out/COMPLETE").read_text())
    assert complete["outputs"] == {"result.txt": hash_file(tmp_path / "out/result.txt")}
    assert complete["seconds"] >= 0


def test_the_completion_mark_is_written_last(tmp_path, monkeypatch):
    written = []
    write = atomic.write_atomic
    monkeypatch.setattr(
        atomic, "write_atomic", lambda path, data: (written.append(path.name), write(path, data))
    )
    work(config(tmp_path))
    assert written == ["config.yaml", "manifest.json", "result.txt", "COMPLETE"]


def test_what_a_death_behind_the_completion_mark_left_is_taken_away(tmp_path):
    work(config(tmp_path))
    (tmp_path / "out/checkpoints/parts").mkdir(parents=True)
    (tmp_path / "out/checkpoints/parts/samples.jsonl").write_text("much")
    (tmp_path / "out/.seconds").write_text("3")
    before = (tmp_path / "out/COMPLETE").read_bytes()
    work(config(tmp_path))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "COMPLETE",
        ".lock",
        "config.yaml",
        "manifest.json",
        "result.txt",
    }
    assert (tmp_path / "out/COMPLETE").read_bytes() == before


def test_a_key_that_is_newer_than_a_run_had_its_default(tmp_path, source):
    with runs.open_run("work", config(tmp_path, a=source)):
        pass

    file = tmp_path / "out/manifest.json"
    values = sealed.unseal(file, "")
    assert values["config"].pop("size") == 1
    file.write_text(sealed.seal(values))

    runs.check("work", config(tmp_path, a=source))
    with pytest.raises(UserError, match="another configuration: size: 1 -> 2"):
        runs.check("work", config(tmp_path, a=source, size=2))


@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_or_input_is_refused_and_named(tmp_path, source, finished):
    settings = config(tmp_path, a=source)
    try:
        with runs.open_run("work", settings) as run:
            atomic.write_atomic(run.path / "result.txt", "half")
            if not finished:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass

    before, state = files(tmp_path / "out"), "a finished run" if finished else "an unfinished run"
    with pytest.raises(
        UserError, match=rf"holds {state} with another configuration: size: 1 -> 2; choose another"
    ):
        work(config(tmp_path, size=2, a=source))

    with pytest.raises(UserError, match=r"parts.b: None -> \{'source': .*\}"):
        work(config(tmp_path, a=source, b=source))

    with (
        pytest.raises(UserError, match="configuration: verb: work -> other; choose"),
        runs.open_run("other", settings),
    ):
        pass

    source.write_text("two")
    with pytest.raises(
        UserError,
        match=rf"{state} made from other inputs; changed: parts.a.source \(.*source.txt\)",
    ):
        work(settings)

    source.unlink()
    with pytest.raises(UserError, match=r"source.txt: no such file or directory"):
        work(settings)

    assert files(tmp_path / "out") == before
    source.write_text("one")
    assert work(settings) == (not finished)


class Page(StageConfig):
    around = frozenset({"recipe"})
    recipe: str
    data: tuple[Path, ...] = ()


def page(place, recipe=None):
    found = [place / name for name in ("one.txt", "*.txt", "more")]
    return Page(out=place / "page", recipe=str(recipe or place), data=tuple(found))


@pytest.fixture(params=[True, False])
def begun(tmp_path, request):
    """A run that was finished or not, and its inputs in one folder, which is moved afterwards."""
    here = tmp_path / "here"
    (here / "more").mkdir(parents=True)
    for name in ("one.txt", "two.txt", "more/three.txt"):
        (here / name).write_text(name)

    with suppress(KeyboardInterrupt), runs.open_run("work", page(here)) as run:
        atomic.write_atomic(run.path / "result.txt", "done")
        if not request.param:
            raise KeyboardInterrupt

    return here.rename(tmp_path / "there"), request.param


def test_a_run_that_was_moved_with_its_inputs_goes_on(begun, monkeypatch):
    place, finished = begun
    assert runs.is_finished("work", page(place)) == finished
    monkeypatch.chdir(place)
    assert work(page(Path("."))) == (not finished)


def test_an_input_that_changed_on_the_way_is_named(begun):
    place, _ = begun
    (place / "two.txt").write_text("2")
    with pytest.raises(
        UserError, match=r"made from other inputs; changed: data.1 \(.*there/\*.txt\)"
    ):
        work(page(place))


def test_a_file_that_is_called_otherwise_is_another_input(begun):
    place, _ = begun  # its ending tells how it is read, and sets are called after it
    settings = page(place).model_copy(
        update={"data": (place / "two.txt", place / "*.txt", place / "more")}
    )
    with pytest.raises(
        UserError, match=r"with another configuration: data.0: .*here/one.txt -> .*there/two.txt; "
    ):
        work(settings)


def test_what_lies_around_a_run_is_not_what_lies_elsewhere(begun, tmp_path):
    with pytest.raises(
        UserError, match=r"another configuration: recipe: .*/here -> .*/elsewhere; choose"
    ):
        work(page(begun[0], tmp_path / "elsewhere"))


def test_a_glob_of_an_earlier_version_is_the_same_input(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)

    settings = config(tmp_path, a=tmp_path / "*.txt")
    work(settings)
    file = tmp_path / "out/manifest.json"
    manifest = json.loads(file.read_text())
    earlier = {
        str(tmp_path / f"{name}.txt"): hash_file(tmp_path / f"{name}.txt") for name in ("a", "b")
    }
    manifest["inputs"] = {
        "parts.a.source": hashlib.sha256(json.dumps(earlier).encode()).hexdigest()
    }
    del manifest["sum"]
    file.write_text(json.dumps(manifest))
    (tmp_path / "out/COMPLETE").unlink()
    assert work(settings)
    (tmp_path / "a.txt").write_text("c")
    (tmp_path / "out/COMPLETE").unlink()

    with pytest.raises(UserError, match="made from other inputs"):
        work(settings)


def test_a_run_that_has_done_nothing_may_be_corrected(tmp_path, source, capsys):
    with (
        pytest.raises(UserError, match="bad data"),
        runs.open_run("work", config(tmp_path, a=source)),
    ):
        raise UserError("bad data")

    source.write_text("mended")
    assert work(config(tmp_path, size=5, a=source))
    assert json.loads((tmp_path / "out/manifest.json").read_text())["config"]["size"] == 5
    assert "resuming" not in capsys.readouterr().err


def fails(settings, made):
    """A stage that makes one thing, a directory or a file, and is then refused."""
    with (
        pytest.raises(UserError, match=r"bad data|is no run directory"),
        runs.open_run("work", settings) as run,
    ):
        _make(run.path / made)


def _make(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch() if path.suffix else path.mkdir()
    raise UserError("bad data")


def test_a_run_that_failed_before_it_did_anything_leaves_nothing(tmp_path, source):
    deep = config(tmp_path, a=source).model_copy(update={"out": tmp_path / "new/deep/out"})
    fails(deep, "empty/folder")
    assert not (tmp_path / "new").exists()
    (tmp_path / "out").mkdir()
    fails(config(tmp_path, a=source), "empty")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out/thesis.txt").write_text("years of work")
    fails(config(tmp_path, a=source), "empty")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    fails(deep, "half.txt")
    assert (tmp_path / "new/deep/out/half.txt").exists()
    assert (tmp_path / "new/deep/out/manifest.json").exists()


def test_an_interrupted_run_is_resumed_and_its_time_counted(tmp_path, capsys):
    def interrupted(settings):
        with runs.open_run("work", settings) as run:
            run.log(1, {"loss": 2.0})
            time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(config(tmp_path))

    assert not (tmp_path / "out/COMPLETE").exists()
    assert work(config(tmp_path))
    assert capsys.readouterr().err == f"{tmp_path / 'out'}: resuming\n"
    assert json.loads((tmp_path / "out/COMPLETE").read_text())["seconds"] >= 0.05
    assert not (tmp_path / "out/.seconds").exists()


def test_checkpoints_are_deleted_after_the_end_alone(tmp_path):
    with runs.open_run("work", config(tmp_path)) as run:
        (run.path / "checkpoints/step-1").mkdir(parents=True)

    assert not (tmp_path / "out/checkpoints").exists()
    assert json.loads((tmp_path / "out/COMPLETE").read_text())["outputs"] == {}


@pytest.mark.parametrize("leftover", ["config.yaml", "config.yaml.tmp", "manifest.json.tmp"])
def test_a_process_killed_while_opening_leaves_a_directory_that_opens(tmp_path, leftover):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / leftover).write_text("ha")
    assert work(config(tmp_path))


def _until_killed(settings, place, barrier):
    write, replace = atomic.write_atomic, os.replace

    def stop(path, data):
        if path.name == place:
            barrier.set()
            time.sleep(60)

        write(path, data)

    def stop_before_renaming(old, new):
        if new.name == place.removesuffix("'s name"):
            barrier.set()
            time.sleep(60)

        replace(old, new)

    if place.endswith("'s name"):
        os.replace = stop_before_renaming
    else:
        atomic.write_atomic = stop

    work(settings)


@pytest.mark.parametrize(
    "place",
    [
        "config.yaml",
        "manifest.json",
        "manifest.json's name",
        "result.txt",
        "COMPLETE",
        "COMPLETE's name",
    ],
)
def test_a_process_killed_anywhere_is_followed_by_one_that_finishes(tmp_path, place):
    forkserver = multiprocessing.get_context("forkserver")
    preload()
    reached = forkserver.Event()
    process = forkserver.Process(target=_until_killed, args=(config(tmp_path), place, reached))
    process.start()
    assert reached.wait(200)

    with pytest.raises(
        UserError, match=rf"another process \(pid {process.pid}\) is writing this run; wait for it"
    ):
        work(config(tmp_path))

    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "out/COMPLETE").exists()
    assert work(config(tmp_path))
    assert (tmp_path / "out/result.txt").read_text() == "done"
    assert not work(config(tmp_path))


# --- what was damaged while it was unfinished ---


@pytest.fixture
def unfinished(tmp_path):
    def stopped():
        with runs.open_run("work", config(tmp_path)) as run:
            run.log(1, {"loss": 2.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()

    return tmp_path / "out"


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "{}", '{"verb": "work", "config": [], "inputs": {}}']
)
def test_a_damaged_manifest_of_an_unfinished_run_is_named_with_its_cure(
    tmp_path, unfinished, content
):
    (unfinished / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json:") as error:
        work(config(tmp_path))

    assert error.value.cure == f"delete {unfinished}: the same command starts over"


def test_every_value_of_a_manifest_counts(tmp_path, unfinished):
    file = unfinished / "manifest.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 8'))
    with pytest.raises(
        UserError, match=r"manifest.json: damaged: its content does not fit its checksum"
    ):
        work(config(tmp_path))


@pytest.mark.parametrize("content", ["", "soon", "nan", "-3", "1e999", "\0"])
def test_damaged_seconds_count_for_nothing(tmp_path, unfinished, content, capsys):
    (unfinished / ".seconds").write_text(content)
    assert work(config(tmp_path))
    assert (
        f"{unfinished / '.seconds'}: damaged: how long earlier attempts took is not counted\n"
        in (capsys.readouterr().err)
    )
    assert 0 <= json.loads((unfinished / "COMPLETE").read_text())["seconds"] < 60


@pytest.mark.parametrize("content", [None, b"", b"size: 7", b"{", b"\xff"])
def test_a_damaged_configuration_is_written_again(tmp_path, unfinished, content, capsys):
    file = unfinished / "config.yaml"
    before = file.read_text()
    file.unlink()

    if content is not None:
        file.write_bytes(content)

    assert work(config(tmp_path))
    assert f"{file}: damaged; written again\n" in capsys.readouterr().err
    assert file.read_text() == before


def test_damaged_lines_of_metrics_are_counted(tmp_path, capsys):
    run = runs.Run(tmp_path, finished=False)
    for step in range(1, 5):
        run.log(step, {"loss": 1 / step})

    run.close()
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(
        file.read_bytes().replace(b'{"step": 2', b'{"step\xff": 2').replace(b'{"step": 3', b"[3")
    )
    run.rewind(3)
    assert capsys.readouterr().err == (
        f"{tmp_path}: metrics.jsonl: damaged: 2 lines of it cannot be read and are left out\n"
    )
    assert [row["step"] for row in runs.read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("content", ["", "[", "{}", "[1]"])
def test_damaged_warnings_are_named(tmp_path, content):
    (tmp_path / "warnings.json").write_text(content)
    with pytest.raises(UserError, match=r"warnings\.json:.*; restore it"):
        runs.read_warnings(tmp_path)


def test_a_clock_that_is_set_back_shortens_no_run(tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    with runs.open_run("work", config(tmp_path)):
        monkeypatch.setattr(time, "time", lambda: now - 7200)

    assert json.loads((tmp_path / "out/COMPLETE").read_text())["seconds"] >= 0


def test_a_run_that_goes_on_with_other_code_says_so(tmp_path, unfinished, monkeypatch, capsys):
    monkeypatch.setattr(manifest, "read_code_version", lambda: "1+other")
    assert work(config(tmp_path))
    assert "it was begun by other code, " in capsys.readouterr().err


# --- fingerprints ---


def test_an_input_inside_a_run_is_known_by_its_recorded_content(tmp_path):
    first = config(tmp_path)
    work(first)
    second = Work(
        out=tmp_path / "second",
        after=(first.out,),
        parts={"a": Part(source=first.out / "result.txt")},
    )
    work(second, "more")
    (tmp_path / "out/metrics.jsonl").write_text("{}\n")  # no output
    assert runs.is_finished("work", second)
    assert runs.fingerprint(tmp_path / "out") != runs.fingerprint(tmp_path / "second")


def test_an_unfinished_run_is_no_input(tmp_path):
    with pytest.raises(KeyboardInterrupt), runs.open_run("work", config(tmp_path)):
        raise KeyboardInterrupt

    with pytest.raises(UserError, match="out: this run is not finished; finish it first"):
        work(Work(out=tmp_path / "second", after=(tmp_path / "out",)))


def test_a_plain_directory_is_known_by_all_its_files(tmp_path):
    (tmp_path / "data/deep").mkdir(parents=True)
    (tmp_path / "data/deep/a").write_text("a")
    before = runs.fingerprint(tmp_path / "data")
    (tmp_path / "data/.hidden").touch()
    (tmp_path / "data/b.tmp").touch()
    assert runs.fingerprint(tmp_path / "data") == before
    (tmp_path / "data/deep/a").write_text("b")
    assert runs.fingerprint(tmp_path / "data") != before


def test_is_output(tmp_path):
    work(config(tmp_path))
    assert runs.is_output(tmp_path / "out/deep/none.jsonl")
    assert not runs.is_output(tmp_path / "none.jsonl")


def test_a_glob_is_known_by_all_that_it_matches(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)

    before = runs.fingerprint(tmp_path / "*.txt")
    assert runs.fingerprint(tmp_path / "*.txt") == before != runs.fingerprint(tmp_path / "a*.txt")
    (tmp_path / "b.txt").write_text("c")
    assert runs.fingerprint(tmp_path / "*.txt") != before

    with pytest.raises(UserError, match=r"\*.md: no file matches this pattern"):
        runs.fingerprint(tmp_path / "*.md")

    (tmp_path / "[c].txt").write_text("brackets")
    assert runs.fingerprint(tmp_path / "[c].txt") == hash_file(tmp_path / "[c].txt")


def test_a_folder_of_links_is_known_by_what_they_lead_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a").write_text("a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "data/circle").symlink_to(tmp_path)
    before = runs.fingerprint(tmp_path / "data")
    (tmp_path / "disk/a").write_text("b")
    assert runs.fingerprint(tmp_path / "data") != before


def test_a_pipe_is_no_input(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe: a pipe or a device.*write it to a file first"):
        runs.fingerprint(tmp_path / "pipe")


def test_a_folder_without_a_model_is_not_read_through(tmp_path, monkeypatch):
    class Tuned(StageConfig):
        model: Path

    (tmp_path / "home").mkdir()
    (tmp_path / "home/big").write_text("much")
    monkeypatch.setattr(completion, "hash_file", lambda path: pytest.fail(f"{path} is read"))
    monkeypatch.setattr(fingerprints, "hash_file", completion.hash_file)

    with pytest.raises(
        UserError,
        match=r"home: config.json: missing, so this folder holds no model; give .* as model",
    ):
        work(Tuned(out=tmp_path / "out", model=tmp_path / "home"))

    (tmp_path / "home/adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"it is a PEFT adapter: `llama2 import .*home --base BASE --out MODEL`"
    ):
        work(Tuned(out=tmp_path / "out", model=tmp_path / "home"))


def test_checkpoints_on_another_disk_are_deleted_and_nothing_else(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/mine").write_text("precious")
    (tmp_path / "moved/step-00000002").mkdir(parents=True)

    with runs.open_run("work", config(tmp_path)) as run:
        (run.path / "checkpoints").symlink_to(tmp_path / "disk")
        (run.path / "checkpoints/step-00000001/trainer").mkdir(parents=True)
        (run.path / "checkpoints/step-00000002").symlink_to(tmp_path / "moved/step-00000002")

    assert not (tmp_path / "out/checkpoints").is_symlink()
    assert not (tmp_path / "moved/step-00000002").exists()
    assert (tmp_path / "disk/mine").read_text() == "precious"
    assert not (tmp_path / "disk/step-00000001").exists()


@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSYS,
        errno.ENOLCK,
        errno.EOPNOTSUPP,
        errno.EINVAL,
        errno.ENOTTY,
        errno.EACCES,
        errno.EPERM,
    ],
)
def test_a_file_system_without_locks_is_written_with_a_warning(
    tmp_path, monkeypatch, capsys, number
):
    def missing(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", missing)
    assert work(config(tmp_path))
    assert capsys.readouterr().err == (
        f"{tmp_path / 'out'}: this file system has no locks, so nothing keeps a second "
        "process from writing this run\n"
    )


def test_another_refusal_of_a_lock_is_one_line(tmp_path, monkeypatch):
    def stale(file, how):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(fcntl, "flock", stale)
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/a: stale file handle; check the path and its disk$"
    ):
        runs.lock(tmp_path / "a")


def test_a_lock_on_a_full_disk_holds(tmp_path, monkeypatch):
    """Its content is a courtesy; what needs room names the disk."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    held = runs.lock(tmp_path / "a")
    with pytest.raises(UserError, match=r"a: another process is writing this run; wait for it"):
        runs.lock(tmp_path / "a")

    held.close()


# --- metrics ---


def test_metrics_are_appended_and_rewound(tmp_path):
    run = runs.Run(tmp_path, finished=False)
    for step in range(1, 5):
        run.log(step, {"loss": 1 / step})

    run.rewind(2)
    run.log(3, {"loss": 9.0})
    run.close()
    assert [(row["step"], row["loss"]) for row in runs.read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 9.0),
    ]

    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # as a crash leaves it

    run.rewind(3)
    assert [row["step"] for row in runs.read_metrics(tmp_path)] == [1, 2, 3]
    assert runs.read_metrics(tmp_path / "none") == []


def test_a_directory_is_writable_again_once_its_file_is_closed(tmp_path):
    held = runs.lock(tmp_path / "a")
    with pytest.raises(UserError, match=f"pid {os.getpid()}"):
        runs.lock(tmp_path / "a")

    held.close()
    runs.lock(tmp_path / "a").close()


def test_write_atomic_leaves_the_old_file_when_it_cannot_write(tmp_path, monkeypatch):
    atomic.write_atomic(tmp_path / "a", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left on the device"):
        atomic.write_atomic(tmp_path / "a", "new")

    assert (tmp_path / "a").read_text() == "old"


def test_a_full_disk_is_named_by_what_it_stopped(tmp_path, monkeypatch):
    """Not by the note of the seconds spent, which finds no space either."""

    def full(descriptor):
        raise OSError(28, "No space left on device")

    def fill():
        with runs.open_run("work", config(tmp_path)) as run:
            (run.path / "part").write_text("kept")
            monkeypatch.setattr(os, "fsync", full)
            atomic.write_atomic(run.path / "result.txt", "much")

    with pytest.raises(UserError, match=r"result\.txt: no space left"):
        fill()

    monkeypatch.undo()
    assert (tmp_path / "out/part").read_text() == "kept"
    work(config(tmp_path))


def test_the_real_command_line_skips_and_resumes(tmp_path, capsys):
    assert llama2("world", "--scale", 0.001, "--out", tmp_path / "w") == 0
    assert llama2("world", "--scale", 0.001, "--out", tmp_path / "w") == 0
    heard = capsys.readouterr()
    assert heard.out == f"{tmp_path / 'w'}\n" * 2
    assert heard.err == f"{tmp_path / 'w'}: already finished, skipped\n"


def test_the_code_version_covers_compiled_code(tmp_path, monkeypatch):
    """Kernels change results as Python does."""
    package = tmp_path / "llama2"
    package.mkdir()
    for name in ("__init__.py", "kernel.cpp", "kernel.h", "notes.md"):
        (package / name).write_text("one")

    monkeypatch.setattr(fingerprints.llama2, "__file__", str(package / "__init__.py"))

    def version():
        runs.read_code_version.cache_clear()
        return runs.read_code_version()

    before = version()
    (package / "notes.md").write_text("two")
    assert version() == before
    versions = {before}

    for name in ("__init__.py", "kernel.cpp", "kernel.h"):
        (package / name).write_text("two")
        versions.add(version())

    assert len(versions) == 4
    monkeypatch.setenv("LLAMA2_NATIVE", "off")  # other operations round otherwise
    versions.add(version())
    assert len(versions) == 5
    runs.read_code_version.cache_clear()
