"""Verbs carried out here and in processes of their own: what comes back, what is stopped, what a
crash leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import pytest
import torch
from commands import llama2

from llama2 import cli, runs
from llama2.config import build
from llama2.formats import checkpoint
from llama2.recipe import launch
from llama2.runs import Stopped, read_metrics


def finish(workers, seconds=200):
    end = time.time() + seconds
    while workers.alive():
        if time.time() > end:
            workers.kill()
            raise AssertionError(workers.log.read_text())

        time.sleep(0.02)

    return workers.result()


def wait_for(condition, seconds=200):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def server():
    launch.preload()


def test_every_verb_is_a_stage():
    for name, verb in launch.VERBS.items():
        module = launch.stage(name)
        assert module.__doc__, name
        assert callable(module.run)
        assert module.Config.__doc__
        assert verb.summary


def test_workers_tell_how_it_went(tmp_path):
    workers = launch.Workers.start(
        "world", {"out": str(tmp_path / "a"), "scale": 0.001}, 2, 1, tmp_path / "log"
    )
    assert finish(workers) == "done"
    assert (tmp_path / "a/COMPLETE").exists()
    workers = launch.Workers.start(
        "clean",
        {"out": str(tmp_path / "b"), "sources": {"a": {"path": "none"}}},
        1,
        1,
        tmp_path / "log",
    )
    assert (
        finish(workers)
        == "none: no such file or directory; check the path, or run the stage that makes it"
    )
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_defect_leaves_its_traceback_in_the_log(tmp_path):
    workers = launch.Workers.start(
        "nonsense", {"out": str(tmp_path / "a")}, 1, 1, tmp_path / "deep/log"
    )
    assert (
        finish(workers) == f"a process ended with exit status 1; its log: {tmp_path / 'deep/log'}"
    )
    assert "KeyError: 'nonsense'" in (tmp_path / "deep/log").read_text()


def test_a_stage_without_checkpoints_stops_too(tmp_path):
    """It has nothing to save; what matters is that the recipe does not take it for a failure."""
    workers = launch.Workers.start("world", {"out": str(tmp_path / "a")}, 1, 1, tmp_path / "log")
    wait_for(lambda: (tmp_path / "a/documents").exists())
    workers.stop()
    assert finish(workers) == "stopped"
    assert not (tmp_path / "a/COMPLETE").exists()


def test_one_rank_that_dies_takes_the_others_down(tmp_path):
    workers = launch.Workers.start("world", {"out": str(tmp_path / "a")}, 2, 1, tmp_path / "log")
    wait_for(lambda: (tmp_path / "a/documents").exists())
    os.kill(workers.processes[0].pid, signal.SIGKILL)
    assert finish(workers, 20) == (
        f"a worker process was killed (signal 9; out of memory?); its log: {tmp_path / 'log'}"
    )
    assert not any(process.is_alive() for process in workers.processes)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            # a container may have nobody who asks how it ended
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_starts_workers_may_be_killed(tmp_path):
    """By a machine without memory: its workers end as well, though no signal reaches them any
    more."""
    workers = launch.Workers.start("world", {"out": str(tmp_path / "a")}, 1, 1, tmp_path / "log")
    wait_for(lambda: (tmp_path / "a/documents").exists())
    held = (tmp_path / "a/.lock").read_text()
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    assert finish(workers, 20) == (
        "a worker process was killed (with the one that starts them; out of memory?); "
        f"its log: {tmp_path / 'log'}"
    )
    assert workers.killed
    wait_for(lambda: not alive(held))
    workers = launch.Workers.start(
        "world", {"out": str(tmp_path / "a"), "scale": 1}, 1, 1, tmp_path / "log"
    )
    assert finish(workers) == "done"


TWO = {
    "sft": {"sequence_length": 128, "batch_size": 4, "micro_batch_size": 2, "heldout": 0.1},
    "reward": {"batch_size": 10, "micro_batch_size": 3, "auxiliary_weight": 0.5},
}


@pytest.mark.parametrize("verb", TWO)
def test_two_ranks_train_like_one(tmp_path, verb, base, world, preferences):
    values = {
        **TWO[verb],
        "model": str(base),
        "training": {
            "precision": "fp32",
            "optimizer": {"learning_rate": 1e-3},
            "plan": {"max_steps": 8, "log_every": 1},
        },
    }
    if verb == "sft":
        values["dialogs"] = {"all": {"path": str(world / "demonstrations.jsonl")}}
    else:
        values |= {
            "preferences": {"all": {"path": str(preferences)}},
            "heldout": {"all": {"path": str(preferences)}},
        }

    workers = launch.Workers.start(
        verb, {**values, "out": str(tmp_path / "two")}, 2, 1, tmp_path / "log"
    )
    launch.execute(verb, build(launch.stage(verb).Config, {**values, "out": tmp_path / "one"}))
    assert finish(workers) == "done", (tmp_path / "log").read_text()
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [row["step"] for row in two] == [row["step"] for row in one]

    for mine, theirs in zip(two, one, strict=True):
        same = {
            name: value for name, value in theirs.items() if not name.startswith(("perf/", "time/"))
        }
        assert {name: mine[name] for name in same} == pytest.approx(same, rel=1e-3, abs=1e-4)

    load = checkpoint.load_scorer if verb == "reward" else checkpoint.load
    for (name, value), other in zip(
        load(tmp_path / "one").state_dict().items(),
        load(tmp_path / "two").state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(other, value, rtol=0, atol=2e-3, msg=name)

    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


# --- the command line
# -----------------------------------------------------------------------------------------------


def test_help_lists_every_verb_in_the_papers_order(capsys):
    assert llama2() == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n  {name} ") for name in launch.VERBS]
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


SERVER = """
import os, signal, sys, threading
from multiprocessing import forkserver
from pathlib import Path
from llama2.recipe import launch

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
launch.preload()
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
    os.kill(forkserver._forkserver._forkserver_pid, number)  # it has only begun to import
out = Path(sys.argv[1])
workers = launch.Workers.start("world", {"out": str(out / "a"), "scale": 0.001}, 1, 1, out / "log")
while workers.alive():
    pass
print(workers.result())
"""


def test_signals_to_the_whole_group_do_not_reach_the_server_of_workers(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", SERVER, str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert (process.stdout, process.returncode) == ("done\n", 0), process.stderr


STARTING = """
import importlib, os, signal, sys
from llama2 import cli

signal.signal(signal.SIGINT, signal.default_int_handler)
load = importlib.import_module

def interrupted(name):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # as a library may do
        pass
    return load(name)

importlib.import_module = interrupted
cli.main(["run", "recipe.yaml"])
"""


def test_ctrl_c_while_modules_are_loaded_is_one_line():
    process = subprocess.run(
        [sys.executable, "-c", STARTING], capture_output=True, text=True, timeout=200
    )
    assert (process.returncode, process.stdout) == (130, "")
    assert process.stderr == "llama2: interrupted; the same command resumes\n"


def test_the_command_line_is_there_before_torch():
    """Ctrl-C in the first seconds finds its handler."""
    code = "import sys, llama2.cli; print([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "[]\n"
    )


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


def test_a_lock_outlives_no_process(tmp_path):
    workers = launch.Workers.start("world", {"out": str(tmp_path / "a")}, 1, 1, tmp_path / "log")
    wait_for(lambda: (tmp_path / "a/documents").exists())
    workers.kill()
    assert finish(workers) == "stopped"
    runs.lock(tmp_path / "a").close()
