"""Where compiled libraries are kept: in the first folder that takes them, and never in one that
others can write."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from llama2 import private_folders
from llama2.kernels import build

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or build.library("fused") is None, reason="no compiler"
)
as_root = pytest.mark.skipif(
    os.getuid() != 0, reason="only root can give files away and be another user"
)
STRANGER = 12345
EVIL = 'extern "C" int answer() { return 666; }\n'


@pytest.fixture(autouse=True)
def forgotten(monkeypatch, tmp_path):
    """A source, a folder for temporary files, a compiler without what takes time, and no memory of
    what was built."""
    for folder in ("temporary", "sources"):
        (tmp_path / folder).mkdir()

    (tmp_path / "sources/tiny.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(build, "HERE", tmp_path / "sources")
    monkeypatch.setattr(private_folders.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(build, "FLAGS", ("-shared", "-fPIC"))
    monkeypatch.setattr(build, "WIDE", "-O0")
    build.forget()
    yield
    build.forget()


def found(monkeypatch, cache, name="tiny"):
    """What is loaded with this cache, or None."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache)) if cache else monkeypatch.delenv(
        "XDG_CACHE_HOME", False
    )
    build.forget()
    return build.library(name)


def loaded(monkeypatch, cache):
    """The path from which the library comes; it works."""
    library = found(monkeypatch, cache)
    assert library is not None
    assert library.answer() == 42

    return Path(library._name)


def plant(path):
    """Another's library of this name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=EVIL.encode(), check=True
    )
    path.chmod(0o755)


def compiler(monkeypatch, tmp_path, text):
    """The only compiler is a script; "$REAL" in it is a true one."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    real = build.shutil.which("g++")
    (folder / "g++").write_text(f"#!/bin/sh\nREAL={real}\n{textwrap.dedent(text)}")
    (folder / "g++").chmod(0o755)
    monkeypatch.delenv("CXX", False)
    monkeypatch.setattr(
        build.shutil, "which", lambda name: str(folder / "g++") if name == "g++" else None
    )


