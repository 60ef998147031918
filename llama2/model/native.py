"""Builds the C++ files of this folder with the compiler at hand when they are first needed, and loads them.

Each library is kept in the user's cache under a name that tells source, flags, compiler and processor, so it is built
once, in about two seconds. A cache that cannot be written, or into which others can write, is passed over. Without a
compiler everything runs in PyTorch's own operations, slower, and a line on standard error says so. LLAMA2_NATIVE=0
asks for that.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from llama2 import switches

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-thread-jumps",
         "-shared", "-fPIC")
WIDE = "-mprefer-vector-width=512"  # x86: GCC would take half of an AVX-512 register


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of `name`.cpp, or None where they cannot be built."""
    if not switches.native() or not sys.platform.startswith("linux"):
        return None
    compiler = next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name
                     if (found := shutil.which(name))), None)
    if compiler is None:
        _say("no C++ compiler found: this CPU runs at about half its speed (install g++)")
        return None
    try:
        return _loaded(compiler, name)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        _say(f"{name}.cpp does not build here, so this CPU runs slower: {detail.strip().splitlines()[0]}")
        return None


def _loaded(compiler: str, name: str) -> ctypes.CDLL:
    """The library, from the first folder that is ours and takes it; at last from one that is deleted at once."""
    flags = (*FLAGS, WIDE) if platform.machine() == "x86_64" else FLAGS
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout.decode("utf-8", "replace")
    texts = [path.read_text("utf-8") for path in (HERE / f"{name}.cpp", *sorted(HERE.glob("*.h")))]
    tag = hashlib.sha256("\0".join((*texts, *flags, version, _processor())).encode()).hexdigest()[:16]
    command = [compiler, *flags, str(HERE / f"{name}.cpp"), "-o"]
    for folder in _folders():
        try:
            _make_private(folder)
            return ctypes.CDLL(str(_built(command, folder / f"{name}-{tag}.so")))
        except OSError:  # read-only, full, no folder, not ours, or without the right to run what is in it: the next one
            continue
    with tempfile.TemporaryDirectory(prefix="llama2-") as scratch:
        return ctypes.CDLL(str(_built(command, Path(scratch) / f"{name}.so")))


def _built(command: Sequence[str], path: Path) -> Path:
    """The library's path; it is built under another name and moved, so that nobody loads half of it."""
    if path.exists():
        _check_owner(path)
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        new = Path(scratch) / path.name
        try:
            subprocess.run([*command, str(new)], capture_output=True, text=True, errors="replace", check=True,
                           timeout=120, env={**os.environ, "LC_ALL": "C"})
        except subprocess.CalledProcessError as error:
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
                if os.strerror(number) in error.stderr:
                    raise OSError(number, os.strerror(number)) from error
            raise
        new.chmod(0o700)
        os.replace(new, path)
    return path


def _folders() -> Iterator[Path]:
    """Where to keep the library, in order of preference."""
    with suppress(RuntimeError):  # no HOME, and a user without an entry
        yield Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llama2"
    yield Path(tempfile.gettempdir()) / f"llama2-{os.getuid()}"


def _make_private(folder: Path) -> None:
    """Make a folder that no one else can put anything into. PermissionError if another could have: whoever owns a
    folder of programs, or may write there, decides what its readers run."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def _check_owner(path: Path) -> None:
    for status in (path.lstat(), path.stat()):
        writable = status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)
        if status.st_uid != os.getuid() or writable:
            raise PermissionError(errno.EPERM, "others may have written it", str(path))


def _processor() -> str:
    """What decides which instructions there are."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.machine()


@cache
def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


class Library:
    """Calls the functions of one library: tensors go as pointers, whole numbers with 64 bits, others as fp32."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._functions: dict[str, Any] = {}

    @property
    def found(self) -> bool:
        """Whether the library could be built."""
        return library(self.name) is not None

    def __call__(self, name: str, *arguments: Tensor | int | float | None) -> None:
        function = self._functions.get(name) or self._declared(name, arguments)
        function(*[value.data_ptr() if isinstance(value, Tensor) else value for value in arguments])

    def _declared(self, name: str, arguments: Sequence[Tensor | int | float | None]) -> Any:
        """The function with the types of its arguments, which are the same in every call."""
        function = self._functions[name] = getattr(library(self.name), name)
        function.restype = None
        function.argtypes = [ctypes.c_int64 if isinstance(value, int) else ctypes.c_float if isinstance(value, float)
                             else ctypes.c_void_p for value in arguments]
        return function
