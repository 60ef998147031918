"""One command line: what it is called with, what comes back, and how it ends."""

import json
import os
import subprocess
import sys

import pytest
from commands import llama2

from llama2 import cli
from llama2.recipe.verbs import VERBS
from llama2.runs import Stopped


def test_help_lists_every_verb_in_the_papers_order(capsys):
    assert llama2() == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n  {name} ") for name in VERBS]
    assert places == sorted(places)
    assert llama2("--version") == 0
    assert capsys.readouterr().out.startswith("llama2 ")


def test_help_of_one_verb(capsys):
    with pytest.raises(SystemExit) as left:
        llama2("help", "carbon")

    assert left.value.code == 0
    assert "usage: llama2 carbon" in capsys.readouterr().out


@pytest.mark.parametrize("columns", ["1", "0", "x"])
def test_help_for_a_terminal_without_width(monkeypatch, capsys, columns):
    """Its lines were broken for ever."""
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as left:
        llama2("carbon", "--help")

    assert left.value.code == 0
    assert "usage: llama2 carbon" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "heard"),
    [
        (["Sft"], "unknown verb 'Sft'; did you mean 'sft'?"),
        (
            ["my/recipe.yaml", "--dry-run"],
            "my/recipe.yaml: a recipe stands behind a verb; write llama2 run my/recipe.yaml",
        ),
        (
            ["--out", "x", "sft"],
            "a verb stands before all flags (--out); llama2 help lists the verbs",
        ),
        (
            ["world", "--out", "x", "--dry-run", "false"],
            "--dry-run takes no value (it is false); leave it out",
        ),
        (
            ["world", "--out", "x", "--dry-run=1"],
            "--dry-run takes no value (it is 1); leave it out",
        ),
        (
            ["world", "--out", "x", "--dry-run", "--json", "1"],
            "--json takes no value (it is 1); leave it out",
        ),
        (
            ["world", "--out", "x", "--dry-run", "--ranks", "2", "3"],
            "unexpected argument '3' behind --ranks 2",
        ),
    ],
)
def test_a_command_that_begins_wrongly(tmp_path, monkeypatch, one_line, words, heard):
    monkeypatch.chdir(tmp_path)
    assert one_line(*words).startswith(heard)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_may_stand_behind_dry_run(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("{out: x, steps: {a: {verb: world}}}")
    assert llama2("run", "--dry-run", "--json", tmp_path / "recipe.yaml") == 0
    assert json.loads(capsys.readouterr().out)["steps"]["a"]["scale"] == 1.0


def test_ctrl_c_is_no_failure_of_the_data(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llama2.stages.world.write", interrupted)
    assert llama2("world", "--out", tmp_path / "x") == 130
    assert capsys.readouterr().err == "llama2: interrupted; the same command resumes\n"


STARTING = """
import builtins, os, signal, sys
from llama2 import cli

signal.signal(signal.SIGINT, signal.default_int_handler)
load = builtins.__import__

def interrupted(name, *rest):
    if name == "torch":
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:  # as a library may do
            pass
    return load(name, *rest)

builtins.__import__ = interrupted
cli.main(["run", "recipe.yaml"])
"""


def test_ctrl_c_while_modules_are_loaded_is_one_line():
    process = subprocess.run(
        [sys.executable, "-c", STARTING], capture_output=True, text=True, timeout=200
    )
    assert (process.returncode, process.stdout) == (130, "")
    assert process.stderr == "llama2: interrupted; the same command resumes\n"


HEAVY = """
import sys
from llama2 import cli

status = cli._guarded(sys.argv[1:])
heavy = ("torch", "numpy", "pydantic", "rich", "yaml", "tyro")
print([name for name in heavy if name in sys.modules], status)
"""


@pytest.mark.parametrize("words", [["--help"], ["help"], [], ["--version"], ["sfft"], ["a.yaml"]])
def test_what_needs_no_stage_imports_nothing_heavy(words):
    """Help comes at once, and Ctrl-C in the first seconds finds its handler."""
    process = subprocess.run(
        [sys.executable, "-c", HEAVY, *words], capture_output=True, text=True, check=True
    )
    status = 2 if words in (["sfft"], ["a.yaml"]) else 0
    assert process.stdout.splitlines()[-1] == f"[] {status}"


def test_a_stop_is_success(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise Stopped(7, tmp_path)

    monkeypatch.setattr("llama2.stages.world.write", stopped)
    assert llama2("world", "--out", tmp_path / "x") == 0
    heard = capsys.readouterr()
    assert heard.err == "llama2: stopped after step 7; the same command resumes\n"
    assert heard.out == ""


def test_a_reader_that_leaves_early_is_no_error(monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    saved = os.dup(1)
    monkeypatch.setattr(cli, "_dispatch", gone)
    monkeypatch.setattr(sys, "stdout", open(saved, "w"))  # noqa: SIM115
    assert llama2("world") == 0
    sys.stdout.close()


def test_the_installed_command(tmp_path):
    """One real process: exit status 2, one line on stderr, nothing on stdout."""
    command = [
        sys.executable,
        "-m",
        "llama2.cli",
        "world",
        "--scale",
        "7",
        "--out",
        str(tmp_path / "x"),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == (
        "llama2: error: '--scale': must be at most 1 (it is 7); mend the value\n"
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_folder_whose_name_is_no_text(tmp_path, errors):
    """It is printed as the bytes it is, so that a script finds it."""
    out = tmp_path / os.fsdecode(b"caf\xe9")
    command = [sys.executable, "-m", "llama2.cli", "world", "--scale", "0.001", "--out", str(out)]
    process = subprocess.run(
        command,
        capture_output=True,
        timeout=200,
        env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"},
    )
    assert (process.returncode, process.stdout) == (0, os.fsencode(out) + b"\n"), process.stderr


def test_a_dry_run_touches_nothing(tmp_path, capsys, policy, world):
    out = tmp_path / "x"
    assert (
        llama2(
            "sft",
            "--dry-run",
            "--ranks",
            2,
            "--model",
            policy,
            "--dialogs.a.path",
            world / "demonstrations.jsonl",
            "--sequence-length",
            128,
            "--out",
            out,
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "sequence_length: 128" in shown
    assert "parameters:" in shown
    assert not out.exists()
