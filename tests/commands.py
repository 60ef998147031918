"""The command line in this process, and in one of its own that is sent a signal at a chosen step or
part."""

from __future__ import annotations

import json
import os
import signal
import traceback
from pathlib import Path
from typing import Any

import torch

from llama2 import cli
from llama2.recipe.workers import context, preload
from llama2.runs import completion, parts
from llama2.runs.sealed import seal
from llama2.train import hooks


def llama2(*words: object) -> int:
    """Carry out one command here; its exit status."""
    return cli._guarded([str(word) for word in words])


def vouch(*runs: Path) -> None:
    """Let finished runs say that they wrote what they hold now, which a test has put there."""
    for run in runs:
        manifest = json.loads((run / completion.MANIFEST).read_text())
        manifest.pop("sum", None)
        (run / completion.MANIFEST).write_text(seal(manifest))
        seconds = json.loads((run / completion.COMPLETE).read_text())["seconds"]
        (run / completion.COMPLETE).write_text(completion.make_mark(run, seconds))


def in_a_process(log: Path, *words: object, number: int = 0, step: int = 0, part: int = 0) -> int:
    """Carry out one command in a process that sends itself signal `number` after update `step`; its
    exit status.

    With `part` it sends it when it has written half of that part (counted from 1) of work in parts.
    The process is forked from a server that has imported everything; what it prints goes to `log`.
    """
    preload()
    process = context.Process(
        target=_child, args=([str(w) for w in words], number, step, part, str(log))
    )
    process.start()
    process.join(240)

    if process.is_alive():
        process.kill()
        raise AssertionError(f"it hangs: {log.read_text()}")

    assert process.exitcode is not None
    return int(process.exitcode)


def _child(words: list[str], number: int, step: int, part: int, log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    # the server of workers does not listen to it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def send(self: Any, training: Any, report: Any) -> None:
        if number and report.step == step:
            os.kill(os.getpid(), number)

    written = parts._Finished.append
    appended: list[int] = []

    def append(self: Any, first: int, count: int, rows: Any) -> None:
        written(self, first, count, rows)
        appended.append(first)
        if len(appended) == part:
            size = self.path.stat().st_size
            os.truncate(self.path, size - len(self.path.read_bytes().splitlines()[-1]) // 2)
            os.kill(os.getpid(), number)

    hooks.Signals.on_step = send  # type: ignore[method-assign]
    parts._Finished.append = append  # type: ignore[method-assign]
    try:
        status = cli._guarded(words)
    except BaseException:
        traceback.print_exc()
        status = 1

    os._exit(status)
