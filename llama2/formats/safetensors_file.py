"""Read and write the safetensors format a tensor at a time.

A file is the length of its header (8 bytes), the header (JSON: name -> dtype, shape, begin and end
of its bytes) and the numbers. The safetensors package checks a header; its own writer wants all
tensors of a file in memory at once, and a checksum would need a second pass over the file. Here a
tensor is written while the next is read and the last is hashed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama2 import devices, json_files
from llama2.errors import UserError, explain_os_errors
from llama2.formats.stored_model import PartwiseRead, StoredTensor, read_ahead

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 2 << 20  # numbers read, converted and hashed at once
# bytes read or written at once: the system then keeps files in small blocks, which are at hand
_PART = 128 << 10


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name; reads no numbers.

    UserError for a file that is truncated or of another format.
    """
    json_files.check(path)
    try:
        with explain_os_errors(path), open(path, "rb") as file:
            with safe_open(_name_in_utf8(path, file), framework="pt", device=devices.CPU):
                pass  # the header is complete, and describes each byte of the file once

            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{path}: truncated or not a safetensors file ({error})", "fetch it again"
        ) from None

    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        place = f"{path}: tensor '{name}'"
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{place} is of the type {entry['dtype']}", "quantized checkpoints cannot be loaded"
            )

        offset, dtype = 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]]
        tensors[name] = _open_tensor(path, place, dtype, tuple(entry["shape"]), offset)

    return tensors


def _name_in_utf8(path: Path, file: BinaryIO) -> str:
    """Return a name of an open file for the library, which takes no name that is not UTF-8."""
    try:
        path.as_posix().encode()
    except UnicodeEncodeError:
        return f"/proc/self/fd/{file.fileno()}"

    return str(path)


def _open_tensor(
    path: Path,
    place: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    offset: int,
    once: bool = False,
) -> StoredTensor:
    def read() -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        with explain_os_errors(path), open(path, "rb", buffering=0) as file:
            file.seek(offset)
            if not _fill(file, memory(tensor), once):
                raise UserError(f"{place}: the file ends in it", "fetch it again")

        return tensor

    def list_parts() -> list[StoredTensor]:
        count = math.prod(shape)
        parts = []
        for start in range(0, count, _PIECE):
            size, begin = min(_PIECE, count - start), offset + start * dtype.itemsize
            parts.append(_open_tensor(path, place, dtype, (size,), begin, once=True))

        return parts

    return StoredTensor(shape, dtype, read if once else PartwiseRead(read, list_parts), place)


def _fill(file: FileIO, target: memoryview, once: bool) -> bool:
    """Read from the position of a file until `target` is full; False if the file ends before.

    With `once` the operating system drops its copy of the file. Else a large copy fills all memory
    with data that will not be read again, and where memory comes page by page from a hypervisor,
    that takes longer than the copy.
    """
    while target:
        begin, count = file.tell(), file.readinto(target[:_PART])
        if not count:
            return False

        if once and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), begin, count, os.POSIX_FADV_DONTNEED)

        target = target[count:]

    return True


def memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, not a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write(path: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None = None) -> str:
    """Write a file of these tensors, converted to `dtype` if given; return its SHA-256.

    The widest numbers go first, so that each tensor begins at a multiple of their size, as readers
    expect.
    """
    kinds = {name: dtype or stored.dtype for name, stored in tensors.items()}
    order = sorted(tensors, key=lambda name: -kinds[name].itemsize)
    digest = hashlib.sha256()

    with explain_os_errors(path), open(path, "wb") as file, ThreadPoolExecutor(1) as other:
        header = _make_header([(name, kinds[name], tensors[name]) for name in order])
        file.write(header)
        digest.update(header)
        parts = [(part, kinds[name]) for name in order for part in tensors[name].list_parts()]
        ahead = read_ahead(part for part, _ in parts)

        for part, kind in parts:
            hashed: deque[Future[None]] = deque()
            for piece in _convert(next(ahead), kind, part.place):
                hashed.append(other.submit(digest.update, piece))
                for start in range(0, len(piece), _PART):
                    file.write(piece[start : start + _PART])

                del piece
                if len(hashed) > 2:  # pieces that were converted are memory of their own
                    hashed.popleft().result()

            wait(hashed)

    return digest.hexdigest()


def _make_header(tensors: list[tuple[str, torch.dtype, StoredTensor]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, stored in tensors:
        begin, end = end, end + stored.count_bytes(dtype)
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(stored.shape),
            "data_offsets": [begin, end],
        }

    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _convert(tensor: Tensor, dtype: torch.dtype, place: str) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in pieces, each converted alone.

    So there is never a second copy of the whole tensor.
    """
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    for piece in tensor.detach().reshape(-1).split(_PIECE):  # type: ignore[no-untyped-call]
        converted = piece.to(dtype)
        if narrower and not is_finite(converted) and is_finite(piece):
            raise UserError(
                f"{place}: a number is too large for {str(dtype).removeprefix('torch.')}",
                "convert it to bf16, which has the range of fp32",
            )

        yield memory(converted)


def is_finite(tensor: Tensor) -> bool:
    """Return whether no number is infinite or undefined; one pass, without a copy."""
    if not tensor.numel():
        return True

    least, most = torch.aminmax(tensor)  # of which undefined numbers become both
    return bool(torch.isfinite(least) & torch.isfinite(most))
