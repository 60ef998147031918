"""One stage carried out here and in processes of its own: what comes back, what is stopped, what a
crash leaves."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import pytest
import torch

from llama2 import runs
from llama2.config import build
from llama2.formats import checkpoint
from llama2.recipe import verbs
from llama2.recipe.workers import Workers, execute, preload
from llama2.runs import read_metrics


def finish(workers, seconds=200):
    end = time.time() + seconds
    while workers.are_alive():
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
    preload()


def test_workers_tell_how_it_went(tmp_path):
    workers = Workers.start(
        "world", {"out": str(tmp_path / "a"), "scale": 0.001}, 2, 1, tmp_path / "log"
    )
    assert finish(workers) == "done"
    assert (tmp_path / "a/COMPLETE").exists()
    workers = Workers.start(
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
    workers = Workers.start("nonsense", {"out": str(tmp_path / "a")}, 1, 1, tmp_path / "deep/log")
    assert (
        finish(workers) == f"a process ended with exit status 1; its log: {tmp_path / 'deep/log'}"
    )
    assert "KeyError: 'nonsense'" in (tmp_path / "deep/log").read_text()


def test_a_stage_without_checkpoints_stops_too(tmp_path):
    """It has nothing to save; what matters is that the recipe does not take it for a failure."""
    workers = Workers.start("world", {"out": str(tmp_path / "a")}, 1, 1, tmp_path / "log")
    wait_for(lambda: (tmp_path / "a/documents").exists())
    workers.stop()
    assert finish(workers) == "stopped"
    assert not (tmp_path / "a/COMPLETE").exists()


def test_one_rank_that_dies_takes_the_others_down(tmp_path):
    workers = Workers.start("world", {"out": str(tmp_path / "a")}, 2, 1, tmp_path / "log")
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
    workers = Workers.start("world", {"out": str(tmp_path / "a")}, 1, 1, tmp_path / "log")
    wait_for(lambda: (tmp_path / "a/documents").exists())
    held = (tmp_path / "a/.lock").read_text()
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    assert finish(workers, 20) == (
        "a worker process was killed (with the one that starts them; out of memory?); "
        f"its log: {tmp_path / 'log'}"
    )
    assert workers.killed
    wait_for(lambda: not alive(held))
    workers = Workers.start(
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

    workers = Workers.start(verb, {**values, "out": str(tmp_path / "two")}, 2, 1, tmp_path / "log")
    execute(verb, build(verbs.load(verb).Config, {**values, "out": tmp_path / "one"}))
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


SERVER = """
import os, signal, sys, threading
from multiprocessing import forkserver
from pathlib import Path
from llama2.recipe import launch
from llama2.recipe.workers import Workers, preload

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
preload()
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
    os.kill(forkserver._forkserver._forkserver_pid, number)  # it has only begun to import
out = Path(sys.argv[1])
workers = Workers.start("world", {"out": str(out / "a"), "scale": 0.001}, 1, 1, out / "log")
while workers.are_alive():
    pass
print(workers.result())
"""


def test_signals_to_the_whole_group_do_not_reach_the_server_of_workers(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", SERVER, str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert (process.stdout, process.returncode) == ("done\n", 0), process.stderr


def test_a_lock_outlives_no_process(tmp_path):
    workers = Workers.start("world", {"out": str(tmp_path / "a")}, 1, 1, tmp_path / "log")
    wait_for(lambda: (tmp_path / "a/documents").exists())
    workers.kill()
    assert finish(workers) == "stopped"
    runs.lock(tmp_path / "a").close()
