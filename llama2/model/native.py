"""Builds the C++ files of this folder with the compiler at hand when they are first needed, and loads them.

Each library is kept in the user's cache under a name that tells source, flags, compiler and processor, so it is built
once, in about two seconds. Without a compiler everything runs in PyTorch's own operations, slower, and a line on
standard error says so. LLAMA2_NATIVE=0 asks for that.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-thread-jumps",
         "-shared", "-fPIC")
WIDE = "-mprefer-vector-width=512"  # x86: GCC would take half of an AVX-512 register


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of `name`.cpp, or None where they cannot be built."""
    if os.environ.get("LLAMA2_NATIVE") == "0" or not sys.platform.startswith("linux"):
        return None
    compiler = next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name
                     if (found := shutil.which(name))), None)
    if compiler is None:
        _say("no C++ compiler found: this CPU runs at about half its speed (install g++)")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler, name)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        _say(f"{name}.cpp does not build here, so this CPU runs slower: {detail.strip().splitlines()[0]}")
        return None


def _built(compiler: str, name: str) -> Path:
    """The library's path; it is built under another name and moved, so that nobody loads half of it."""
    flags = (*FLAGS, WIDE) if platform.machine() == "x86_64" else FLAGS
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    source = HERE / f"{name}.cpp"
    headers = [path.read_text() for path in sorted(HERE.glob("*.h"))]
    parts = (source.read_text(), *headers, *flags, version, _processor())
    tag = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    for folder in _folders():
        path = folder / f"{name}-{tag}.so"
        if path.exists():
            return path
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                new = Path(scratch) / path.name
                subprocess.run([compiler, *flags, str(source), "-o", str(new)], capture_output=True, text=True,
                               check=True, timeout=120)
                os.replace(new, path)
        except PermissionError:
            continue
        return path
    raise OSError("no folder to build in")


def _folders() -> tuple[Path, ...]:
    """Where to keep the library, in order of preference."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "llama2", Path(tempfile.gettempdir()) / f"llama2-{os.getuid()}"


def _processor() -> str:
    """What decides which instructions there are."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.machine()


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
