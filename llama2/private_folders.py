"""Folders of one's own: where programs and state are kept that this user alone may have written.

Whoever owns a folder, or may write there, decides what its readers run. The same holds for every
folder above it: who may write there can put another in its place. A folder like /tmp, where
everybody may write but nobody may rename what is another's, is no danger to what lies in it.
"""

from __future__ import annotations

import atexit
import errno
import grp
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

LINKS = 40  # as many as Linux follows


def list_folders() -> Iterator[Path]:
    """Give folders for what can be made again, in order of preference: the user's cache, a folder
    among the temporary."""
    with suppress(RuntimeError):  # no HOME, and a user without an entry
        home = os.environ.get("XDG_CACHE_HOME", "")
        yield (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "llama2"

    with suppress(FileNotFoundError):  # nowhere can anything be written
        yield Path(tempfile.gettempdir()) / f"llama2-{os.getuid()}"


@cache
def choose_folder() -> Path:
    """Return the first of them that is ours alone, made if it was not there; else a fresh one,
    removed at the end."""
    for each in list_folders():
        with suppress(OSError):
            make(each)
            return each

    fresh = tempfile.mkdtemp(prefix="llama2-")
    atexit.register(shutil.rmtree, fresh, ignore_errors=True)
    return Path(fresh)


def make(folder: Path) -> None:
    """Make `choose_folder` if it is not there. OSError unless this user alone could have put anything into
    it."""
    check_way(folder)
    for place in (*reversed(folder.absolute().parents), folder):
        with suppress(FileExistsError):
            place.mkdir(mode=0o700)

    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISLNK(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))

    check(folder)
    check_way(folder)
    if status.st_mode & 0o077:
        folder.chmod(0o700)


def check(path: Path) -> None:
    """PermissionError if another user could have written the file or folder `path`, or if it is a
    link."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "others could have written it", str(path))


def check_way(path: Path) -> None:
    """PermissionError if another user could put something else in the place of `path`, by any link
    on the way to it."""
    for place in _way(path):
        # whoever may write into / needs no trick
        if place.parent == place or not os.path.lexists(place):
            continue

        status = place.lstat()
        if status.st_uid not in (0, os.getuid()) or _is_open(status):
            raise PermissionError(errno.EPERM, "others may write there", str(place))


def _way(path: Path, links: int = 0) -> Iterator[Path]:
    """The folders and links that are passed on the way to `path`."""
    if links > LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))

    for place in reversed(path.absolute().parents):
        yield place
        if place.is_symlink():
            yield from _way(place.parent / place.readlink() / path.name, links + 1)


def _is_open(status: os.stat_result) -> bool:
    """Tell whether others than its owner may put something else in the place of what lies in this
    folder."""
    if not stat.S_ISDIR(status.st_mode) or status.st_mode & stat.S_ISVTX:
        return False

    group = status.st_mode & stat.S_IWGRP and not _is_own(status.st_gid)
    return bool(group or status.st_mode & stat.S_IWOTH)


def _is_own(group: int) -> bool:
    """Tell whether a group is the one that systems make for each user: with the user's number, and
    nobody else in it."""
    if not group == os.getgid() == os.getuid():
        return False

    try:
        return not grp.getgrgid(group).gr_mem
    except KeyError:
        return True
