"""How fast `llama2 import` is beside the disk it reads from, and how much memory it takes.

    python benchmarks/formats.py [--directory /where/there/is/room] [--layers 4] [--dtype bf16]
    [--rounds 3]

Builds a sharded checkpoint of random weights with the widths of the 7B model and few layers, so
that it fits a disk and the page cache takes what is written (`--layers 32` is the whole model).
Each round measures, from a cold cache, the disk's sequential read, a plain copy of the same files
(read and write, no more), and the import in a process of its own, whose anonymous memory is
sampled. The import reads and writes like the copy, and computes checksums, and looks at every
number.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from common import HERE, spread

from llama2.formats import hf
from llama2.formats.hf_directory import list_shapes
from llama2.formats.stored_model import StoredModel, StoredTensor
from llama2.model.sizes import SIZES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BUFFER = 16 << 20


def build(directory: Path, layers: int, dtype: torch.dtype) -> StoredModel:
    """A checkpoint of random weights; shards of 1 GB."""
    config = replace(SIZES["7b"], num_hidden_layers=layers)

    def stored(name: str, shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(shape, dtype, lambda: torch.randn(shape).mul_(0.02).to(dtype), name)

    source = StoredModel(
        directory,
        "random",
        config,
        False,
        {name: stored(name, shape) for name, shape in list_shapes(config).items()},
        None,
    )
    hf.write(source, directory, shard_bytes=1 << 30)
    (directory / "checksums.json").unlink()  # as others write it: import must not read it twice

    return source


def forget(directory: Path) -> None:
    """Drop a directory's files from the page cache, so that the disk is what is read."""
    os.sync()
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def read(directory: Path) -> None:
    """Every byte of a directory, in turn, into one buffer."""
    buffer = bytearray(BUFFER)
    for path in sorted(directory.iterdir()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def copy(directory: Path, target: Path) -> None:
    """What any program must do that reads a checkpoint and writes one."""
    target.mkdir()
    for path in sorted(directory.iterdir()):
        shutil.copyfile(path, target / path.name)


def bring_in(directory: Path, target: Path, threads: int) -> tuple[float, int, int]:
    """Seconds of an import without the start of Python, and its anonymous memory in bytes before
    and at the most."""
    script = (
        "import sys, time\nfrom llama2 import cli\nfrom llama2.convert import import_\nprint(flush=True)\n"
        "sys.stdin.readline()\nbegin = time.perf_counter()\ncode = cli._guarded(sys.argv[1:])\n"
        "print(time.perf_counter() - begin)\nsys.exit(code)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "import", str(directory), "--out", str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(threads)},
    )
    assert process.stdout is not None
    process.stdout.readline()
    samples, done = [anonymous(process.pid)], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            samples.append(anonymous(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate("\n")[0]
    done.set()
    watcher.join()

    if process.returncode:
        sys.exit(f"the import failed with status {process.returncode}")

    return float(output.split()[-1]), samples[0], max(samples)


def anonymous(pid: int) -> int:
    """The memory of a process that is no file's, in bytes."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
            return next(
                (int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon")), 0
            )
    except OSError:
        return 0  # it has ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--directory", type=Path, help="a place on the disk to measure; default: the system's"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=asked.directory) as place:
        directory, target = Path(place) / "model", Path(place) / "copy"
        source = build(directory, asked.layers, DTYPES[asked.dtype])
        size = sum(path.stat().st_size for path in directory.iterdir())
        largest = max(stored.count_bytes() for stored in source.tensors.values())
        print(
            f"7B widths, {asked.layers} layers, {asked.dtype}: {size / 1e9:.2f} GB in "
            f"{len(list(directory.glob('*.safetensors')))} files, largest tensor {largest / 1e6:.0f} MB"
        )
        speeds: dict[str, list[float]] = {"read": [], "copy": [], "import": []}
        memory = []

        for _ in range(asked.rounds):
            forget(directory)
            speeds["read"].append(size / seconds(lambda: read(directory)))
            forget(directory)
            speeds["copy"].append(size / seconds(lambda: copy(directory, target)))
            shutil.rmtree(target)
            forget(directory)
            took, before, most = bring_in(directory, target, asked.threads)
            speeds["import"].append(size / took)
            memory.append(most - before)
            shutil.rmtree(target)

        for name, values in speeds.items():
            print(f"{name:7} {spread([value / 1e9 for value in values], '.2f')} GB/s")

        ratio = {
            name: statistics.median(a / b for a, b in zip(speeds["import"], speeds[name]))
            for name in speeds
        }
        print(
            f"import is {ratio['read']:.0%} of the disk's sequential read, {ratio['copy']:.0%} of a copy"
        )
        print(f"anonymous memory grows by {max(memory) / 1e6:.0f} MB at most")


if __name__ == "__main__":
    main()
