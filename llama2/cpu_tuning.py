"""How many processor cores this process may use: those it may run on, and no more than its
container's share of time.

PyTorch and OpenMP count the cores of the machine. In a container with 2 of 64, 64 threads would
wait for each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cores() -> int:
    """Whole cores, at least one."""
    share = min(_shares())
    found = len(os.sched_getaffinity(0))
    return found if share >= found else max(1, math.ceil(share))


def _shares() -> Iterator[float]:
    """What the control groups (version 2 or 1) of this process and those above them allow, in
    cores."""
    yield math.inf
    with suppress(OSError):
        for line in MEMBERSHIP.read_text("utf-8", "replace").splitlines():
            _, kinds, path = line.split(":", 2)
            groups = PurePosixPath("/", path.lstrip("/"))
            for group in (groups, *groups.parents):
                if not kinds:
                    yield _share(ROOT / group.relative_to("/") / "cpu.max")
                elif "cpu" in kinds.split(","):
                    yield _share(
                        ROOT / "cpu" / group.relative_to("/") / "cpu.cfs_quota_us",
                        "cpu.cfs_period_us",
                    )


def _share(quota: Path, period: str = "") -> float:
    try:
        text = quota.read_text("utf-8")
        used, whole = map(
            float, (text, quota.with_name(period).read_text("utf-8")) if period else text.split()
        )
        return used / whole if used > 0 and whole > 0 else math.inf
    except (OSError, ValueError):  # no such group here, or "max"
        return math.inf
