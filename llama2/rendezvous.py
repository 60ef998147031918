"""Meeting the other ranks, and plain words where one is missing or gone.

When a rank is killed, the others hear only that a connection was closed. Where it ran on the same
machine, they look whether its process is still there, and name it.
"""

from __future__ import annotations

import errno
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from llama2.errors import UserError

NOTICE = 30
"""seconds after which a rank says that it waits for the others"""
DYING = 3
"""seconds in which a process is gone whose connections were closed"""
RESUMES = "start all ranks again: the same command resumes"
_SIGNS = (
    "gloo",
    "nccl",
    "connection closed",
    "connection reset",
    "connection was reset",
    "broken pipe",
    "timed out",
    "timeout",
    "socket",
    "recv",
    "store",
)

Peer = tuple[str, int]
"""a machine (or container) and the number of a process on it"""


class RankLost(UserError):
    """Another rank has gone, or does not answer."""


def check(ranks: int) -> None:
    """UserError unless the environment says which rank this is and where the others are found."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={ranks}, but {' and '.join(missing)} is not set",
            "start the ranks with torchrun, or unset WORLD_SIZE to run alone",
        )

    for name, most, what in (
        ("RANK", ranks - 1, f"a number from 0 to {ranks - 1}"),
        ("LOCAL_RANK", ranks - 1, f"a number from 0 to {ranks - 1}"),
        ("MASTER_PORT", 65535, "the number of a port"),
    ):
        text = os.environ.get(name, "0")
        if not (text.isascii() and text.isdecimal() and int(text) <= most) or (
            name == "MASTER_PORT" and not int(text)
        ):
            raise UserError(
                f"{name}={text}: {what} is wanted", "start the ranks with torchrun, or mend it"
            )


@contextmanager
def await_ranks(ranks: int, limit: timedelta) -> Iterator[None]:
    """Wait at most `limit` for the ranks to meet in this block; UserError if they do not."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    rank, seconds = os.environ["RANK"], limit.total_seconds()
    cure = (
        f"start all {ranks} ranks within {_span(seconds)}, with the same MASTER_ADDR and "
        "MASTER_PORT"
    )
    cause = f"rank {rank} waited for the others at {place} in vain"

    def wait() -> None:
        print(
            f"rank {rank} waits for the others at {place} ({ranks} in all)",
            file=sys.stderr,
            flush=True,
        )

    def give_up() -> None:  # whoever listens there is no rank, and does not answer
        print(f"llama2: error: {UserError(cause, cure)}", file=sys.stderr, flush=True)
        os._exit(UserError.exit_code)

    timers = [threading.Timer(NOTICE, wait), threading.Timer(1.5 * seconds + DYING, give_up)]
    for timer in timers:
        timer.daemon = True
        timer.start()

    try:
        yield
    except (RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT={os.environ['MASTER_PORT']}: another program uses this port",
                "give all ranks another one (`torchrun --standalone` finds a free one)",
            ) from error
        if os.strerror(errno.EMFILE).lower() in str(error).lower():
            raise UserError(
                f"rank {rank}: too many open files", "raise the limit (`ulimit -n`)"
            ) from error
        if isinstance(error, RuntimeError) and not is_disconnect(error):
            raise

        raise UserError(cause, cure) from error
    finally:
        for timer in timers:
            timer.cancel()


def describe_process() -> Peer:
    """Return this process as others of the same machine can find it."""
    try:
        space = os.readlink("/proc/self/ns/pid")  # containers number their processes anew
    except OSError:
        space = ""

    return f"{platform.node()} {space}", os.getpid()


def is_disconnect(error: RuntimeError) -> bool:
    """Tell whether an error of the transport between ranks says that another is gone."""
    text = str(error).lower()
    return _is_between_ranks(error) and any(sign in text for sign in _SIGNS)


def _is_between_ranks(error: RuntimeError) -> bool:
    frame, names = error.__traceback__, []
    while frame is not None:
        names.append(frame.tb_frame.f_code.co_filename)
        frame = frame.tb_next

    return any("/torch/distributed/" in name for name in names)


def explain_disconnect(error: RuntimeError, peers: Sequence[Peer]) -> RankLost:
    """Return the error to raise for one of the transport: which of the ranks is gone, if that can
    be told."""
    gone = find_missing(peers)
    if gone:
        ranks = f"rank {gone[0]} is" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))} are"
        return RankLost(
            f"{ranks} gone (what it wrote last says why; nothing, if it was killed: "
            "out of memory?)",
            RESUMES,
        )

    if "timed out" in str(error).lower():
        return RankLost("another rank has not answered in time", RESUMES)

    return RankLost(
        "the connection to another rank is lost (it ended or was killed, or the network failed)",
        RESUMES,
    )


def find_missing(peers: Sequence[Peer]) -> list[int]:
    """Return the ranks of this machine whose processes have ended. One that is about to is waited
    for."""
    machine, _ = describe_process()
    end = time.monotonic() + DYING
    while True:
        gone = [
            rank
            for rank, (place, pid) in enumerate(peers)
            if place == machine and not _is_running(pid)
        ]
        if gone or time.monotonic() > end:
            return gone

        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
            not in "ZX"
        )
    except OSError:
        pass

    try:  # it is gone, or there is no /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass

    return True


def _span(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"
