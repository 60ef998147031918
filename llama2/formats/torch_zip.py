"""PyTorch's own files (`.pth`, `.bin`), read and written a tensor at a time, and without running
anything in them.

Such a file is a zip archive whose members are stored as they are: `<name>/data.pkl`, a pickled
dictionary of tensors without their numbers, and one member `<name>/data/<key>` for each storage. A
pickle is a program. The reader here resolves the handful of names that a dictionary of tensors
needs, to functions of its own, and refuses every other, as `torch.load(weights_only=True)` does; it
then reads the numbers of one tensor when that one is asked for. The writer knows all shapes
beforehand, so the dictionary goes first and the tensors after it one by one, where `torch.save`
would want them all at once. Both keep to the checksums of the zip format: a flipped bit is found.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from llama2 import json_files
from llama2.errors import UserError, explain_os_errors
from llama2.formats.stored_model import StoredTensor
from llama2.reading.packed import DAMAGE

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
AGAIN = "fetch it again"
_HEADER, _ALIGNMENT, _CHUNK = 30, 64, 1 << 24


# ---- reading
# --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Member:
    """Where the bytes of a member lie in the file."""

    offset: int
    size: int
    checksum: int = 0  # 0: written without (torch.serialization.set_crc32_options(False))


@dataclass(frozen=True)
class Storage:
    """Numbers of one kind in one member."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class View:
    """A tensor as the pickle describes it: a window on a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """One past the last number of the storage that it sees."""
        return (
            self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride)) + 1
        )

    def is_contiguous(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride)):
            if size != 1 and step != expected:
                return False

            expected *= size

        return True


class Reader(pickle._Unpickler):
    """Reads a dictionary of tensors and nothing else: no name of a pickle is ever imported.

    It is Python's unpickler in Python: the one in C takes memory for any length that a damaged file
    may spell.
    """

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError(f"'{kind}' is no storage of numbers")

        return Storage(str(key), dtype, count)

    def find_class(self, module: str, name: str) -> Any:
        def tensor(storage: Storage, offset: int, shape: Any, stride: Any, *_: Any) -> View:
            return View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))

        def parameter(data: View, *_: Any) -> View:
            return data

        if module == "torch" and name in STORAGES:
            return STORAGES[name]

        # Made anew for each file: what a hostile one might do to them ends with it.
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): parameter,
        }
        if (module, name) not in known:
            raise _Refused(f"{module}.{name}")

        return known[module, name]


class _Refused(Exception):
    """A pickle names something that no dictionary of tensors needs."""


def entries(path: Path) -> dict[str, StoredTensor]:
    """The tensors in a file that `torch.save` made of a state dict, by name. Reads no numbers yet.

    UserError for a truncated file, one that holds anything but tensors, or code, and for a tensor
    that lies outside its storage; later, from `StoredTensor.read`, for numbers that do not match their
    checksum.
    """
    with explain_os_errors(path), json_files.opened(path) as file:
        members = _members(path, file)
        root = next(
            (name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None
        )
        if root is None:
            raise UserError(
                f"{path}: a zip file, but not one of PyTorch's (it has no data.pkl)", AGAIN
            )
        if (order := members.get(f"{root}byteorder")) and _bytes(
            path, file, order, "byteorder"
        ) != sys.byteorder.encode():
            raise UserError(
                f"{path}: its numbers have another byte order than this machine",
                "save it again here",
            )

        content = _bytes(path, file, members[f"{root}data.pkl"], "data.pkl")

    views = described(path, Reader(io.BytesIO(content)))
    return {
        name: stored(path, name, view, members.get(f"{root}data/{view.storage.key}"))
        for name, view in views.items()
    }


def _members(path: Path, file: IO[bytes]) -> dict[str, Member]:
    try:
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
    except (*DAMAGE, NotImplementedError, OSError) as error:
        raise UserError(f"{path}: truncated, or not a file of PyTorch's ({error})", AGAIN) from None

    size = file.seek(0, io.SEEK_END)
    found = {}
    for item in listed:
        file.seek(max(0, item.header_offset))
        header = file.read(_HEADER)
        if (
            item.header_offset < 0
            or len(header) < _HEADER
            or header[:4] != b"PK\3\4"
            or item.compress_type != zipfile.ZIP_STORED
        ):
            raise UserError(f"{path}: the member {item.filename} is damaged or compressed", AGAIN)

        name, extra = struct.unpack("<HH", header[26:30])
        begin = item.header_offset + _HEADER + name + extra
        if begin + item.file_size > size:
            raise UserError(f"{path}: truncated in {item.filename}", AGAIN)

        found[item.filename] = Member(begin, item.file_size, item.CRC)

    return found


def _bytes(path: Path, file: IO[bytes], member: Member, name: str) -> bytes:
    file.seek(member.offset)
    content = file.read(member.size)
    if member.checksum and zlib.crc32(content) != member.checksum:
        raise UserError(f"{path}: {name} does not match its checksum", AGAIN)

    return content


def described(path: Path, reader: Reader) -> dict[str, View]:
    """The state dict that a pickle describes. UserError for code, for anything but tensors, and for
    a damaged one."""
    try:
        found = reader.load()
    except _Refused as refused:
        raise UserError(
            f"{path}: refused, for reading it would call '{refused}', which no file of weights needs",
            "take the weights from where you trust them, best as safetensors",
        ) from None
    except Exception as error:  # a damaged pickle raises whatever the bytes happen to spell
        raise UserError(
            f"{path}: its list of tensors is damaged ({type(error).__name__}: {error})", AGAIN
        ) from None

    if not isinstance(found, dict):
        raise UserError(
            f"{path}: it holds a {type(found).__name__}, a dictionary of tensors was expected",
            "save model.state_dict()",
        )

    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, View):
            raise UserError(f"{path}: '{name}' is no tensor", "save model.state_dict() alone")

    return dict(found)


def stored(path: Path, name: str, view: View, member: Member | None) -> StoredTensor:
    """A tensor whose numbers lie in `member`. UserError if they do not, or if the tensor is larger
    than they are."""
    place = f"{path}: tensor '{name}'"
    size = view.storage.count * view.storage.dtype.itemsize
    if member is None or member.size != size:
        raise UserError(
            f"{place}: its numbers take {size} bytes, the file has {member.size if member else 'none'}",
            AGAIN,
        )
    if (
        min((*view.shape, *view.stride, view.offset), default=0) < 0
        or len(view.shape) != len(view.stride)
        or (view.count and view.end > view.storage.count)
    ):
        raise UserError(f"{place}: it lies outside its storage", AGAIN)

    return StoredTensor(
        view.shape, view.storage.dtype, lambda: _read(path, place, view, member), place
    )


def _read(path: Path, place: str, view: View, member: Member) -> Tensor:
    """A copy of a tensor: its own numbers if they lie in one piece, else its storage's, of which it
    is a window."""
    dtype = view.storage.dtype
    whole = not view.is_contiguous() or view.count == view.storage.count
    begin, count = (0, view.storage.count) if whole else (view.offset, view.count)
    numbers = torch.empty(count, dtype=dtype)
    memory = numbers.view(torch.uint8).numpy().data
    checksum = 0

    with explain_os_errors(path), open(path, "rb") as file:
        file.seek(member.offset + begin * dtype.itemsize)
        for start in range(0, len(memory), _CHUNK):
            part = memory[start : start + _CHUNK]
            if file.readinto(part) != len(part):
                raise UserError(f"{place}: the file ends in it", AGAIN)

            checksum = zlib.crc32(part, checksum)

    if whole and member.checksum and checksum != member.checksum:
        raise UserError(f"{place}: its numbers do not match their checksum", AGAIN)
    if view.is_contiguous():
        return numbers.view(view.shape)

    return numbers.as_strided(view.shape, view.stride, view.offset).contiguous()


# ---- writing
# --------------------------------------------------------------------------------------------------------
class _Described:
    """A tensor that pickles as `torch.save` would have pickled it."""

    def __init__(self, key: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.storage, self.shape = Storage(str(key), dtype, math.prod(shape)), shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride = tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (
            self.storage,
            0,
            self.shape,
            stride,
            False,
            OrderedDict(),
        )


class _Writer(pickle.Pickler):
    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, Storage):
            return None

        kind = next(name for name, dtype in STORAGES.items() if dtype == item.dtype)
        return "storage", getattr(torch, kind), item.key, "cpu", item.count


@contextmanager
def create(
    path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> Iterator[Callable[[Tensor], None]]:
    """Write a file that `torch.load(path, weights_only=True, mmap=True)` opens, its tensors given
    one at a time.

    Gives a function that takes the tensors in the order of `layout` (name -> shape and dtype).
    ValueError for one that does not fit, and at the end for those that are lacking.
    """
    described = {name: _Described(key, *form) for key, (name, form) in enumerate(layout.items())}
    content = io.BytesIO()
    _Writer(content, protocol=2).dump(described)
    waiting = list(described.items())[::-1]

    with explain_os_errors(path), zipfile.ZipFile(path, "w") as archive:
        _add(archive, f"{path.stem}/data.pkl", content.getbuffer())
        _add(archive, f"{path.stem}/byteorder", memoryview(sys.byteorder.encode()))

        def write(tensor: Tensor) -> None:
            name, item = waiting.pop()
            if tuple(tensor.shape) != item.shape or tensor.dtype != item.storage.dtype:
                raise ValueError(
                    f"{name}: {tensor.dtype} {list(tensor.shape)} for {item.storage.dtype} "
                    f"{list(item.shape)}"
                )

            numbers = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
            _add(archive, f"{path.stem}/data/{item.storage.key}", numbers.data)

        yield write
        if waiting:
            raise ValueError(f"{path}: not all of its tensors were given: {waiting[-1][0]}, ...")

        _add(archive, f"{path.stem}/version", memoryview(b"3\n"))


def _add(archive: zipfile.ZipFile, name: str, content: memoryview) -> None:
    """A member whose bytes begin at a multiple of 64, as PyTorch's do, so that they can be mapped
    into memory."""
    item = zipfile.ZipInfo(name)
    item.file_size = len(content)
    long = len(content) >= 1 << 30  # zipfile then adds 20 bytes to the header
    begin = archive.fp.tell() + _HEADER + len(name.encode()) + 20 * long + 4  # type: ignore[union-attr]
    padding = -begin % _ALIGNMENT
    item.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding

    with archive.open(item, "w", force_zip64=long) as file:
        for start in range(0, len(content), _CHUNK):
            file.write(content[start : start + _CHUNK])
