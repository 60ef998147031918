"""The command line in a locale that knows ASCII alone, and without a terminal or a pipe behind its
streams."""

import os
import subprocess
import sys
from pathlib import Path

import llama2


def test_the_locale_c_prints_and_reads_every_character(tmp_path):
    (tmp_path / "Bücher.txt").write_text(
        "Ein Text über Mühlen, lang genug, um zu bleiben.", "utf-8"
    )
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONPATH": str(Path(llama2.__file__).parents[1]),
    }

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "llama2.cli", *words],
            env=environment,
            capture_output=True,
            check=True,
        ).stdout.decode()

    assert "§2.1" in run("--help")
    run("clean", "--sources.web.path", str(tmp_path / "Bücher.txt"), "--out", str(tmp_path / "out"))
    written = (tmp_path / "out/documents/web.jsonl").read_text("utf-8")
    assert "über Mühlen" in written
    assert "Bücher.txt" in written


def test_streams_that_are_closed_say_and_hear_nothing(tmp_path):
    """As under some services: a file opened later must not take the place of standard error."""
    environment = {**os.environ, "PYTHONPATH": str(Path(llama2.__file__).parents[1])}
    file = tmp_path / "text.txt"
    file.write_text("a text that is long enough to stay")
    command = f"{sys.executable} -m llama2.cli clean --sources.a.path {file} --out {tmp_path}/out <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=environment, check=False).returncode == 0
    assert (tmp_path / "out/COMPLETE").is_file()
    assert (tmp_path / "out/.lock").read_text().isdecimal()


def test_a_working_directory_that_is_gone_is_named(tmp_path):
    """Libraries that look for themselves from there would end the process with words of their
    own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(llama2.__file__).parents[1])}
    command = f"mkdir gone && cd gone && rmdir ../gone && {sys.executable} -m llama2.cli --help"
    ended = subprocess.run(
        ["sh", "-c", command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        "llama2: error: the directory in which this command is called has been deleted; "
        "go to another one\n"
    )
