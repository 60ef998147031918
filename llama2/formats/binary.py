"""What readers and writers of binary files share: arrays at an offset, and files that appear whole
or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from llama2 import atomic
from llama2.errors import UserError, explain_os_errors

FETCH_AGAIN = "fetch the file again, or make it again"


def in_single(number: float) -> float:
    """A number as fp32 holds it."""
    return float(np.float32(number))


def read_array(path: Path, place: str, dtype: str, offset: int, count: int) -> np.ndarray[Any, Any]:
    """`count` numbers from `offset` on. UserError if the file ends before, which it did not when it
    was opened."""
    with explain_os_errors(path):
        found = np.fromfile(path, dtype=dtype, count=count, offset=offset)

    if found.size != count:
        raise UserError(f"{place}: the file became shorter while it was read", FETCH_AGAIN)

    return found


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the name `file` when the block ends, and vanishes if it ends with
    an error."""
    with atomic.new_file(file) as work, open(work, "wb") as stream:
        yield stream
