"""The device that a process works on, and what follows from its kind.

No other module of the package names a kind of device: what one must know about the CPU or a GPU is
a function here.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from llama2.errors import UserError

Precision = Literal["fp32", "bf16"]
CPU, CUDA = "cpu", "cuda"
FUSED = (CPU, CUDA)
"""kinds for which PyTorch has AdamW as one kernel"""
PEAK_SECONDS = 0.3
Work = Callable[[], None]
Record = Callable[[Work], Work]
"""runs some work, and returns what does it again"""
_recording = threading.Lock()  # a process records one graph at a time


def choose() -> torch.device:
    """Return this process's device: its GPU, else the CPU. LLAMA2_DEVICE=cpu forces the CPU."""
    forced = os.environ.get("LLAMA2_DEVICE", "")
    if forced not in ("", CPU):
        raise UserError(
            f"LLAMA2_DEVICE={forced}: it may be cpu and nothing else",
            "unset it: GPUs are used where there are any",
        )
    if forced or not torch.cuda.is_available():
        return torch.device(CPU)

    return torch.device(CUDA, int(os.environ.get("LOCAL_RANK", "0")))


def claim(device: torch.device) -> None:
    """Make a GPU the current one of this process; UserError if the machine does not have it."""
    if not is_gpu(device):
        return

    count = torch.cuda.device_count()
    if device.index >= count:
        raise UserError(
            f"this machine has {count} GPUs, and rank {device.index} on it wants one of its own",
            "start fewer processes here, or set LLAMA2_DEVICE=cpu",
        )

    torch.cuda.set_device(device)


def is_cpu(where: Tensor | torch.device | str) -> bool:
    """Tell whether a tensor or a device (or the name of its kind) is the processor's."""
    return _kind(where) == CPU


def is_gpu(where: Tensor | torch.device | str) -> bool:
    """Tell whether a tensor or a device (or the name of its kind) is a GPU's, which works on while
    Python goes ahead."""
    return _kind(where) == CUDA


def _kind(where: Tensor | torch.device | str) -> str:
    if isinstance(where, str):
        return where

    return where.type if isinstance(where, torch.device) else where.device.type


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return a context of bf16 matrix products over fp32 weights, or one that changes nothing."""
    if precision == "fp32":
        return nullcontext()

    return torch.autocast(device.type, torch.bfloat16)


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, so that the next model finds room where the last
    one was."""
    gc.collect()
    if is_gpu(device):
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if is_gpu(device):
        torch.cuda.synchronize()


def find_recorder(device: torch.device) -> Callable[[], Record] | None:
    """Return what makes a recorder for the device; None where launching work one by one costs
    nothing."""
    return partial(Recorder, device) if is_gpu(device) else None


class Recorder:
    """Records work on a GPU as CUDA graphs, each launched as a whole in the place of all its
    kernels.

    The work reads and writes tensors that stay where they are, and does the same whatever is in
    them: it neither waits for the device nor makes tensors of the host's numbers. What it leaves
    lies in tensors made before. The graphs of one recorder share the memory of what they make in
    between, so one of them runs at a time, in the current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Run the work once and record it; return what launches it again. RuntimeError where it
        cannot be recorded: no graph of this recorder is of use then."""
        graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        aside = _recording_stream(self._device)
        with _recording, torch.cuda.device(self._device), torch.cuda.stream(aside):
            aside.wait_stream(outside)
            # loads kernels and makes the stream's workspaces, which must not become the graph's
            work()
            torch.cuda.synchronize()
            random = torch.cuda.get_rng_state(self._device)
            try:
                self._record(graph, work)
            except RuntimeError:
                self._abandon(random)
                raise

        outside.wait_stream(aside)
        return graph.replay

    def _record(self, graph: torch.cuda.CUDAGraph, work: Work) -> None:
        # Other threads go on working: "global" would let each of them spoil the recording. Outside
        # of inference mode, because the random generator makes tensors here that it keeps.
        with torch.inference_mode(False):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()

    def _abandon(self, random: Tensor) -> None:
        """Take allocator and random generator out of a recording that broke off before its end,
        where PyTorch leaves them: neither could give back memory nor draw any more."""
        index = self._device.index
        with suppress(RuntimeError, AttributeError):  # it ended after all
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
        with suppress(RuntimeError, AttributeError):
            fresh = torch.Generator(self._device)
            fresh.set_state(random)
            torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())


@cache
def _recording_stream(device: torch.device) -> Any:
    """Return the stream for recordings, since the default one allows none. There is one, because
    each keeps a workspace of its own for products."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def get_random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of the device's random generator under the name of its kind; {} for a CPU,
    whose generator is PyTorch's own."""
    return {CUDA: torch.cuda.get_rng_state(device)} if is_gpu(device) else {}


def set_random_state(device: torch.device, state: dict[str, Any]) -> None:
    """Restore what `get_random_state` returned, if `state` has it and the device is of that
    kind."""
    if CUDA in state and is_gpu(device):
        torch.cuda.set_rng_state(state[CUDA], device)


def is_exclusive(device: torch.device) -> bool:
    """Tell whether this process has its device to itself.

    A CPU works for others as well, so what it could do at best can neither be measured at any one
    time nor held against it at another.
    """
    return not is_cpu(device)


@cache
def measure_peak(device: torch.device, precision: Precision) -> float:
    """Return the device's matrix products in floating-point operations a second, measured once (the
    ceiling of MFU).

    The best of many products: other work on the machine, and a clock still low, must not lower the
    ceiling.
    """
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if is_gpu(device) else 1024
    # its own: a run draws the same numbers whether it measures or not
    random = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, generator=random, device=device).to(kind)
    b = torch.randn(size, size, generator=random, device=device).to(kind)

    best = float("inf")
    end = time.perf_counter() + PEAK_SECONDS
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, _seconds(device, lambda: a @ b))

    return 2 * size**3 / best


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    work()
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)

    return time.perf_counter() - begin
