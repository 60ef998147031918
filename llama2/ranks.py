"""The processes that share one job, and the axes along which they divide it.

The same command runs alone or under torchrun: without its environment variables there is one rank.
CPU ranks talk over gloo, GPU ranks over NCCL. Whoever works with others is handed a `Ranks`; no
module asks a global one.

The axes have torchtitan's names, and each knows its size, this process's index and its process
group. Today one data axis has all ranks: `replicate`, or `shard` once `Ranks.spread` was asked
for; the others have one rank each. To open another, lay the ranks out in `join` with PyTorch's
`init_device_mesh(device.type, sizes, mesh_dim_names=...)` and fill the axes from its
`get_local_rank(name)` and `get_group(name)`; data, sums over it and shares follow `Ranks.data`. The
mesh is not made for one axis: its group is that of all ranks, and start-up would pay for others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from llama2 import cpu_tuning, devices, rendezvous
from llama2.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=20)  # a silent hang is worse than an error


@dataclass(frozen=True)
class Axis:
    """One direction in which work is divided; `group` is None where there is nobody to talk to."""

    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Ranks:
    """All ranks of a job as one of them sees them. Every rank calls a collective alike."""

    device: torch.device
    rank: int = 0
    size: int = 1
    replicate: Axis = Axis()
    """copies of the model, each for other rows"""
    shard: Axis = Axis()
    """one model spread over its ranks (FSDP2), each for other rows"""
    context: Axis = Axis()
    """parts of a sequence; not divided yet"""
    tensor: Axis = Axis()
    """parts of each matrix; not divided yet"""
    peers: tuple[rendezvous.Peer, ...] = ()
    """the process behind each rank"""

    @classmethod
    def alone(cls) -> Ranks:
        """Return the ranks of a process that works for itself, on its device."""
        return cls(devices.choose())

    @classmethod
    def of_group(cls, device: torch.device) -> Ranks:
        """Return the ranks of PyTorch's process group, which they have joined."""
        rank, size = dist.get_rank(), dist.get_world_size()
        ranks = cls(device, rank, size, replicate=Axis(size, rank, dist.group.WORLD))
        return replace(ranks, peers=tuple(ranks.gather([rendezvous.describe_process()])))

    def spread(self) -> Ranks:
        """Return the same ranks for one model that is spread over them."""
        return replace(self, replicate=Axis(), shard=self.data)

    @property
    def data(self) -> Axis:
        """The axis whose ranks read other rows."""
        return self.replicate if self.shard.group is None else self.shard

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks of the data axis, in place."""
        if self.data.size > 1:
            dist.all_reduce(tensor, group=self.data.group)

        return tensor

    def gather(self, items: Sequence[T]) -> list[T]:
        """Return the items (picklable objects) of all ranks, rank by rank, on every rank."""
        if self.size == 1:
            return list(items)

        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def broadcast(self, value: T) -> T:
        """Return rank 0's value (a picklable object) on every rank."""
        if self.size == 1:
            return value

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; what it raises on one is raised on all, which would wait for
        that one for ever."""
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error

        failures = [error for error in self.gather([failure]) if error is not None]
        if failures:
            raise failure or failures[0]

        return result

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0, and return its result, or raise its error, on every rank."""
        result = self.together(lambda: work() if self.is_main else None)
        return cast(T, self.broadcast(result))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's share of a list: every size-th item, so that uneven work spreads.
        `unshare` restores the order."""
        return items[self.data.index :: self.data.size]

    def unshare(self, items: Sequence[T]) -> list[T]:
        """Return the results of `share` from all ranks, in the order of the whole list, on every
        rank."""
        size = self.data.size
        if size == 1:
            return list(items)

        parts: list[Any] = [None] * size
        dist.all_gather_object(parts, list(items), group=self.data.group)
        total = sum(len(part) for part in parts)

        return [parts[index % size][index // size] for index in range(total)]

    @contextmanager
    def explain_disconnects(self) -> Iterator[None]:
        """Say in one line that another rank is gone, where the work inside fails of it."""
        try:
            yield
        except RuntimeError as error:
            if not self.peers or not rendezvous.is_disconnect(error):
                raise

            raise rendezvous.explain_disconnect(error, self.peers) from error


def count_requested() -> int | None:
    """Return the number of ranks that torchrun (or our launcher) started, None if none did."""
    text = os.environ.get("WORLD_SIZE", "")
    if text and not (text.isdecimal() and int(text)):
        raise UserError(
            f"WORLD_SIZE={text}: the number of ranks is wanted", "unset it, or start with torchrun"
        )

    return int(text) if text else None


def join() -> Ranks:
    """Join the other ranks if torchrun (or our launcher) started us, and tune a CPU; safe to call
    twice."""
    size = count_requested() or 1
    device = devices.choose()
    if dist.is_initialized():
        ranks = Ranks.of_group(device)
    else:
        ranks = _meet(device, size) if size > 1 else Ranks(device)

    if devices.is_cpu(device):
        cpu_tuning.tune()

    return ranks


def _meet(device: torch.device, size: int) -> Ranks:
    devices.claim(device)
    rendezvous.check(size)
    gpu = devices.is_gpu(device)
    with rendezvous.await_ranks(size, TIMEOUT):
        dist.init_process_group(
            "nccl" if gpu else "gloo", timeout=TIMEOUT, device_id=device if gpu else None
        )
        return Ranks.of_group(device)


def leave() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_now() -> NoReturn:
    """End this rank's process, its work done. Without a farewell: threads of gloo sometimes abort a
    process that ends in the usual way, and its success would count as a failure."""
    leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
