"""How fast `llama2 import` is beside the disk it reads from, and how much memory it takes.

    python benchmarks/formats.py [--directory /where/there/is/room] [--layers 4] [--dtype bf16]
    [--rounds 3] [--gguf q4_0]

Builds a sharded checkpoint of random weights with the widths of the 7B model and few layers, so
that it fits a disk and the page cache takes what is written (`--layers 32` is the whole model).
Each round measures, from a cold cache, the disk's sequential read, a plain copy of the same files
(read and write, no more), and the import in a process of its own, whose anonymous memory is
sampled. The import reads and writes like the copy, and computes checksums, and looks at every
number. With `--gguf` the checkpoint is one file of that type, which the import dequantizes to bf16;
what a direct load in bf16 takes beside the model is measured as well.
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
from typing import Any

import torch
from common import HERE, spread

from llama2.formats import gguf, hf
from llama2.formats.hf_directory import list_shapes
from llama2.formats.stored_model import StoredModel, StoredTensor
from llama2.model.sizes import SIZES
from llama2.tokenizer.train import train

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


def as_gguf(source: StoredModel, directory: Path, precision: Any) -> Path:
    """The same checkpoint as one file, alone in a directory; its tokenizer is a small one."""
    words = directory.with_name("words")
    train(["a river runs past the mill by the old bridge"] * 50, 290, words)
    model = replace(source, tokenizer=words / "tokenizer.model")
    for path in directory.iterdir():
        path.unlink()

    gguf.write(model, directory / "model.gguf", precision=precision)
    return directory / "model.gguf"


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


IMPORT = "from llama2 import cli\nfrom llama2.convert import import_"
LOAD = "import torch\nfrom llama2.formats import checkpoint, gguf_tensors\ngguf_tensors.import_library()"


def bring_in(source: Path, target: Path, threads: int, *more: str) -> tuple[float, int, int]:
    """Seconds of an import without the start of Python, and its anonymous memory in bytes before
    and at the most."""
    words = ["import", str(source), "--out", str(target), *more]
    return watched(IMPORT, "cli._guarded(sys.argv[1:]) and sys.exit(1)", words, threads)


def watched(imports: str, work: str, words: list[str], threads: int) -> tuple[float, int, int]:
    """Seconds of some work in a process of its own behind its imports, and its anonymous memory in
    bytes before and at the most."""
    script = (
        f"import sys, time\n{imports}\nprint(flush=True)\nsys.stdin.readline()\n"
        f"begin = time.perf_counter()\n{work}\nprint(time.perf_counter() - begin)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words],
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
        sys.exit(f"it failed with status {process.returncode}: {' '.join(words)}")

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
    parser.add_argument("--gguf", choices=("f16", "q8_0", "q4_0"))
    asked = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=asked.directory) as place:
        directory, target = Path(place) / "model", Path(place) / "copy"
        source, file = build(directory, asked.layers, DTYPES[asked.dtype]), directory
        if asked.gguf:
            file = as_gguf(source, directory, asked.gguf)

        size = sum(path.stat().st_size for path in directory.iterdir())
        largest = max(stored.count_bytes() for stored in source.tensors.values())
        print(
            f"7B widths, {asked.layers} layers, {asked.gguf or asked.dtype}: {size / 1e9:.2f} GB in "
            f"{len(list(directory.glob('*.[sg]*')))} files, largest tensor {largest / 1e6:.0f} MB in "
            f"{asked.dtype}"
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
            took, before, most = bring_in(file, target, asked.threads, "--dtype", asked.dtype)
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
        if asked.gguf:
            show_load(file, source.count_bytes(torch.bfloat16), asked.threads)


def show_load(file: Path, size: int, threads: int) -> None:
    """Print what a direct load takes."""
    work = "model = checkpoint.load(sys.argv[1], dtype=torch.bfloat16)"
    took, before, most = watched(LOAD, work, [str(file)], threads)
    print(
        f"loaded as it is in {took:.2f} s; anonymous memory grows by the model's {size / 1e6:.0f} MB "
        f"in bf16 and {(most - before - size) / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
