"""Open the tensors of a GGUF file: plain ones as they are, quantized ones as the numbers they stand
for.

The library dequantizes in NumPy. Rows pass through it a few at a time, on all threads, and are
rounded to the type that is wanted, so a large matrix never exists in fp32 unless fp32 is wanted.
That takes 150 to 650 million numbers a second and thread, by the type: C++ would save a model of
seven billion parameters some seconds of a load.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama2.errors import UserError, explain_missing_extra
from llama2.formats.binary import FETCH_AGAIN, read_array
from llama2.formats.gguf_header import Header, TensorEntry
from llama2.formats.stored_model import PartwiseRead, StoredTensor

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 18  # numbers that a thread dequantizes at a time: they stay in its cache
_PART = 1 << 22  # numbers of a part


def import_library() -> ModuleType:
    """Return the library gguf. UserError where it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise explain_missing_extra("gguf", "gguf") from None

    logging.getLogger("gguf").setLevel(logging.ERROR)
    return gguf


def count_bytes(library: ModuleType, shape: tuple[int, ...], kind: Any) -> int:
    """Return the size of a tensor in a file."""
    block, size = library.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(block) * int(size)


def list_quantized(library: ModuleType, header: Header) -> tuple[str, ...]:
    """Return the names of the types in a file that are not plain numbers."""
    names = {library.GGMLQuantizationType(entry.kind).name for entry in header.tensors.values()}
    return tuple(sorted(names - PLAIN.keys()))


def open_tensor(
    library: ModuleType,
    path: Path,
    header: Header,
    name: str,
    dtype: torch.dtype = torch.float32,
) -> StoredTensor:
    """Return a tensor: of fp32, fp16 or bf16 as it is, a quantized one as `dtype`.

    UserError for a type that is unknown or cannot be read, for a tensor that does not fit its type
    or the file, and on reading for a number that is too large for `dtype`.
    """
    entry, place = header.tensors[name], f"{path}: {name}"
    kind = _find_kind(library, place, entry, header.size)
    if kind.name not in PLAIN:
        rows = _Rows(library, path, place, entry, kind, dtype)
        read = PartwiseRead(lambda: rows.read(0, rows.count), rows.list_parts)
        return StoredTensor(entry.shape, dtype, read, place)

    plain, count = PLAIN[kind.name], count_bytes(library, entry.shape, kind)

    def read_plain() -> Tensor:
        data = read_array(path, place, "u1", entry.offset, count)
        return torch.from_numpy(data).view(plain).view(entry.shape)

    return StoredTensor(entry.shape, plain, read_plain, place)


def _find_kind(library: ModuleType, place: str, entry: TensorEntry, size: int) -> Any:
    """Return the type of a tensor in a file of `size` bytes."""
    try:
        kind = library.GGMLQuantizationType(entry.kind)
    except ValueError:
        raise UserError(
            f"{place}: the type {entry.kind} is unknown", "a newer gguf library may know it"
        ) from None

    block, _ = library.GGML_QUANT_SIZES[kind]
    if entry.shape[-1] % block:
        raise UserError(
            f"{place}: rows of {entry.shape[-1]} do not divide into blocks of {block}", FETCH_AGAIN
        )

    end = entry.offset + count_bytes(library, entry.shape, kind)
    if end > size:
        raise UserError(
            f"{place}: truncated: the file ends at byte {size}, the tensor at {end}", FETCH_AGAIN
        )

    if kind.name not in PLAIN and not _can_dequantize(library, kind):
        raise UserError(
            f"{place}: the library gguf cannot read the type {kind.name}",
            "export it as F16 or Q8_0",
        )

    return kind


@functools.cache
def _can_dequantize(library: ModuleType, kind: Any) -> bool:
    dequantize: Callable[..., Any] = library.quants.dequantize
    try:
        dequantize(np.zeros((1, library.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False

    return True


@dataclass(frozen=True)
class _Rows:
    """The rows of a quantized tensor, of which any can be read: blocks lie inside rows."""

    library: ModuleType
    path: Path
    place: str
    entry: TensorEntry
    kind: Any
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return self.entry.shape[-1]

    @property
    def count(self) -> int:
        return math.prod(self.entry.shape[:-1])

    def list_parts(self) -> list[StoredTensor]:
        """Return the numbers as flat tensors, one of some rows after another."""
        parts, step = [], max(1, _PART // self.width)
        for first in range(0, self.count, step):
            last = min(first + step, self.count)
            read = functools.partial(self._read_flat, first, last)
            shape = ((last - first) * self.width,)
            parts.append(StoredTensor(shape, self.dtype, read, self.place))

        return parts

    def _read_flat(self, first: int, last: int) -> Tensor:
        return self.read(first, last).view(-1)

    def read(self, first: int, last: int) -> Tensor:
        """Return the rows from `first` to before `last`, in the shape of the whole if all are."""
        # a caller may be in inference mode, which threads do not inherit: they could not write then
        with torch.inference_mode(mode=False):
            numbers = torch.empty(last - first, self.width, dtype=self.dtype)

        step = max(1, _CHUNK // self.width)

        def fill(begin: int) -> None:
            end = min(begin + step, last)
            numbers[begin - first : end - first] = self._dequantize(begin, end)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(fill, range(first, last, step)):
                pass

        return numbers.view(self.entry.shape) if len(numbers) == self.count else numbers

    def _dequantize(self, first: int, last: int) -> Tensor:
        """Return some rows, rounded from fp32."""
        row = count_bytes(self.library, (self.width,), self.kind)
        offset = self.entry.offset + first * row
        data = read_array(self.path, self.place, "u1", offset, (last - first) * row)

        # as one row: the library takes 16 at a time, and short ones would cost it twice the time;
        # a damaged scale is found by whoever looks at the numbers
        with np.errstate(all="ignore"):
            values = self.library.quants.dequantize(data.reshape(1, -1), self.kind)

        numbers = torch.from_numpy(values).view(last - first, self.width)
        rounded = numbers.to(self.dtype)
        if self.dtype == torch.float16 and rounded.isinf().any() and numbers.isfinite().all():
            raise UserError(
                f"{self.place}: a number is too large for float16",
                "convert it to bf16, which has the range of fp32",
            )

        return rounded
