"""What the benchmarks share: the sizes, sides that run in processes of their own, and how figures
are printed.

A *side* (ours or a peer) is one process that answers questions on its standard input, a line of
JSON each, and rests in between. So several sides stay warm and compiled while they take turns, A B
A B, and a slow spell of the machine meets all of them. Every side gets the same threads and keeps
large blocks on the heap as `cpu_tuning.keep_large_blocks` does.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.model.llama import LlamaConfig

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Size:
    """A model and the batch it is trained with."""

    config: LlamaConfig
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


SIZES = {
    # 0.1M, to see whether a benchmark runs at all
    "XS": Size(LlamaConfig(512, 64, 128, 2, 4, 2, 256), 4, 64),
    "T": Size(LlamaConfig(2048, 192, 512, 6, 6, 2, 512), 16, 256),  # 3.15M parameters
    # 15.2M
    "S": Size(LlamaConfig(32000, 288, 768, 6, 6, 6, 512, tie_word_embeddings=True), 8, 256),
    # 110M
    "M": Size(LlamaConfig(32000, 768, 2048, 12, 12, 12, 1024, tie_word_embeddings=True), 2, 1024),
    # 135M: the shape of SmolLM2
    "smollm2": Size(
        LlamaConfig(
            49152, 576, 1536, 30, 9, 3, 2048, rope_theta=100000.0, tie_word_embeddings=True
        ),
        2,
        1024,
    ),
}


class Side:
    """A process of its own for one side; `ask` makes it work. A context: it ends with the block."""

    def __init__(
        self, name: str, python: str, script: str, arguments: Sequence[str], threads: int
    ) -> None:
        self.name = name
        found = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            "PYTHONPATH": f"{HERE.parent}{os.pathsep}{found}" if found else str(HERE.parent),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
        }
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, str(HERE / script), *arguments],
            text=True,
            encoding="utf-8",
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to a question; the process dies of what it cannot do, and its last words are
        shown."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died while starting: what it said is below

        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            sys.exit(f"{self.name} failed:\n{self._log.read()[-3000:]}")

        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

        self._log.close()


class Questions:
    """The other end: iterate over what is asked, `answer` each. Whatever else is printed goes to
    standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in iter(sys.stdin.readline, ""):
            yield json.loads(line)

    def answer(self, **values: Any) -> None:
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()


def serve(work: Callable[..., dict[str, Any]]) -> None:
    """Answer every question with `work(**question)`."""
    questions = Questions()
    for question in questions:
        questions.answer(**work(**question))


def has(python: str, module: str) -> bool:
    """Whether an interpreter can import a module."""
    test = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
    return subprocess.run([python, "-c", test]).returncode == 0


# for GCC and for oneDNN
WITHOUT_AMX = {
    "CXX": "g++ -mno-amx-bf16 -mno-amx-int8 -mno-amx-tile",
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
}


def hide_amx() -> bool:
    """Have programs started from now on work without AMX: our kernels and oneDNN. Return whether
    that was still to be done."""
    hidden = all(os.environ.get(name) == value for name, value in WITHOUT_AMX.items())
    os.environ.update(WITHOUT_AMX)
    return not hidden


def instruction_set() -> str:
    """What the processor offers for products, as far as it is not hidden."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = set(next((line for line in file if line.startswith("flags")), "").split())

    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512"}
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        flags.discard("amx_bf16")

    return next((name for flag, name in names.items() if flag in flags), "AVX2 or less")


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Median (least-most)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"
