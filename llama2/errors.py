"""The one error a user may see: a cause, a cure, and exit status 2.

Everything the user can cause (a misspelt key, a truncated file, a full disk) is raised as
`UserError` and shown by the command line as one line. Any other exception is a defect of this
package and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from llama2.terminal_text import LONGEST, fit_line

_LONGEST_CAUSE, _ROOM = LONGEST * 3 // 4, 40
"""characters of a cause, and of what is said around it and its cure"""


class UserError(Exception):
    """Something the user can mend: `cause` says what is wrong and where, `cure` what to do about
    it.

    Both are made fit for a terminal, one line of bounded length, for they name what stands in
    files.
    """

    exit_code = 2

    def __init__(self, cause: str, cure: str = "") -> None:
        self.cause = fit_line(cause, _LONGEST_CAUSE)
        self.cure = fit_line(cure, LONGEST - _LONGEST_CAUSE - _ROOM)
        super().__init__(f"{self.cause}; {self.cure}" if cure else self.cause)


_ELSEWHERE = (
    ConnectionError,
    BlockingIOError,
    ChildProcessError,
    InterruptedError,
    ProcessLookupError,
    TimeoutError,
    io.UnsupportedOperation,
)
"""what is said of a connection, a process or a descriptor"""
_RESUME = "free some space and run the same command again: it resumes"
_CAUSES = {
    errno.ENOSPC: ("no space left on the device", _RESUME),
    errno.EFBIG: (
        "the file would exceed the largest size allowed",
        "raise the limit (ulimit -f) and run the same command again: it resumes",
    ),
    errno.EDQUOT: ("the disk quota is used up", _RESUME),
    errno.ENOENT: ("no such file or directory", "check the path"),
    errno.EEXIST: ("a file of this name exists", "choose another name, or move it away"),
    errno.EACCES: ("permission denied", "check who owns it"),
    errno.EROFS: ("the file system is read-only", "choose another --out"),
    errno.EISDIR: ("this is a directory, a file was expected", "check the path"),
    errno.ENOTDIR: ("a part of this path is a file, not a directory", "check the path"),
    errno.ENAMETOOLONG: ("this name is too long for the file system", "choose a shorter one"),
    errno.ELOOP: (
        "symbolic links that lead in a circle",
        "mend the links, or name another path",
    ),
}
"""number of an error of the system -> its cause and cure"""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?` for the closest known name, in whatever case, else the list of
    known names."""
    names = sorted(known)
    lower = {each.lower(): each for each in reversed(names)}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f"did you mean '{lower[close[0]]}'?" if close else f"known: {', '.join(names) or 'none'}"


def explain_missing_extra(package: str, extra: str) -> UserError:
    """The error for an optional library that is not installed, with the line that installs it."""
    return UserError(
        f"this needs the package '{package}', which is not installed",
        f"pip install 'llama2[{extra}]'",
    )


@contextmanager
def explain_os_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn every refusal about `path` (full disk, missing file, no permission; a library's own)
    into `UserError`.

    An error of a connection, a process or a descriptor passes, unless it names a file: it is not
    about the path.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and (error.errno == errno.EBADF or isinstance(error, _ELSEWHERE)):
            raise
        if error.errno is None:  # a library's own
            raise UserError(
                f"{path}: {error or type(error).__name__}", "check the file and its disk"
            ) from error

        otherwise = (os.strerror(error.errno).lower(), "check the path and its disk")
        cause, cure = _CAUSES.get(error.errno, otherwise)
        # a refusal may name a file itself, as a text or as bytes
        is_named = isinstance(error.filename, (str, bytes)) and bool(error.filename)
        named = os.fsdecode(error.filename) if is_named else str(path)
        if error.errno == errno.EEXIST and os.path.islink(named) and not os.path.exists(named):
            cause = f"a link to {os.readlink(named)}, which is not there"
            cure = "bring back what it leads to (is its disk mounted?), or delete the link"

        raise UserError(f"{named}: {cause}", cure) from error
