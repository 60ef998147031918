"""Builds the C++ files of this folder with the compiler at hand when they are first needed, loads
them and calls their functions.

Each library is kept in the user's cache. Its name depends on source, flags, compiler and the
processor's instructions, so it is built once, in about two seconds, and machines that share a cache
keep libraries of their own. It ends in the hash of its content: what is damaged or half written is
built again. A cache that cannot be written, or into which others can write (`private_folders`), is
passed over. Where nothing can be built everything runs in PyTorch's own operations, slower, and one
line on standard error says why. LLAMA2_NATIVE=0 asks for that. By hand, because PyTorch's
`cpp_extension` needs ninja and Python's headers, takes half a minute a file, and loads what others
may have written.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from llama2 import atomic, private_folders
from llama2 import environment as switches
from llama2.hashing import hash_content

HERE = Path(__file__).parent
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-thread-jumps",
    "-shared",
    "-fPIC",
)
WIDE = "-mprefer-vector-width=512"  # x86: GCC would take half of an AVX-512 register
ASKING, BUILDING = 30, 120
"""seconds that a compiler may take to list its macros, and to build a library"""
MARK = b"\nsha256 of the above: "
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class _Unusable(Exception):
    """The reason why a compiler cannot build this."""


_failures: list[str] = []
"""why nothing can be built here, once that is known: of three libraries the second and third would
not fare better"""


@cache
def library(name: str) -> ctypes.CDLL | None:
    """Return the functions of `name`.cpp, or None where they cannot be built."""
    if not switches.wants_native() or not sys.platform.startswith("linux") or _failures:
        return None

    try:
        return _load(name, *_compiler())
    except (OSError, _Unusable) as error:
        _failures.append(str(error))

    if os.environ.get("RANK", "0") == "0":
        print(f"this CPU runs at about half its speed: {_failures[0]}", file=sys.stderr)

    return None


def forget() -> None:
    """Look again, for compiler and libraries, when one is wanted."""
    library.cache_clear()
    _compiler.cache_clear()
    _failures.clear()


@cache
def _compiler() -> tuple[tuple[str, ...], str]:
    """Return the first compiler there is, with its flags, and the macros that it defines before it
    has read anything: they give its version and the instructions that it will use. What $CXX names
    may have arguments. _Unusable if there is none."""
    for words in (os.environ.get("CXX", ""), "g++", "clang++"):
        with suppress(ValueError):  # a quotation mark without its pair
            program, *rest = shlex.split(words) or [""]
            if program and (path := shutil.which(program)):
                command = (path, *rest, *FLAGS)
                macros = _run((*command, "-dM", "-E", "-x", "c++", os.devnull), ASKING)
                wide = (WIDE,) if "__x86_64__" in macros else ()
                return (*command, *wide), macros

    raise _Unusable("no C++ compiler found (install g++)")


def _load(name: str, compiler: tuple[str, ...], macros: str) -> ctypes.CDLL:
    """Load the library from the first folder that is ours and takes it, at last from one that is
    deleted at once."""
    source = HERE / f"{name}.cpp"
    texts = [path.read_text("utf-8") for path in (source, *sorted(HERE.glob("*.h")))]
    tag = hash_content("\0".join((*texts, *compiler, macros)))[:16]
    command = (*compiler, str(source), "-o")
    reasons = []

    for folder in private_folders.list_folders():
        try:
            private_folders.make(folder)
            return ctypes.CDLL(str(_build(command, folder / f"{name}-{tag}.so")))
        # read-only, full, no folder, not ours, or without the right to run what is in it
        except OSError as error:
            reasons.append(_reason(error, folder))

    try:
        with tempfile.TemporaryDirectory(prefix="llama2-", ignore_cleanup_errors=True) as scratch:
            private_folders.check_way(Path(scratch))
            return ctypes.CDLL(str(_build(command, Path(scratch) / f"{name}.so")))
    except OSError as error:
        reasons.append(_reason(error, Path("a temporary folder")))
        raise OSError(
            f"{'; '.join(reasons)} (set XDG_CACHE_HOME to a folder of your own)"
        ) from error


def _build(command: Sequence[str], path: Path) -> Path:
    """Build the library where it is not there whole; return `path`. It is built under another name
    and moved, so that nobody loads half of it."""
    if os.path.lexists(path):
        private_folders.check(path)
        if _is_whole(path.read_bytes()):
            return path

    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as scratch:
        new = Path(scratch) / path.name
        _run([*command, str(new)], BUILDING, TMPDIR=scratch)
        _try(new, command)
        digest = hash_content(new.read_bytes()).encode()

        with open(new, "ab") as file:
            file.write(MARK + digest)
            file.flush()
            os.fsync(file.fileno())

        new.chmod(0o700)
        atomic.replace(new, path)

    return path


def _try(new: Path, command: Sequence[str]) -> None:
    """Raise _Unusable if what a compiler has built is no library for this machine, OSError if the
    folder runs none."""
    try:
        ctypes.CDLL(str(new))
    except OSError as error:
        if "failed to map segment" in str(error):  # mounted noexec
            raise

        why = str(error).removeprefix(f"{new}: ")
        raise _Unusable(
            f"{Path(command[0]).name} builds nothing that can be loaded ({why})"
        ) from None


def _is_whole(content: bytes) -> bool:
    """Tell whether a library is as it was built: a truncated one would end the process when it is
    run."""
    before, _, digest = content.rpartition(MARK)
    return hash_content(before).encode() == digest


def _run(command: Sequence[str], seconds: float, **environment: str) -> str:
    """Return what a compiler prints. After so many seconds it is ended, with all that it has
    started. _Unusable if it fails, OSError if the disk refuses what it writes."""
    name = Path(command[0]).name
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C", **environment},
        ) as process:
            try:
                output, complaint = process.communicate(timeout=seconds)
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

                raise
    except subprocess.TimeoutExpired:
        raise _Unusable(f"{name} takes longer than {seconds:g} seconds") from None
    except OSError as error:
        raise _Unusable(f"{name} cannot be run ({_strerror(error)})") from error

    if process.returncode:
        for number in _DISK:
            if os.strerror(number) in complaint:
                raise OSError(number, os.strerror(number))

        raise _Unusable(f"{name}: {_first_error(complaint, process.returncode)}")

    return output


def _first_error(complaint: str, status: int) -> str:
    """Return the line that names an error, else the first, else how the compiler ended."""
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    errors = [line for line in lines if re.search("error|not found|cannot find", line)]
    ending = f"exit status {status}" if status > 0 else f"ended by signal {-status}"
    return [*errors, *lines, ending][0]


def _reason(error: OSError, folder: Path) -> str:
    """Say why a folder is of no use."""
    return f"{error.filename or folder}: {_strerror(error)}"


def _strerror(error: OSError) -> str:
    return (error.strerror or str(error)).lower() if error.errno else str(error)


def fields(kind: type[Any], *names: str) -> list[tuple[str, type[Any]]]:
    """Fields of one type, for a `Struct`."""
    return [(name, kind) for name in names]


class Struct(ctypes.Structure):
    """Arguments of a C++ function by name: the fields of the struct that has the same name there,
    in the same order. Tensors are pointers; None is the null pointer."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**{name: _plain(value) for name, value in values.items()})
        self.values = values  # what is pointed to lives as long as the pointers


