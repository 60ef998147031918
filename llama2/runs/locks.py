"""One process writes a run at a time: an advisory lock on its directory."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from llama2 import atomic
from llama2.errors import UserError, explain_os_errors

LOCK = ".lock"
_NO_LOCKS = (
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOTTY,
    errno.EACCES,
    errno.EPERM,
)
"""how file systems (NFS, FUSE, 9p) and containers say that there are no locks"""


def lock(path: Path) -> IO[str]:
    """Make the directory this process's own until the file returned is closed; UserError if another
    has it."""
    with explain_os_errors(path):
        atomic.make(path)
        file = open(path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(file.fileno()).st_nlink:  # whoever held it has just cleared the directory
            file.close()
            return lock(path)
    except BlockingIOError:
        raise _in_use(path, file) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            file.close()
            with explain_os_errors(path):
                raise

        print(
            f"{path}: this file system has no locks, so nothing keeps a second process from "
            "writing this run",
            file=sys.stderr,
        )

    # a courtesy to whoever asks for the lock: a full disk is named when a file needs it
    with suppress(OSError):
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), str(os.getpid()).encode())

    return file


def _in_use(path: Path, file: IO[str]) -> UserError:
    with file:
        file.seek(0)
        owner = file.read().strip()

    process = f" (pid {owner})" if owner else ""
    return UserError(
        f"{path}: another process{process} is writing this run",
        "wait for it, or choose another --out",
    )
