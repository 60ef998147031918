"""One stage at work: in this process, or in fresh ones, as a recipe runs stages side by side and
data-parallel.

Fresh processes are forked from a server that has imported everything once. They end with their
parent, and a rank that fails takes the others down.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from llama2 import ranks, rendezvous, runs
from llama2.config import StageConfig, build
from llama2.errors import UserError, explain_os_errors
from llama2.interrupts import hold_back
from llama2.ranks import Ranks
from llama2.recipe import verbs
from llama2.runs import Stopped

SERVER_GONE = 255
"""the exit status of a process whose parent, the server of workers, has ended"""
context = multiprocessing.get_context("forkserver")


def execute(verb: str, config: StageConfig) -> Ranks:
    """Carry out one stage in this process (and its torchrun ranks), unless it is finished; return
    these ranks."""
    joined = ranks.join()
    with joined.explain_disconnects(), runs.open_run(verb, config, joined) as run:
        if not run.finished:
            verbs.load(verb).run(config, run)

    return joined


def preload() -> None:
    """Start the server that every worker is forked from, and import the heavy modules in it once.

    It hears of no signal to stop.
    """
    context.set_forkserver_preload(["torch", "torch.distributed", "llama2.recipe.preloaded"])
    resource_tracker.ensure_running()  # first: to start it lets Ctrl-C through
    with hold_back():
        forkserver.ensure_running()


@dataclass
class Workers:
    """The processes of one stage, one a rank, which write to one log file."""

    processes: list[Any]
    lifelines: list[Connection]
    messages: Connection
    log: Path
    stopping: bool = False
    """whether they were asked to stop"""
    failure: int = 0
    """the exit status of the first that failed, negative if a signal ended it"""

    @property
    def killed(self) -> bool:
        """Return whether the system, not the work, ended a process: there is nothing to mend."""
        return not self.stopping and (self.failure < 0 or self.failure == SERVER_GONE)

    @classmethod
    def start(
        cls, verb: str, values: Mapping[str, Any], count: int, threads: int, log: Path
    ) -> Workers:
        """Fork the `count` ranks of one stage, `threads` for each, with the configuration
        `values`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        receive, send = context.Pipe(duplex=False)
        workers = cls([], [], receive, log)
        port = str(_find_free_port())

        for rank in range(count):
            theirs, ours = context.Pipe(duplex=False)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            process = context.Process(
                target=_work,
                args=(verb, dict(values), environment, threads, str(log), theirs, send),
            )
            process.start()
            theirs.close()
            workers.processes.append(process)
            workers.lifelines.append(ours)

        send.close()
        return workers

    def are_alive(self) -> bool:
        """Return whether any rank still runs; one that failed takes down the others, which would
        wait for it forever."""
        if self._find_failure():
            for process in self.processes:
                process.kill()

            for lifeline in self.lifelines:  # without the server of workers no signal reaches them
                lifeline.close()

        return any(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        """Ask for a checkpoint and a clean exit; a stage without checkpoints ends at once and
        starts over next time."""
        self.stopping = True
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End them at once."""
        self.stopping = True
        for process in self.processes:
            process.kill()

    def result(self) -> str:
        """'done', 'stopped' or the text of an error, once no rank is alive."""
        for process in self.processes:
            process.join()

        self._find_failure()
        outcomes = self._receive()
        errors = [text for text in outcomes if text not in ("done", "stopped")]
        # the others only miss the one that failed
        causes = [text for text in errors if not text.endswith(rendezvous.RESUMES)]
        if causes:
            return causes[0]

        ended = {process.exitcode for process in self.processes}
        if self.stopping and ended & {-signal.SIGTERM, -signal.SIGKILL}:
            return "stopped"
        if self.killed:
            return f"a worker process was killed ({self._describe_kill()}); its log: {self.log}"
        if errors:
            return errors[0]
        if self.failure:
            return f"a process ended with exit status {self.failure}; its log: {self.log}"

        return "stopped" if "stopped" in outcomes else "done"

    def _find_failure(self) -> int:
        """Note and return the exit status of the first rank that failed, 0 if none did."""
        failures = [process.exitcode for process in self.processes if process.exitcode]
        if failures and not self.failure:
            self.failure = failures[0]

        return self.failure

    def _receive(self) -> list[str]:
        """Return what the ranks said of how they ended; one that was killed says nothing."""
        outcomes: list[str] = []
        try:
            while self.messages.poll():
                outcomes.append(self.messages.recv())
        except EOFError:
            pass

        return outcomes

    def _describe_kill(self) -> str:
        how = f"signal {-self.failure}" if self.failure < 0 else "with the one that starts them"
        by_memory = self.failure in (-signal.SIGKILL, SERVER_GONE)
        return f"{how}; out of memory?" if by_memory else how


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(
    verb: str,
    values: dict[str, Any],
    environment: dict[str, str],
    threads: int,
    log: str,
    lifeline: Connection,
    messages: Connection,
) -> None:
    """Be one rank of one stage: its output goes to the log, its outcome to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; it sends SIGTERM
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()

    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(threads)

    try:
        with explain_os_errors(values.get("out", "output")):
            execute(verb, build(verbs.load(verb).Config, values))

        messages.send("done")
    except Stopped:
        messages.send("stopped")
    except UserError as error:
        messages.send(str(error))
        raise SystemExit(error.exit_code) from None

    ranks.exit_now()


def _die_with_parent(lifeline: Connection) -> None:
    """Wait until the parent's end of the pipe closes, then end at once: no orphan holds a run."""
    try:
        lifeline.recv()
    except EOFError:
        os._exit(1)