def _plain(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


class Library:
    """Calls the functions of one library: tensors and structs go as pointers, whole numbers with 64
    bits, others as fp32. RuntimeError where one of `structs` has another size in C++."""

    def __init__(self, name: str, *structs: type[Struct]) -> None:
        self.name, self.structs = name, structs
        self._functions: dict[str, Any] = {}

    @property
    def is_built(self) -> bool:
        """Tell whether the library could be built."""
        return library(self.name) is not None

    def __call__(self, name: str, *arguments: Struct | Tensor | int | float | None) -> None:
        function = self._functions.get(name) or self._declare(name, arguments)
        function(
            *[
                ctypes.byref(value) if isinstance(value, Struct) else _plain(value)
                for value in arguments
            ]
        )

    def _declare(self, name: str, arguments: Sequence[Struct | Tensor | int | float | None]) -> Any:
        """Return the function with the types of its arguments, which are the same in every call."""
        functions = library(self.name)
        for struct in self.structs:
            size = getattr(functions, f"size_of_{struct.__name__}")()
            if size != ctypes.sizeof(struct):
                raise RuntimeError(
                    f"{struct.__name__} has {ctypes.sizeof(struct)} bytes in Python and {size} in "
                    f"{self.name}.cpp"
                )

        types = {int: ctypes.c_int64, float: ctypes.c_float}
        function = self._functions[name] = getattr(functions, name)
        function.restype = None
        function.argtypes = [types.get(type(value), ctypes.c_void_p) for value in arguments]
        return function
