"""Ranks that are missing or gone: one line each, exit status 2, and never a wait without end."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

from llama2 import rendezvous
from llama2.errors import UserError
from llama2.ranks import Ranks

MEET = """
import os, sys  # PyTorch is loaded before the command line could hush it, so its environment does
from datetime import timedelta
from llama2 import cli, ranks, rendezvous
from llama2.stages import world

rendezvous.NOTICE, ranks.TIMEOUT = 0.2, timedelta(seconds=float(os.environ["LIMIT"]))

def work(config, run):
    print("met", flush=True)
    sys.stdin.readline()
    for _ in range(10000):
        run.ranks.barrier()

world.run = work
cli.main(["world", "--out", os.environ["OUT"]])
"""


@pytest.fixture
def start(tmp_path):
    """Start one rank of a command whose work is to wait for a word and then for the others."""
    started = []

    def rank(number, port, limit=60, **more):
        environment = {
            **os.environ,
            "RANK": str(number),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LIMIT": str(limit),
            "OUT": str(tmp_path / "out"),
            "TORCH_CPP_LOG_LEVEL": "FATAL",
            **more,
        }
        process = subprocess.Popen(
            [sys.executable, "-c", MEET],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)

        return process

    yield rank
    for process in started:
        process.kill()
        process.communicate()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("killed", [0, 1])
def test_the_rank_that_is_gone_is_named(start, killed):
    """Rank 0 keeps the addresses of all: it may be the one that is gone."""
    port = free_port()
    ranks = [start(number, port) for number in range(2)]
    for process in ranks:
        assert process.stdout.readline() == "met\n"

    ranks[killed].send_signal(signal.SIGKILL)
    _, said = ranks[1 - killed].communicate("go\n", timeout=200)
    assert ranks[1 - killed].returncode == 2
    lines = [line for line in said.splitlines() if "waits for the others" not in line]
    assert lines == [
        f"llama2: error: rank {killed} is gone (what it wrote last says why; nothing, if it was killed: "
        "out of memory?); start all ranks again: the same command resumes"
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_nobody_joins_says_so_and_ends(start, number):
    port = free_port()
    process = start(number, port, limit=3)
    heard, said = process.communicate(timeout=200)
    assert (process.returncode, heard) == (2, "")
    assert said.splitlines() == [
        f"rank {number} waits for the others at 127.0.0.1:{port} (2 in all)",
        f"llama2: error: rank {number} waited for the others at 127.0.0.1:{port} in vain; start all 2 ranks within "
        "3 seconds, with the same MASTER_ADDR and MASTER_PORT",
    ]


def test_a_late_rank_is_waited_for(start):
    port = free_port()
    first = start(0, port)
    assert (
        first.stderr.readline() == f"rank 0 waits for the others at 127.0.0.1:{port} (2 in all)\n"
    )
    second = start(1, port)

    for process in (first, second):
        assert process.stdout.readline() == "met\n"


def test_a_port_in_use_and_a_stranger_who_listens_there(start):
    with socket.create_server(("", 0)) as stranger:
        port = stranger.getsockname()[1]
        first, second = start(0, port, limit=2), start(1, port, limit=2)
        _, said = first.communicate(timeout=200)
        assert (first.returncode, said) == (
            2,
            f"llama2: error: MASTER_PORT={port}: another program uses this port; "
            "give all ranks another one (`torchrun --standalone` finds a free "
            "one)\n",
        )
        # it never answers, and PyTorch would wait for ever
        _, said = second.communicate(timeout=200)
        assert second.returncode == 2
        assert said.splitlines()[-1].startswith(
            f"llama2: error: rank 1 waited for the others at 127.0.0.1:{port} in"
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "2"}, "RANK=2: a number from 0 to 1 is wanted"),
        ({"RANK": "-1"}, "RANK=-1: a number from 0 to 1 is wanted"),
        ({"LOCAL_RANK": "z"}, "LOCAL_RANK=z: a number from 0 to 1 is wanted"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: the number of a port is wanted"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: the number of a port is wanted"),
        ({"MASTER_PORT": "²"}, "MASTER_PORT=²: the number of a port is wanted"),
    ],
)
def test_an_environment_in_which_nobody_could_meet(monkeypatch, given, message):
    for name, value in {
        "RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        **given,
    }.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(UserError, match=f"^{message}"):
        rendezvous.check(2)


def test_who_is_gone_is_told_by_process_and_machine(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", ""])
    # it has ended, and nobody has asked how: a zombie
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    machine, own = rendezvous.describe_process()
    monkeypatch.setattr(rendezvous, "DYING", 0)
    peers = [(machine, own), ("elsewhere", child.pid), (machine, child.pid)]
    assert rendezvous.find_missing(peers) == [2]
    child.wait()
    assert rendezvous.find_missing(peers) == [2]


def test_an_error_of_the_work_itself_keeps_its_traceback():
    ranks = replace(Ranks.alone(), peers=(rendezvous.describe_process(),))
    with pytest.raises(RuntimeError, match="store"), ranks.explain_disconnects():
        raise RuntimeError("the store is closed on Sundays")


def test_where_no_rank_is_missing_here_the_network_is_named(monkeypatch):
    monkeypatch.setattr(rendezvous, "DYING", 0)
    peers = (rendezvous.describe_process(), ("elsewhere", 1))
    ranks = replace(Ranks.alone(), peers=peers)
    code = compile(
        textwrap.dedent("""
        def fail(text):
            raise RuntimeError(text)
        """),
        "/lib/torch/distributed/x.py",
        "exec",
    )
    names = {}
    exec(code, names)

    for text, heard in (
        ("gloo: Connection closed by peer", "the connection to another rank is lost"),
        ("gloo: Timed out waiting 1200000ms", "another rank has not answered in time"),
    ):
        with pytest.raises(rendezvous.RankLost) as error, ranks.explain_disconnects():
            names["fail"](text)

        assert error.value.cause.startswith(heard)
        assert error.value.cure == rendezvous.RESUMES
