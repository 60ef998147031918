"""What readers and writers of binary files share: arrays at an offset, files that appear whole or not at all, the
order of dimensions inside heads, and the shapes a configuration asks for.

Shapes: R rows, D columns.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from llama2.errors import UserError, explain_os_errors
from llama2.model.llama import Llama, LlamaConfig

FETCH_AGAIN = "fetch the file again, or make it again"


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a language model, in the order of its state dict."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Llama(config).state_dict().items()}


def rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """How many heads the rows of a tensor divide into if it makes queries or keys, which alone are rotated."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else None


def interleaved(weight_RD: Tensor, heads: int) -> Tensor:
    """Rows whose rotary pairs lie half a head apart (ours), put so that pairs are neighbours (Meta's, llama.cpp's)."""
    rows, columns = weight_RD.shape
    return weight_RD.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def halved(weight_RD: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    rows, columns = weight_RD.shape
    return weight_RD.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_array(path: Path, place: str, dtype: str, offset: int, count: int) -> np.ndarray[Any, Any]:
    """`count` numbers from `offset` on. UserError if the file ends before, which it did not when it was opened."""
    with explain_os_errors(path):
        found = np.fromfile(path, dtype=dtype, count=count, offset=offset)
    if found.size != count:
        raise UserError(f"{place}: the file became shorter while it was read", FETCH_AGAIN)
    return found


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the name `file` when the block ends, and vanishes if it ends with an error."""
    temporary = file.with_name(f".{file.name}.tmp")
    with explain_os_errors(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as stream:
                yield stream
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def kept(content: bytes, name: str) -> Path:
    """A file of this content that lives as long as the process: for what stands inside another file."""
    path = _directory() / hashlib.sha256(content).hexdigest() / name
    with explain_os_errors(path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return path


@functools.cache
def _directory() -> Path:
    path = tempfile.mkdtemp(prefix="llama2-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)
