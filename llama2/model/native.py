"""Builds `fused.cpp` with the compiler at hand when it is first needed, and loads it.

The library is kept in the user's cache under a name that tells source, flags, compiler and processor, so it is built
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
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("fused.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-thread-jumps",
         "-shared", "-fPIC")
WIDE = "-mprefer-vector-width=512"  # x86: GCC would take half of an AVX-512 register


@cache
def library() -> ctypes.CDLL | None:
    """The functions of `fused.cpp`, or None where they cannot be built."""
    if os.environ.get("LLAMA2_NATIVE") == "0" or not sys.platform.startswith("linux"):
        return None
    compiler = next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name
                     if (found := shutil.which(name))), None)
    if compiler is None:
        _say("no C++ compiler found: training on this CPU runs at about half its speed (install g++)")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        _say(f"{SOURCE.name} does not build here, so this CPU runs slower: {detail.strip().splitlines()[0]}")
        return None


def _built(compiler: str) -> Path:
    """The library's path; it is built under another name and moved, so that nobody loads half of it."""
    flags = (*FLAGS, WIDE) if platform.machine() == "x86_64" else FLAGS
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    tag = hashlib.sha256("\0".join((SOURCE.read_text(), *flags, version, _processor())).encode()).hexdigest()[:16]
    for folder in _folders():
        path = folder / f"fused-{tag}.so"
        if path.exists():
            return path
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                new = Path(scratch) / path.name
                subprocess.run([compiler, *flags, str(SOURCE), "-o", str(new)], capture_output=True, text=True,
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
