"""Signals that ask a command to stop.

Ctrl-C while modules are loaded ends the process at once, with one line: as an exception it would be
raised inside of some library's import, which may swallow it or make another error of it.
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


def list_stop_signals() -> list[signal.Signals]:
    """Return the signals that ask for a stop with everything saved; a closed terminal is one,
    unless `nohup` made it none."""
    signals = [signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signals.append(signal.SIGHUP)

    return signals


def let_go_of_terminal(number: int) -> None:
    """Write to nowhere after SIGHUP: nobody reads, and each further line would be an error."""
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
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
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
def hold_back() -> Iterator[None]:
    """Let a signal to stop come when the block is left; processes begun in it never hear of it,
    unless they ask to.

    A terminal, `timeout`, Slurm and systemd send their signals to all processes of a command.
    """
    every = {signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, every)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