def test_the_library_is_kept_in_a_folder_of_its_own(monkeypatch, tmp_path):
    path = loaded(monkeypatch, tmp_path / "cache")
    assert path.parent == tmp_path / "cache/llama2"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o700
    when = path.stat().st_mtime_ns
    assert loaded(monkeypatch, tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == when
    assert list(path.parent.iterdir()) == [path]


def test_the_next_folder_is_taken_where_the_first_is_none(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    mine = tmp_path / f"temporary/llama2-{os.getuid()}"
    assert loaded(monkeypatch, tmp_path / "file").parent == mine
    assert loaded(monkeypatch, "/proc/nowhere").parent == mine


def test_without_a_home_directory(monkeypatch, tmp_path):
    def unknown(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert loaded(monkeypatch, None).parent.name == f"llama2-{os.getuid()}"


@pytest.mark.parametrize(
    "message", ["No space left on device", "Disk quota exceeded", "Read-only file system"]
)
def test_the_next_folder_is_taken_where_the_disk_refuses_the_compiler(
    monkeypatch, tmp_path, message
):
    compiler(
        monkeypatch,
        tmp_path,
        f"""
        case "$*" in *{tmp_path}/cache*) echo 'ld: final link failed: {message}' >&2; exit 1;; esac
        exec $REAL "$@"
        """,
    )
    assert loaded(monkeypatch, tmp_path / "cache").parent.name == f"llama2-{os.getuid()}"


def test_the_next_folder_is_taken_where_the_disk_refuses_the_last_byte(monkeypatch, tmp_path):
    sync, spoken = os.fsync, []

    def full(descriptor):
        spoken.append(descriptor)
        if len(spoken) == 1:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        sync(descriptor)

    monkeypatch.setattr(build.os, "fsync", full)
    assert loaded(monkeypatch, tmp_path / "cache").parent.name == f"llama2-{os.getuid()}"
    assert list((tmp_path / "cache/llama2").iterdir()) == []


# --- other users ---


def test_nothing_is_loaded_from_a_folder_into_which_others_can_write(monkeypatch, tmp_path):
    planted = loaded(monkeypatch, tmp_path / "cache")
    planted.parent.chmod(0o777)
    mine = loaded(monkeypatch, tmp_path / "cache")
    assert mine.parent.name == f"llama2-{os.getuid()}"
    mine.parent.chmod(0o1777)
    last = loaded(monkeypatch, tmp_path / "cache")
    assert last.parent.name.startswith("llama2-")
    assert not last.parent.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_nothing_is_loaded_from_below_a_folder_into_which_others_can_write(
    monkeypatch, tmp_path, mode
):
    """They could put another folder in the place of ours."""
    loaded(monkeypatch, tmp_path / "open/cache")
    (tmp_path / "open").chmod(mode)
    if os.getuid() == 0:
        os.chown(tmp_path / "open", 0, STRANGER)
    elif mode == 0o770:
        pytest.skip("only root can give a folder to a group that is not its own")

    assert loaded(monkeypatch, tmp_path / "open/cache").parent.name == f"llama2-{os.getuid()}"
    (tmp_path / "open").chmod(0o1777)  # like /tmp: what is ours nobody else can rename
    assert loaded(monkeypatch, tmp_path / "open/cache").parent == tmp_path / "open/cache/llama2"


def test_a_link_is_no_folder_of_ones_own(monkeypatch, tmp_path):
    plain = loaded(monkeypatch, tmp_path / "cache")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/llama2").symlink_to(plain.parent)
    assert loaded(monkeypatch, tmp_path / "linked").parent.name == f"llama2-{os.getuid()}"
    moved = tmp_path / "moved"
    # a cache on another disk: all that is passed on the way is safe
    moved.symlink_to(tmp_path / "cache")
    assert loaded(monkeypatch, moved).parent == moved / "llama2"
    (tmp_path / "open").mkdir()
    (tmp_path / "open/link").symlink_to(tmp_path / "cache")
    (tmp_path / "open").chmod(0o777)  # who can write there can have the link lead elsewhere
    (tmp_path / "through").symlink_to(tmp_path / "open/link")
    assert loaded(monkeypatch, tmp_path / "through").parent.name == f"llama2-{os.getuid()}"
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    assert loaded(monkeypatch, tmp_path / "ring").parent.name == f"llama2-{os.getuid()}"


@as_root
def test_nothing_is_loaded_from_a_folder_or_file_of_another_user(monkeypatch, tmp_path):
    planted = loaded(monkeypatch, tmp_path / "cache")
    os.chown(planted, STRANGER, STRANGER)
    assert loaded(monkeypatch, tmp_path / "cache").parent.name == f"llama2-{os.getuid()}"
    os.chown(planted, 0, 0)
    os.chown(planted.parent, STRANGER, STRANGER)
    assert loaded(monkeypatch, tmp_path / "cache").parent.name == f"llama2-{os.getuid()}"


@as_root
def test_a_library_planted_in_the_temporary_folder_is_not_run(monkeypatch, tmp_path):
    """The name of the folder and of the library can be reckoned by anybody."""
    name = loaded(monkeypatch, tmp_path / "cache").name
    shared = tmp_path / "temporary"
    shared.chmod(0o1777)
    planted = shared / f"llama2-{os.getuid()}" / name
    plant(planted)

    for place in (planted, planted.parent):
        os.chown(place, STRANGER, STRANGER)

    assert loaded(monkeypatch, "/proc/nowhere").parent not in (planted.parent, shared)
    assert planted.stat().st_uid == STRANGER
    assert build.ctypes.CDLL(str(planted)).answer() == 666


@pytest.fixture
def public(tmp_path):
    """A folder that every user may enter: pytest closes its own ones to others whenever it
    starts."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    shutil.copytree(tmp_path / "sources", folder / "sources")
    yield folder
    shutil.rmtree(folder)


@as_root
def test_another_users_process_does_not_run_what_was_planted_for_it(public):
    """Without a home, without an entry: the folder that is left bears its number, and is there
    already."""
    script = f"""
        import os, tempfile
        from pathlib import Path
        from llama2.kernels import build as native  # before this process may no longer read the interpreter's own files
        os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})
        os.environ.pop("HOME", None); os.environ.pop("XDG_CACHE_HOME", None)
        tempfile.tempdir = {str(public / "shared")!r}
        native.HERE, native.FLAGS, native.WIDE = Path({str(public / "sources")!r}), ("-shared", "-fPIC"), "-O0"
        library = native.library("tiny")
        print(library.answer(), library._name)
        """
    shared = public / "shared"
    shared.mkdir()
    shared.chmod(0o1777)

    def ask():
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            timeout=200,
        )

    first = ask()
    assert first.stdout.startswith("42 "), first.stderr
    own = shared / f"llama2-{STRANGER}"
    name = first.stdout.split("/")[-1].strip()
    assert (own / name).stat().st_uid == STRANGER
    os.chown(own, 0, 0)
    plant(own / name)
    second = ask()
    assert second.stdout.startswith("42 "), second.stderr
    assert str(own) not in second.stdout


# --- damage ---


@pytest.mark.parametrize("damage", ["half", "empty", "text", "flipped", "foreign"])
def test_a_damaged_library_is_built_again(monkeypatch, tmp_path, damage):
    path = loaded(monkeypatch, tmp_path / "cache")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 64
    foreign = bytearray(whole)
    foreign[18:20] = b"\xb7\x00"  # e_machine of AArch64
    new = {
        "half": whole[:5000],
        "empty": b"",
        "text": b"no library",
        "flipped": bytes(flipped),
        "foreign": bytes(foreign),
    }[damage]
    path.unlink()  # it is mapped into this very process
    path.write_bytes(new)
    path.chmod(0o700)
    script = f"""
        import os
        os.environ["XDG_CACHE_HOME"] = {str(tmp_path / "cache")!r}
        from pathlib import Path
        from llama2.kernels import build as native
        native.HERE, native.FLAGS, native.WIDE = Path({str(tmp_path / "sources")!r}), ("-shared", "-fPIC"), "-O0"
        print(native.library("tiny").answer())
        """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=200
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "42\n", "")
    assert build._is_whole(path.read_bytes())


def test_a_folder_in_the_place_of_the_library_is_passed_over(monkeypatch, tmp_path):
    path = loaded(monkeypatch, tmp_path / "cache")
    path.unlink()
    path.mkdir()
    assert loaded(monkeypatch, tmp_path / "cache").parent.name == f"llama2-{os.getuid()}"


def test_machines_with_other_instructions_have_libraries_of_their_own(monkeypatch, tmp_path):
    """A home directory may be shared by machines of several ages."""
    here = loaded(monkeypatch, tmp_path / "cache")
    compiler(
        monkeypatch,
        tmp_path,
        """
        case "$*" in *-dM*) echo '#define __AN_OLDER_CPU__ 1';; esac
        exec $REAL "$@"
        """,
    )
    assert loaded(monkeypatch, tmp_path / "cache").name != here.name


def test_two_first_builds_at_once(monkeypatch, tmp_path):
    script = f"""
        import os
        os.environ["XDG_CACHE_HOME"] = {str(tmp_path / "cache")!r}
        from pathlib import Path
        from llama2.kernels import build as native
        native.HERE, native.FLAGS, native.WIDE = Path({str(tmp_path / "sources")!r}), ("-shared", "-fPIC"), "-O0"
        print(native.library("tiny").answer())
        """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=200) for process in both] == [("42\n", "")] * 2
    assert len(list((tmp_path / "cache/llama2").iterdir())) == 1


# --- compilers ---


def refused(monkeypatch, tmp_path, capfd, text):
    """The one line that is said where three libraries are wanted and the only compiler is this
    script."""
    for name in ("other", "third"):
        (tmp_path / f"sources/{name}.cpp").write_text("")

    compiler(monkeypatch, tmp_path, text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.forget()
    assert [build.library(name) for name in ("tiny", "other", "third")] == [None, None, None]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert list(tmp_path.glob("cache/llama2/*")) == []

    return lines[0].removeprefix("this CPU runs at about half its speed: ")


@pytest.mark.parametrize(
    ("text", "heard"),
    [
        ("exit 1", "g++: exit status 1"),
        ("exec $REAL none.cpp", "g++: cc1plus: fatal error: none.cpp: No such file or directory"),
        (
            "echo garbage; exit 0",
            "g++ builds nothing that can be loaded (cannot open shared object file: "
            "No such file or directory)",
        ),
        (
            """
     for last in "$@"; do :; done
     case "$*" in *-dM*) ;; *) echo garbage > $last;; esac
     """,
            "g++ builds nothing that can be loaded (file too short)",
        ),
        (
            """
     case "$*" in *-dM*) exec $REAL "$@";; esac
     echo "In file included from here:" >&2
     echo "decode.cpp:3:10: fatal error: omp.h: No such file or directory" >&2
     exit 1
     """,
            "g++: decode.cpp:3:10: fatal error: omp.h: No such file or directory",
        ),
        (
            """
     case "$*" in *-dM*) exec $REAL "$@";; esac
     kill -9 $$
     """,
            "g++: ended by signal 9",
        ),
    ],
)
def test_a_compiler_that_fails_is_one_line(monkeypatch, tmp_path, capfd, text, heard):
    assert refused(monkeypatch, tmp_path, capfd, text) == heard


@pytest.mark.parametrize("when", ["asked", "building"])
def test_a_compiler_that_hangs_is_ended_with_all_it_started(monkeypatch, tmp_path, capfd, when):
    monkeypatch.setattr(build, "ASKING", 1 if when == "asked" else 30)
    monkeypatch.setattr(build, "BUILDING", 1)
    answer = "" if when == "asked" else 'case "$*" in *-dM*) exec $REAL "$@";; esac'
    heard = refused(
        monkeypatch, tmp_path, capfd, f"{answer}\nsleep 1000 & echo $! >> {tmp_path}/pids\nwait"
    )
    assert heard == "g++ takes longer than 1 seconds"
    (helper,) = (tmp_path / "pids").read_text().split()  # tried once, not once a library

    while is_running(int(helper)):  # it has been killed, or the test ends by its time limit
        pass


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_a_compiler_one_line_says_so(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert [build.library(name) for name in ("tiny", "other")] == [None, None]
    assert capfd.readouterr().err == (
        "this CPU runs at about half its speed: no C++ compiler found (install g++)\n"
    )


def test_a_compiler_may_be_named_with_arguments(monkeypatch, tmp_path, capfd):
    for named in ("no-such-compiler", "'", f"{build.shutil.which('g++')} -O1"):
        monkeypatch.setenv("CXX", named)
        assert loaded(monkeypatch, tmp_path / "cache").parent == tmp_path / "cache/llama2"

    assert len(list((tmp_path / "cache/llama2").iterdir())) == 2
    assert capfd.readouterr().err == ""


def test_where_no_folder_is_safe_each_is_named(monkeypatch, tmp_path, capfd):
    (tmp_path / "temporary").chmod(0o777)
    assert found(monkeypatch, "/proc/nowhere") is None
    line = capfd.readouterr().err
    assert line == (
        "this CPU runs at about half its speed: /proc/nowhere: no such file or directory; "
        f"{tmp_path}/temporary: others may write there; {tmp_path}/temporary: others may write there "
        "(set XDG_CACHE_HOME to a folder of your own)\n"
    )
