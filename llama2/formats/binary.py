"""Read arrays at an offset, and write files that appear complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from llama2 import atomic
from llama2.errors import UserError, explain_os_errors

FETCH_AGAIN = "fetch the file again, or make it again"


def round_to_single(number: float) -> float:
    """Round a number to fp32."""
    return float(np.float32(number))


def read_array(path: Path, place: str, dtype: str, offset: int, count: int) -> np.ndarray[Any, Any]:
    """Read `count` numbers from `offset` on.

    UserError if the file has become shorter since its head was read.
    """
    with explain_os_errors(path):
        numbers = np.fromfile(path, dtype=dtype, count=count, offset=offset)

    if numbers.size != count:
        raise UserError(f"{place}: the file became shorter while it was read", FETCH_AGAIN)

    return numbers


@contextmanager
def replace_file(file: Path) -> Iterator[IO[bytes]]:
    """Open a file to write that takes the name `file` when the block ends, and vanishes if it ends
    with an error."""
    with atomic.new_file(file) as work, open(work, "wb") as stream:
        yield stream
