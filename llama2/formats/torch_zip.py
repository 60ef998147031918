"""Read and write PyTorch's own files (`.pth`, `.bin`) a tensor at a time, and run nothing in them.

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

from llama2 import devices, json_files
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
OTHER_ORDER = "its numbers have another byte order than this machine"
_HEADER, _ALIGNMENT, _CHUNK = 30, 64, 1 << 24


# --- descriptions of tensors ---
@dataclass(frozen=True)
class Extent:
    """The bytes of a member in the file."""

    offset: int
    size: int
    checksum: int = 0  # 0: written without (torch.serialization.set_crc32_options(False))


@dataclass(frozen=True)
class Storage:
    """Numbers of one kind in one member."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        """The size of the numbers in bytes."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class TensorView:
    """A tensor in a pickle: a window on a storage. It pickles as `torch.save` pickles a tensor."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def count(self) -> int:
        """The count of its numbers."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """One past its last number in the storage."""
        return 1 + self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride))

    def is_contiguous(self) -> bool:
        """Return whether its numbers lie in one piece, row after row."""
        dimensions = zip(self.shape, self.stride, _count_strides(self.shape))
        return all(size == 1 or step == expected for size, step, expected in dimensions)

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, (
            self.storage,
            self.offset,
            self.shape,
            self.stride,
            False,
            OrderedDict(),
        )


def _count_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


# --- reading ---
class TensorUnpickler(pickle._Unpickler):
    """Read a dictionary of tensors and nothing else: no name of a pickle is ever imported.

    It is Python's unpickler in Python: the one in C takes memory for any length that a damaged file
    may spell.
    """

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a persistent id describes."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError(f"'{kind}' is no storage of numbers")

        return Storage(str(key), dtype, count)

    def find_class(self, module: str, name: str) -> Any:
        """Return our own function for a name that tensors need; refuse every other."""

        def make_view(
            storage: Storage, offset: int, shape: Any, stride: Any, *_: Any
        ) -> TensorView:
            return TensorView(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))

        if module == "torch" and name in STORAGES:
            return STORAGES[name]

        # Made anew for each file: what a hostile one might do to them ends with it.
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): make_view,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if (module, name) not in known:
            raise _Refused(f"{module}.{name}")

        return known[module, name]


class _Refused(Exception):
    """A pickle names something that no dictionary of tensors needs."""


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors in a file that `torch.save` made of a state dict; reads no numbers yet.

    UserError for a truncated file, one that holds anything but tensors, or code, and for a tensor
    that lies outside its storage; later, from `StoredTensor.read`, for numbers that do not match
    their checksum.
    """
    with explain_os_errors(path), json_files.open_file(path) as file:
        members = _list_members(path, file)
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if not pickles:
            raise UserError(
                f"{path}: a zip file, but not one of PyTorch's (it has no data.pkl)", AGAIN
            )

        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in members:
            order = _read_bytes(path, file, members[f"{root}byteorder"], "byteorder")
            if order != sys.byteorder.encode():
                raise UserError(f"{path}: {OTHER_ORDER}", "save it again here")

        content = _read_bytes(path, file, members[f"{root}data.pkl"], "data.pkl")

    views = read_views(path, TensorUnpickler(io.BytesIO(content)))
    return {
        name: open_tensor(path, name, view, members.get(f"{root}data/{view.storage.key}"))
        for name, view in views.items()
    }


def _list_members(path: Path, file: IO[bytes]) -> dict[str, Extent]:
    try:
        with zipfile.ZipFile(file) as archive:
            items = archive.infolist()
    except (*DAMAGE, NotImplementedError, OSError) as error:
        raise UserError(f"{path}: truncated, or not a file of PyTorch's ({error})", AGAIN) from None

    size = file.seek(0, io.SEEK_END)
    members = {}
    for item in items:
        file.seek(max(0, item.header_offset))
        header = file.read(_HEADER)
        is_whole = item.header_offset >= 0 and len(header) == _HEADER and header[:4] == b"PK\3\4"
        if not is_whole or item.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: the member {item.filename} is damaged or compressed", AGAIN)

        name, extra = struct.unpack("<HH", header[26:30])
        begin = item.header_offset + _HEADER + name + extra
        if begin + item.file_size > size:
            raise UserError(f"{path}: truncated in {item.filename}", AGAIN)

        members[item.filename] = Extent(begin, item.file_size, item.CRC)

    return members


def _read_bytes(path: Path, file: IO[bytes], member: Extent, name: str) -> bytes:
    file.seek(member.offset)
    content = file.read(member.size)
    if member.checksum and zlib.crc32(content) != member.checksum:
        raise UserError(f"{path}: {name} does not match its checksum", AGAIN)

    return content


