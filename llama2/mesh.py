"""Where the work runs: device, precision, ranks. The only module that names a device type.

The same command runs alone or under torchrun: without its environment variables the world has one
rank. CPU ranks talk over gloo, GPU ranks over NCCL. `tune_cpu` holds the two settings that make
PyTorch fast on a CPU.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from functools import cache
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llama2 import rendezvous
from llama2.cpu_tuning import cores
from llama2.errors import UserError

Precision = Literal["fp32", "bf16"]
T = TypeVar("T")
HUGE_HEAP = 1 << 30
_POINTER = ctypes.c_void_p
# of products in fp32, relative: 30 times what they show; those rounded to bf16 are off by 3e-3
EXACT = 1e-5
PEAK_SECONDS = 0.3
TIMEOUT = timedelta(minutes=20)  # a silent hang is worse than an error


def rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of ranks, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Rank 0 writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """This rank's device: its GPU, else the CPU. LLAMA2_DEVICE=cpu forces the CPU."""
    if os.environ.get("LLAMA2_DEVICE", "") not in ("", "cpu"):
        raise UserError(
            f"LLAMA2_DEVICE={os.environ['LLAMA2_DEVICE']}: it may be cpu and nothing else",
            "unset it: GPUs are used where there are any",
        )
    if os.environ.get("LLAMA2_DEVICE") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def asked() -> int | None:
    """The number of ranks that torchrun (or our launcher) started, None if it did not start us."""
    text = os.environ.get("WORLD_SIZE", "")
    if text and not (text.isdecimal() and int(text)):
        raise UserError(
            f"WORLD_SIZE={text}: the number of ranks is wanted", "unset it, or start with torchrun"
        )

    return int(text) if text else None


def init() -> None:
    """Join the other ranks if torchrun (or our launcher) started us; safe to call twice."""
    ranks = asked() or 1
    if ranks > 1 and not dist.is_initialized():
        where = device()
        if where.type == "cuda":
            if where.index >= torch.cuda.device_count():
                raise UserError(
                    f"this machine has {torch.cuda.device_count()} GPUs, and rank {where.index} on it "
                    "wants one of its own",
                    "start fewer processes here, or set LLAMA2_DEVICE=cpu",
                )

            torch.cuda.set_device(where)

        rendezvous.check(ranks)
        with rendezvous.joining(ranks, TIMEOUT):
            dist.init_process_group(
                "nccl" if where.type == "cuda" else "gloo",
                timeout=TIMEOUT,
                device_id=where if where.type == "cuda" else None,
            )
            rendezvous.remember(gather([rendezvous.myself()]))

    tune_cpu()


def shutdown() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave() -> NoReturn:
    """End this rank's process, its work done. Without a farewell: threads of gloo sometimes abort a
    process that ends in the usual way, and its success would count as a failure."""
    shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)

    return tensor


def gather(items: Sequence[T]) -> list[T]:
    """The items of all ranks, rank by rank, on every rank (picklable objects)."""
    if world() == 1:
        return list(items)

    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of a list: every world-th item, so that uneven work spreads. `unshare`
    restores the order."""
    return items[rank() :: world()]


def unshare(items: Sequence[T]) -> list[T]:
    """Results of `share` from all ranks, in the order of the whole list, on every rank."""
    if world() == 1:
        return list(items)

    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, list(items))
    total = sum(len(part) for part in parts)

    return [parts[index % world()][index // world()] for index in range(total)]


def broadcast(value: T) -> T:
    """Rank 0's value on every rank (a picklable object)."""
    if world() == 1:
        return value

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; a UserError that it raises there is raised on
    every rank."""
    found: list[T] = []
    failure: UserError | None = None
    if is_main():
        try:
            found = [work()]
        except UserError as error:
            failure = error

    found, failure = broadcast((found, failure))
    if failure is not None:
        raise failure

    return found[0]


def autocast(precision: Precision) -> AbstractContextManager[Any]:
    """bf16 matrix products over fp32 weights, or nothing."""
    return torch.autocast(device().type, torch.bfloat16) if precision == "bf16" else nullcontext()


def free_memory() -> None:
    """Give back what nothing refers to any more, so that the next model finds room where the last
    one was."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


