"""The bytes of a file that may be packed: gzip, bzip2, xz, Zstandard, and the members of zip
archives.

Packed streams that were put one behind the other are read as one. A stream that was cut off is an
error, never a short file.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from llama2 import json_files
from llama2.errors import UserError, explain_missing_extra, explain_os_errors

PACKINGS = (".gz", ".bz2", ".xz", ".zst")
ZIP = ".zip"
DAMAGE = (
    EOFError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    ValueError,
    OverflowError,
    LookupError,
)
"""what libraries raise over bytes that are not what they should be"""


def strip_packing(name: str) -> str:
    """Return a file's name without the ending of its packing: `a.jsonl.GZ` -> `a.jsonl`."""
    return name.removesuffix(Path(name).suffix) if _packing(name) else name


def _packing(name: str) -> str:
    suffix = Path(name).suffix.lower()
    return suffix if suffix in PACKINGS else ""


@contextmanager
def open_unpacked(path: Path, member: str = "") -> Iterator[IO[bytes]]:
    """Open the unpacked content of a file, or of one member of a zip archive, for reading from
    front to back."""
    with ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(json_files.open_file(path))
        if member:
            archive = stack.enter_context(zipfile.ZipFile(file))
            if archive.getinfo(member).flag_bits & 1:
                raise UserError(
                    f"{show_path(path)}!{member}: is encrypted",
                    "unpack the archive with its password",
                )

            file = stack.enter_context(archive.open(member))

        packing = _packing(member or path.name)
        yield stack.enter_context(_UNPACK[packing](file)) if packing else file


def list_members(path: Path) -> list[str]:
    """The names of the files in a zip archive, sorted; its directories are none."""
    damage = explain_damage(lambda: show_path(path))
    with damage, json_files.open_file(path) as file, zipfile.ZipFile(file) as archive:
        items = [item for item in archive.infolist() if item.filename and not item.is_dir()]
        return sorted(item.filename for item in items)


@contextmanager
def explain_damage(place: Callable[[], str]) -> Iterator[None]:
    """Turn whatever a read may raise into a `UserError` that names `place()`."""
    try:
        yield
    except NotImplementedError as error:
        raise UserError(
            f"{place()}: packed in a way that cannot be read ({error})", "pack it as gzip"
        ) from error
    except DAMAGE as error:
        raise UserError(
            f"{place()}: truncated or corrupt archive ({error})", "fetch it again"
        ) from error
    except OSError as error:
        # a library's refusal, or an offset in an archive that points nowhere
        if error.errno in (None, errno.EINVAL):
            raise UserError(
                f"{place()}: truncated or corrupt ({error})", "fetch it again"
            ) from error

        with explain_os_errors(place()):
            raise


def show_path(path: str | os.PathLike[str]) -> str:
    """Return a path as text: bytes of a name that are not UTF-8 become U+FFFD, so that any message
    or record can hold it."""
    return os.fspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def import_zstandard() -> Any:
    """Return the library of the extra `data`; UserError where it is not installed."""
    try:
        import zstandard
    except ImportError:
        raise explain_missing_extra("zstandard", "data") from None

    return zstandard


class _Zstandard(io.RawIOBase):
    """A `.zst` file's content. It refuses a truncated file, which the library's own reader takes
    for a short one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._library, self._file = import_zstandard(), file
        self._frame, self._ready = self._library.ZstdDecompressor().decompressobj(), b""
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            packed = packed or self._file.read(1 << 17)
            if not packed:
                if self._inside:
                    raise EOFError("the end of the archive is missing")

                return 0

            if self._frame.eof:
                self._frame = self._library.ZstdDecompressor().decompressobj()

            try:
                self._ready = self._frame.decompress(packed)
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from error

            self._inside = not self._frame.eof

        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


_UNPACK: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(_Zstandard(file), 1 << 20),
}
