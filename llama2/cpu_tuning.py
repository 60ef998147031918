"""Settings that make PyTorch fast on a CPU: threads, memory, and exact fp32 products.

PyTorch and OpenMP count the cores of the machine. In a container with 2 of 64, 64 threads would
wait for each other, so `count_cores` counts those that this process may use.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

import torch

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
HUGE_HEAP = 1 << 30
# of products in fp32, relative: 30 times what they show; those rounded to bf16 are off by 3e-3
EXACT = 1e-5
_POINTER = ctypes.c_void_p


@cache
def tune() -> None:
    """Keep large blocks on the heap, and take oneDNN for fp32 products where that is exact.

    MKL takes an AVX2 path on AMD; oneDNN does not, but it may round fp32 to bf16 where the CPU
    multiplies bf16 in hardware (AMX on x86, and Arm's own). So it is used on x86 without AMX alone,
    and only if products come out exact.
    """
    keep_large_blocks()
    if torch.get_num_threads() > count_cores():
        torch.set_num_threads(count_cores())

    if platform.machine() in ("x86_64", "AMD64") and not has_amx():
        products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before, products.fp32_precision = products.fp32_precision, "bf16"
        if not has_exact_products():
            products.fp32_precision = before


def has_exact_products() -> bool:
    """Tell whether fp32 matrix products have the accuracy of fp32, in a few shapes that meet
    different kernels."""
    random = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((1, 512, 512), (64, 64, 64), (256, 512, 384)):
        a = torch.randn(rows, inner, generator=random)
        b = torch.randn(inner, columns, generator=random)
        exact = a.double() @ b.double()
        if (a @ b - exact).norm() > EXACT * exact.norm():
            return False

    return True


@cache
def has_amx() -> bool:
    """Tell whether this CPU multiplies bf16 tiles in hardware."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return "amx_bf16" in file.read()
    except OSError:
        return True  # unknown: take the exact path


@cache
def keep_large_blocks() -> None:
    """Have glibc keep large blocks, and ask for huge pages for the first gigabyte of the heap.

    glibc maps every block over 32 MiB anew and returns it on free, so with a 32,000-word vocabulary
    each step faults its logits in again (up to 2.5x slower). About 5 % of a training step goes into
    address look-ups. Call it before large tensors exist.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
            libc.mallopt(option, value)

        libc.malloc.restype = _POINTER
        libc.malloc.argtypes = [ctypes.c_size_t]
        libc.free.argtypes = [_POINTER]
        libc.madvise.argtypes = [_POINTER, ctypes.c_size_t, ctypes.c_int]
        # the heap grows by this much and stays; it takes memory when it is used
        libc.free(libc.malloc(HUGE_HEAP))

        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            heap = next(line for line in file if line.rstrip().endswith("[heap]")).split()[0]

        begin, end = (int(part, 16) for part in heap.split("-"))
        libc.madvise(begin, end - begin, 14)  # MADV_HUGEPAGE
    except (OSError, AttributeError, StopIteration):
        pass  # not glibc, or not Linux: nothing to tune


def release_threads() -> None:
    """Let go of the threads with which this thread has worked in parallel; its next parallel work
    starts new ones.

    With more of them in a process than cores, OpenMP sends threads to sleep at every barrier: half
    the speed where steps are short. So a thread that has nothing to do for a while, beside one that
    has, should let go.
    """
    with suppress(OSError, AttributeError):  # another runtime than GCC's
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(1)  # omp_pause_soft


def count_cores() -> int:
    """Count the whole processor cores that this process may use, at least one: those it may run on,
    and no more than its container's share of time."""
    share = min(_shares())
    allowed = len(os.sched_getaffinity(0))
    return allowed if share >= allowed else max(1, math.ceil(share))


def _shares() -> Iterator[float]:
    """The shares, in cores, of this process's control groups (version 2 or 1) and those above."""
    yield math.inf
    with suppress(OSError):
        for line in MEMBERSHIP.read_text("utf-8", "replace").splitlines():
            _, kinds, path = line.split(":", 2)
            groups = PurePosixPath("/", path.lstrip("/"))
            for group in (groups, *groups.parents):
                if not kinds:
                    yield _share(ROOT / group.relative_to("/") / "cpu.max")
                elif "cpu" in kinds.split(","):
                    quota = ROOT / "cpu" / group.relative_to("/") / "cpu.cfs_quota_us"
                    yield _share(quota, "cpu.cfs_period_us")


def _share(quota: Path, period: str = "") -> float:
    try:
        text = quota.read_text("utf-8")
        if period:
            text = f"{text} {quota.with_name(period).read_text('utf-8')}"

        used, total = map(float, text.split())
        return used / total if used > 0 and total > 0 else math.inf
    except (OSError, ValueError):  # no such group here, or "max"
        return math.inf
