"""Files that outlast a power cut: what stands under a name is whole, and is still there afterwards.

To rename a file is enough against `kill -9`. Against a power cut the content must be on the disk
before the name, and the name, which is the directory's content, before anything that relies on it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama2.errors import explain_os_errors

# file systems that flush no directories
_CANNOT = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS}


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a whole file or nothing. Half of a surrogate pair, of a name that is no UTF-8, is spelt
    by its number."""
    content = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    with new_file(path) as work:
        work.write_bytes(content)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give the path of a file to write, which takes the name `path` when the block ends well and
    vanishes if it does not. UserError where the disk refuses."""
    work = path.with_name(path.name + ".tmp")
    with explain_os_errors(path):
        make(path.parent)
        try:
            yield work
            replace(work, path)
        except BaseException:  # half a file is of no use, and a full disk wants its room
            with suppress(OSError):
                work.unlink()

            raise


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Give an empty directory to fill, which takes the name `path` when the block ends well, in the
    place of what had it, and vanishes if it does not. UserError where the disk refuses."""
    work = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old")
    with explain_os_errors(path):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            yield work
            flush_tree(work)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)

            replace(work, path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def replace(temporary: Path, path: Path) -> None:
    """Give a finished file, or a directory whose content is flushed, its name; what had the name is
    gone."""
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def make(directory: Path) -> None:
    """Make a directory and those above it."""
    new = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for parent in dict.fromkeys(path.parent for path in new):
        flush(parent)


def flush_tree(directory: Path) -> None:
    """Put a directory with everything below it on the disk; what it links to elsewhere, too."""
    for above, folders, names in os.walk(directory, topdown=False):
        for name in (*names, *folders):
            flush(Path(above, name))

    flush(directory)


def flush_all(paths: Iterable[Path], directory: Path) -> None:
    """Put files below a directory on the disk, and that they are there."""
    above: dict[Path, None] = {directory: None}
    for path in paths:
        flush(path)
        above |= dict.fromkeys(place for place in path.parents if place.is_relative_to(directory))

    for place in above:
        flush(place)


def flush(path: Path) -> None:
    """Put a file's content, or a directory's list of names, on the disk."""
    if not path.is_file() and not path.is_dir():  # a pipe would wait; a link may lead nowhere
        return

    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if path.is_file() or error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)