@cache
def tune_cpu() -> None:
    """Keep large blocks on the heap, and take oneDNN for fp32 products where that is exact.

    MKL takes an AVX2 path on AMD; oneDNN does not, but it may round fp32 to bf16 where the CPU
    multiplies bf16 in hardware (AMX on x86, and Arm's own). So it is used on x86 without AMX alone,
    and only if products come out exact.
    """
    if device().type != "cpu":
        return

    keep_large_blocks()
    if torch.get_num_threads() > cores():
        torch.set_num_threads(cores())

    if platform.machine() in ("x86_64", "AMD64") and not has_amx():
        products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before, products.fp32_precision = products.fp32_precision, "bf16"
        if not exact_products():
            products.fp32_precision = before


def exact_products() -> bool:
    """Whether fp32 matrix products have the accuracy of fp32, of a few shapes that meet different
    kernels."""
    random = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((1, 512, 512), (64, 64, 64), (256, 512, 384)):
        a, b = (
            torch.randn(rows, inner, generator=random),
            torch.randn(inner, columns, generator=random),
        )
        exact = a.double() @ b.double()
        if (a @ b - exact).norm() > EXACT * exact.norm():
            return False

    return True


@cache
def keep_large_blocks() -> None:
    """glibc maps every block over 32 MiB anew and returns it on free, so with a 32,000-word
    vocabulary each step faults its logits in again (up to 2.5x slower). Call it before large
    tensors exist.

    The first gigabyte of the heap also asks for huge pages (about 5 % of a training step goes into
    address look-ups).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
            libc.mallopt(option, value)

        libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
            _POINTER,
            [ctypes.c_size_t],
            [_POINTER],
        )
        libc.madvise.argtypes = [_POINTER, ctypes.c_size_t, ctypes.c_int]
        # the heap grows by this much and stays; it takes memory when it is used
        libc.free(libc.malloc(HUGE_HEAP))

        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            heap = next(line for line in file if line.rstrip().endswith("[heap]")).split()[0]

        begin, end = (int(part, 16) for part in heap.split("-"))
        libc.madvise(begin, end - begin, 14)  # MADV_HUGEPAGE
    except (OSError, AttributeError, StopIteration):
        pass  # not glibc, or not Linux: nothing to tune


def rest() -> None:
    """Let go of the threads with which this thread has worked in parallel; its next parallel work
    starts new ones.

    With more of them in a process than cores, OpenMP sends threads to sleep at every barrier: half
    the speed where steps are short. So a thread that has nothing to do for a while, beside one that
    has, should let go.
    """
    with suppress(OSError, AttributeError):  # another runtime than GCC's
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(1)  # omp_pause_soft


@cache
def has_amx() -> bool:
    """Whether this CPU multiplies bf16 tiles in hardware."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return "amx_bf16" in file.read()
    except OSError:
        return True  # unknown: take the exact path


def is_exclusive() -> bool:
    """Whether this process has its device to itself: a CPU works for others as well, so what it
    could do at best can neither be measured at any one time nor held against it at another."""
    return device().type != "cpu"


@cache
def peak_flops(precision: Precision) -> float:
    """Floating-point operations a second of this device's matrix product, measured once (the
    ceiling of MFU).

    The best of many products: other work on the machine, and a clock still low, must not lower the
    ceiling.
    """
    where, kind = device(), torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if where.type == "cuda" else 1024
    # its own: a run draws the same numbers whether it measures or not
    random = torch.Generator(where).manual_seed(0)
    a, b = (torch.randn(size, size, generator=random, device=where).to(kind) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + PEAK_SECONDS

    while best == float("inf") or time.perf_counter() < end:
        best = min(best, _seconds(lambda: a @ b))

    return 2 * size**3 / best


def _seconds(work: Callable[[], object]) -> float:
    work()
    wait()
    begin = time.perf_counter()
    work()
    wait()

    return time.perf_counter() - begin


def wait() -> None:
    """Until the device has done what it was given; a CPU has."""
    if device().type == "cuda":
        torch.cuda.synchronize()
