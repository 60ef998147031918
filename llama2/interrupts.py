"""Ctrl-C while modules are loaded: it ends the process at once, with one line.

As an exception it would be raised inside of some library's import, which may swallow it or make another error of it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 130
"""the exit status of a command that Ctrl-C ended"""
MESSAGE = "llama2: interrupted; the same command resumes"


@contextmanager
def leave_at_once() -> Iterator[None]:
    """Nothing in this block needs an end of its own. Whoever handles or ignores Ctrl-C already goes on doing so."""
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
    """Ctrl-C comes when the block is left; processes begun in it never hear of one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
