"""Where compiled libraries are kept: in the first folder that takes them, and never in one that others can write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama2.model import native

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux") or native.library("fused") is None,
                                reason="no compiler")


def loaded(monkeypatch, tmp_path, cache):
    """The path from which the library comes, with this cache and an empty folder for temporary files."""
    for folder in ("temporary", "sources"):
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "sources/tiny.cpp").write_text('extern "C" void nothing() {}\n')
    monkeypatch.setattr(native, "HERE", tmp_path / "sources")
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(native, "FLAGS", ("-shared", "-fPIC"))
    monkeypatch.setattr(native, "WIDE", "-O0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache)) if cache else monkeypatch.delenv("XDG_CACHE_HOME", False)
    native.library.cache_clear()
    try:
        found = native.library("tiny")
        assert found is not None
        found.nothing()
        return Path(found._name)
    finally:
        native.library.cache_clear()


def test_the_library_is_kept_in_a_folder_of_its_own(monkeypatch, tmp_path):
    path = loaded(monkeypatch, tmp_path, tmp_path / "cache")
    assert path.parent == tmp_path / "cache/llama2"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o700
    when = path.stat().st_mtime_ns
    assert loaded(monkeypatch, tmp_path, tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == when


def test_the_next_folder_is_taken_where_the_first_is_none(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    mine = tmp_path / f"temporary/llama2-{os.getuid()}"
    assert loaded(monkeypatch, tmp_path, tmp_path / "file").parent == mine
    assert loaded(monkeypatch, tmp_path, "/proc/nowhere").parent == mine


def test_without_a_home_directory(monkeypatch, tmp_path):
    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    assert loaded(monkeypatch, tmp_path, None).parent.name == f"llama2-{os.getuid()}"


@pytest.mark.parametrize("message", ["No space left on device", "Disk quota exceeded", "Read-only file system"])
def test_the_next_folder_is_taken_where_the_disk_refuses_the_compiler(monkeypatch, tmp_path, message):
    run = subprocess.run

    def refuse(command, **how):
        if str(tmp_path / "cache") in command[-1]:
            raise subprocess.CalledProcessError(1, command, stderr=f"ld: final link failed: {message}")
        return run(command, **how)

    monkeypatch.setattr(native.subprocess, "run", refuse)
    assert loaded(monkeypatch, tmp_path, tmp_path / "cache").parent.name == f"llama2-{os.getuid()}"


def test_nothing_is_loaded_from_a_folder_into_which_others_can_write(monkeypatch, tmp_path):
    planted = loaded(monkeypatch, tmp_path, tmp_path / "cache")
    planted.parent.chmod(0o777)
    mine = loaded(monkeypatch, tmp_path, tmp_path / "cache")
    assert mine.parent.name == f"llama2-{os.getuid()}"
    mine.parent.chmod(0o777)
    private = loaded(monkeypatch, tmp_path, tmp_path / "cache")
    assert private.parent.name.startswith("llama2-")
    assert not private.parent.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_nothing_is_loaded_from_a_folder_or_file_of_another_user(monkeypatch, tmp_path):
    planted = loaded(monkeypatch, tmp_path, tmp_path / "cache")
    os.chown(planted, 12345, 12345)
    assert loaded(monkeypatch, tmp_path, tmp_path / "cache").parent.name == f"llama2-{os.getuid()}"
    os.chown(planted, 0, 0)
    os.chown(planted.parent, 12345, 12345)
    assert loaded(monkeypatch, tmp_path, tmp_path / "cache").parent.name == f"llama2-{os.getuid()}"
