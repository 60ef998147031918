"""Signals that ask a command to stop. Ctrl-C while modules are loaded ends the process at once,
with one line.

As an exception it would be raised inside of some library's import, which may swallow it or make
another error of it.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 130
"""the exit status of a command that Ctrl-C ended"""
MESSAGE = "llama2: interrupted; the same command resumes"


def requests() -> tuple[signal.Signals, ...]:
    """Return the signals that ask for a stop with everything saved; a closed terminal is one,
    unless `nohup` made it none."""
    ours = signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    return (signal.SIGTERM, signal.SIGUSR1, *((signal.SIGHUP,) if ours else ()))


def let_go_of_terminal(number: int) -> None:
    """Drop output to a terminal after SIGHUP: nobody reads, and writing would be an error of its
    own."""
    if number == signal.SIGHUP:
        nothing = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nothing, descriptor)

        os.close(nothing)


@contextmanager
def leave_at_once() -> Iterator[None]:
    """Let Ctrl-C in this block end the process at once: nothing in it needs an orderly end.

    Where Ctrl-C is handled or ignored already, that stays as it is.
    """
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{MESSAGE}\n".encode())
    os._exit(STATUS)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back what asks for a stop until the block is left; processes begun in it never hear of
    it, unless they ask to.

    A terminal, `timeout`, Slurm and systemd send their signals to all processes of a command.
    """
    every = {signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, every)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
