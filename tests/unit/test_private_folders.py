"""Folders that one user alone may have written."""

import os
import shutil
import subprocess
import sys

import pytest
from torch import nn

from llama2 import private_folders
from llama2.ranks import Ranks
from llama2.train import learner


@pytest.fixture(autouse=True)
def forgotten(monkeypatch, tmp_path):
    monkeypatch.setattr(private_folders.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    private_folders.choose_folder.cache_clear()
    yield
    private_folders.choose_folder.cache_clear()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_whatever_the_umask_nobody_else_can_write(tmp_path, umask):
    before = os.umask(umask)
    try:
        made = private_folders.choose_folder()
    finally:
        os.umask(before)

    assert made == tmp_path / "cache/llama2"
    assert [place.stat().st_mode & 0o777 for place in (made, made.parent)] == [0o700, 0o700]


def test_a_relative_cache_is_none(tmp_path, monkeypatch):
    """XDG's rule: the working directory may be anybody's."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert private_folders.choose_folder() == tmp_path / "home/.cache/llama2"


def test_what_is_left_is_a_fresh_folder_that_goes_with_the_process(tmp_path):
    code = f"""
import tempfile
tempfile.tempdir = {str(tmp_path)!r}
from llama2 import private_folders as private
made = private.choose_folder()
print(made, made.is_dir(), oct(made.stat().st_mode & 0o777), private.choose_folder() == made)
"""
    (tmp_path / "cache").write_text("no folder")
    (tmp_path / f"llama2-{os.getuid()}").symlink_to(tmp_path)
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200
    )
    place, *rest = process.stdout.split()
    assert rest == ["True", "0o700", "True"], process.stderr
    assert place.startswith(f"{tmp_path}/llama2-")
    assert not os.path.lexists(place)


def test_nothing_is_made_in_a_home_of_another_user(tmp_path, monkeypatch):
    """`sudo` may leave HOME as it was: what root made there would be in that user's way."""
    if os.getuid() != 0:
        pytest.skip("only root can give files away")

    (tmp_path / "home").mkdir()
    os.chown(tmp_path / "home", 12345, 12345)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert private_folders.choose_folder() == tmp_path / "llama2-0"
    assert list((tmp_path / "home").iterdir()) == []


def test_a_group_of_ones_own_may_write_above(tmp_path, monkeypatch):
    """Many systems give each user a group, and everything in the home directory to it."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o775)
    own = os.getgid() == os.getuid() == (tmp_path / "cache").stat().st_gid

    if not own:
        pytest.skip("this user's group is shared")

    assert private_folders.choose_folder() == tmp_path / "cache/llama2"
    monkeypatch.setattr(
        private_folders.grp, "getgrgid", lambda number: type("Group", (), {"gr_mem": ["another"]})
    )
    private_folders.choose_folder.cache_clear()
    assert private_folders.choose_folder() == tmp_path / f"llama2-{os.getuid()}"


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_what_torch_compiles_lies_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    """Its default is /tmp/torchinductor_USER, which anybody can make first."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "named"))
    learner._compile(nn.Linear(2, 2), Ranks.alone())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "named")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    learner._compile(nn.Linear(2, 2), Ranks.alone())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache/llama2/inductor")