def read_views(path: Path, reader: TensorUnpickler) -> dict[str, TensorView]:
    """Read the state dict in a pickle. UserError for code, anything but tensors, and damage."""
    try:
        views = reader.load()
    except _Refused as refused:
        raise UserError(
            f"{path}: refused, for reading it would call '{refused}', which no file of weights "
            "needs",
            "take the weights from where you trust them, best as safetensors",
        ) from None
    except Exception as error:  # a damaged pickle raises whatever the bytes happen to spell
        raise UserError(
            f"{path}: its list of tensors is damaged ({type(error).__name__}: {error})", AGAIN
        ) from None

    if not isinstance(views, dict):
        raise UserError(
            f"{path}: it holds a {type(views).__name__}, a dictionary of tensors was expected",
            "save model.state_dict()",
        )

    for name, value in views.items():
        if not isinstance(name, str) or not isinstance(value, TensorView):
            raise UserError(f"{path}: '{name}' is no tensor", "save model.state_dict() alone")

    return dict(views)


def open_tensor(path: Path, name: str, view: TensorView, member: Extent | None) -> StoredTensor:
    """Return a tensor whose numbers lie in `member`.

    UserError if they do not, or if the tensor is larger than they are.
    """
    place, storage = f"{path}: tensor '{name}'", view.storage
    if member is None or member.size != storage.nbytes:
        size = member.size if member else "none"
        raise UserError(
            f"{place}: its numbers take {storage.nbytes} bytes, the file has {size}", AGAIN
        )

    least = min((*view.shape, *view.stride, view.offset))
    beyond = view.count and view.end > storage.count
    if least < 0 or len(view.shape) != len(view.stride) or beyond:
        raise UserError(f"{place}: it lies outside its storage", AGAIN)

    return StoredTensor(
        view.shape, storage.dtype, lambda: _read_tensor(path, place, view, member), place
    )


def _read_tensor(path: Path, place: str, view: TensorView, member: Extent) -> Tensor:
    """Return a copy of a tensor.

    Only its own numbers are read if they lie in one piece, else all of its storage.
    """
    dtype = view.storage.dtype
    read_all = not view.is_contiguous() or view.count == view.storage.count
    begin, count = (0, view.storage.count) if read_all else (view.offset, view.count)
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

    if read_all and member.checksum and checksum != member.checksum:
        raise UserError(f"{place}: its numbers do not match their checksum", AGAIN)
    if view.is_contiguous():
        return numbers.view(view.shape)

    return numbers.as_strided(view.shape, view.stride, view.offset).contiguous()


# --- writing ---
class _Pickler(pickle.Pickler):
    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, Storage):
            return None

        kind = next(name for name, dtype in STORAGES.items() if dtype == item.dtype)
        return "storage", getattr(torch, kind), item.key, devices.CPU, item.count


@contextmanager
def create(
    path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> Iterator[Callable[[Tensor], None]]:
    """Write a file that `torch.load(path, weights_only=True, mmap=True)` opens.

    Gives a function that takes the tensors, one at a time, in the order of `layout` (name -> shape
    and dtype). ValueError for one that does not fit, and at the end for those that are lacking.
    """
    views = {}
    for key, (name, (shape, dtype)) in enumerate(layout.items()):
        storage = Storage(str(key), dtype, math.prod(shape))
        views[name] = TensorView(storage, 0, shape, _count_strides(shape))

    content = io.BytesIO()
    _Pickler(content, protocol=2).dump(views)
    waiting = list(views.items())[::-1]

    with explain_os_errors(path), zipfile.ZipFile(path, "w") as archive:
        _add_member(archive, f"{path.stem}/data.pkl", content.getbuffer())
        _add_member(archive, f"{path.stem}/byteorder", memoryview(sys.byteorder.encode()))

        def write(tensor: Tensor) -> None:
            name, view = waiting.pop()
            if tuple(tensor.shape) != view.shape or tensor.dtype != view.storage.dtype:
                raise ValueError(
                    f"{name}: {tensor.dtype} {list(tensor.shape)} for {view.storage.dtype} "
                    f"{list(view.shape)}"
                )

            numbers = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
            _add_member(archive, f"{path.stem}/data/{view.storage.key}", numbers.data)

        yield write
        if waiting:
            raise ValueError(f"{path}: not all of its tensors were given: {waiting[-1][0]}, ...")

        _add_member(archive, f"{path.stem}/version", memoryview(b"3\n"))


def _add_member(archive: zipfile.ZipFile, name: str, content: memoryview) -> None:
    """Add a member whose bytes begin at a multiple of 64, as PyTorch's do, to be mapped."""
    item = zipfile.ZipInfo(name)
    item.file_size = len(content)
    long = len(content) >= 1 << 30  # zipfile then adds 20 bytes to the header
    begin = archive.start_dir + _HEADER + len(name.encode()) + 20 * long + 4
    padding = -begin % _ALIGNMENT
    item.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding

    with archive.open(item, "w", force_zip64=long) as file:
        for start in range(0, len(content), _CHUNK):
            file.write(content[start : start + _CHUNK])
