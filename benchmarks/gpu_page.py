"""The page docs/gpu.md: what a GPU has shown of this project, as far as it is known. Only `gpu.py`
writes it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

GIB = float(1 << 30)
NEVER = """\
**No GPU has run this code yet.** The figures are still to come. Until then, whatever these documents say of GPUs is an
estimate. The figures will be

- the machine and its versions, and the ceilings;
- tokens/s and MFU of training, compiled and not;
- decoding against the memory's bandwidth at 1, 16 and 64 rows, and prefill against the matrix product;
- the peak of memory beside what `--dry-run` says;
- the seconds of a PPO iteration;
- the outcome of every test."""
INTRODUCTION = """\
# On a GPU
This page reports what one CUDA device has shown of this project: the tests that need one, and short benchmarks of a 1B
and a 7B shape. Each figure stands beside a ceiling measured in the same run.

{state}

## How to make this page
```sh
make gpu                  # with PYTHON=..., an interpreter that has a CUDA build of PyTorch (2.11 or newer)
```
- It takes at most eight minutes. Without a device it says so and does nothing.
- It uses the PyTorch that it finds, and installs beside it whatever else is missing. For a machine without network, run
  `make gpu-wheels` elsewhere and bring the folder `wheels/` along.
- `make gpu TINY=1 PAGE=/tmp/gpu.md` does the same on a CPU, as small as can be.
- The parts are `tests/gpu` and `benchmarks/gpu_jobs.py`. If one fails, its last words appear here, and the others go
  on.
"""
TRAINING = """\
Whole optimizer steps (forward, loss, backward, clipping, AdamW in fp32) in bf16 on packed rows of four documents. MFU
is the share of the matrix product above; FLOPs are 6 for each parameter and token and those of attention, causal over
the whole row, without what is computed again. A 7B model whose states do not fit has fewer layers, all of its shape; so
has the compiled one, because compiling takes seconds a layer."""
DECODING = """\
Decoding reads all weights, but no embeddings, and the cache, once a token: bf16, greedy. A step is launched as one CUDA
graph, or, with `LLAMA2_CUDA_GRAPHS=0`, kernel by kernel."""
MEMORY = "What `--dry-run` tells beforehand, and the most that tensors took."
PPO = """\
An iteration of `benchmarks/ppo.py`: 32 prompts of 64 tokens, 64 new tokens each, 4 epochs; the first warms up."""


class Page:
    """What is known so far, and the file that tells it."""

    def __init__(
        self, path: Path, device: dict[str, str] | None = None, tiny: bool = False, date: str = ""
    ) -> None:
        self.path, self.device, self.tiny, self.date = path, device, tiny, date
        self.notes: list[str] = []
        self.tests: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []
        self.ends: dict[str, str] = {}  # last words of the parts that failed
        self.parts, self.seconds, self.finished = 0, 0.0, False

    def fail(self, part: str, words: str) -> None:
        self.ends[part] = words

    @property
    def failures(self) -> list[str]:
        """Names of all that failed."""
        return [
            *self.ends,
            *(f"{one['file']}: {one['name']}" for one in self.tests if one["outcome"] == "failed"),
        ]

    def write(self) -> None:
        """The whole page, under a temporary name first."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(self.text(), encoding="utf-8")
        os.replace(temporary, self.path)

    def text(self) -> str:
        parts = [INTRODUCTION.format(state=self._state())]
        if self.device is not None:
            parts += [
                self._machine(),
                self._ceilings(),
                self._training(),
                self._generation(),
                self._memory(),
                self._ppo(),
                self._tests(),
                self._words(),
            ]

        return "\n".join(part for part in parts if part)

    # --- sections ----
    def _state(self) -> str:
        if self.device is None:
            return NEVER
        if self.tiny:
            return "**A trial on a CPU, with models as small as can be: no figure below means anything.**"

        name = self.device["device"]
        ended = f"took {self.seconds / 60:.1f} minutes" if self.finished else "was cut off"
        return f"Run on {self.date} on one {name}; the run {ended}, {len(self.failures)} of its parts failed."

    def _machine(self) -> str:
        assert self.device is not None
        rows = [(key, value) for key, value in self.device.items()]
        return _section(
            "The machine", "".join(f"{note}\n\n" for note in self.notes) + _table(("", ""), rows)
        )

    @property
    def _bandwidth(self) -> float:
        return max((one["bytes_per_second"] for one in self._of("copy")), default=float("nan"))

    @property
    def _product(self) -> float:
        return max((one["flops"] for one in self._of("product")), default=float("nan"))

    def _of(self, what: str) -> list[dict[str, Any]]:
        return [one for one in self.figures if one["what"] == what]

    def _ceilings(self) -> str:
        return _section(
            "Ceilings, measured in this run",
            _table(
                ("what", "figure"),
                [
                    (
                        "copy inside the device's memory, bytes read and written",
                        f"{self._bandwidth / 1e12:.2f} TB/s",
                    ),
                    (
                        "bf16 matrix product, 8192-cubes of random numbers",
                        f"{self._product / 1e12:,.0f} TFLOP/s",
                    ),
                ],
            )
            + "\n`python benchmarks/gpu_jobs.py ceilings`",
        )

    def _training(self) -> str:
        rows = [
            (
                one["shape"],
                _layers(one),
                f"{one['parameters'] / 1e9:.2f}B",
                f"{one['rows']} x {one['length']}",
                "compiled" if one["compile"] else "eager",
                "recomputed" if one["checkpointing"] else "kept",
                f"{one['tokens_per_second']:,.0f}",
                f"{one['flops'] / 1e12:,.0f}",
                f"{one['flops'] / self._product:.1%}",
                f"{one['first_seconds']:.0f} s",
            )
            for one in self._of("training")
        ]
        head = (
            "shape",
            "layers",
            "parameters",
            "tokens a step",
            "",
            "activations",
            "tokens/s",
            "TFLOP/s",
            "MFU",
            "first two steps",
        )
        lacking = "".join(
            f"With {one['layers']} layers ({one['job']}) the memory did not do: {one['words']}\n\n"
            for one in self._of("memory")
        )

        return (
            _section(
                "Training",
                f"{TRAINING}\n\n{_table(head, rows)}\n{lacking}"
                "`python benchmarks/gpu_jobs.py 'training 7b'`",
            )
            if rows
            else ""
        )

    def _generation(self) -> str:
        decode = [
            (
                one["shape"],
                one["rows"],
                f"{one['prompt']} + {one['new']}",
                "a graph" if one["graphs"] else "single kernels",
                f"{one['tokens_per_second']:,.0f}",
                f"{1000 * one['seconds_per_step']:.2f} ms",
                f"{one['bytes_per_second'] / 1e12:.2f} TB/s",
                f"{one['bytes_per_second'] / self._bandwidth:.1%}",
            )
            for one in self._of("decode")
        ]
        prefill = [
            (
                one["shape"],
                f"{one['rows']} x {one['prompt']}",
                f"{one['tokens_per_second']:,.0f}",
                f"{one['flops'] / 1e12:,.0f}",
                f"{one['flops'] / self._product:.1%}",
            )
            for one in self._of("prefill")
        ]
        text = ""

        if decode:
            text += f"{DECODING}\n\n" + _table(
                (
                    *("shape", "rows", "prompt + answer", "launched as"),
                    *("tokens/s", "a step", "read", "of the copy"),
                ),
                decode,
            )

        if prefill:
            text += "\nPrefill, from prompts to the first token:\n\n" + _table(
                ("shape", "prompts", "tokens/s", "TFLOP/s", "of the product"), prefill
            )

        return (
            _section("Generation", text + "\n`python benchmarks/gpu_jobs.py 'generation 7b'`")
            if text
            else ""
        )

    def _memory(self) -> str:
        rows = [
            (
                _planned(one),
                f"{one['plan_bytes'] / GIB:.2f}",
                f"{one['peak_bytes'] / GIB:.2f}",
                f"{one['plan_bytes'] / one['peak_bytes'] - 1:+.1%}"
                if one["peak_bytes"]
                else "unknown",
            )
            for one in self.figures
            if "plan_bytes" in one
        ]
        head = ("", "plan, GiB", "peak, GiB", "error of the plan")
        return (
            _section("Memory against the plan", f"{MEMORY}\n\n{_table(head, rows)}") if rows else ""
        )

    def _ppo(self) -> str:
        rows = [
            (
                one["shape"],
                f"{one['parameters'] / 1e6:.1f}M",
                one["iteration"],
                *(f"{one[part]:.2f} s" for part in ("rollout", "scoring", "update", "total")),
            )
            for one in self._of("ppo")
        ]
        head = ("shape", "parameters", "iteration", "rollout", "scoring", "update", "together")
        return (
            _section("PPO", f"{PPO}\n\n{_table(head, rows)}\n`python benchmarks/gpu_jobs.py ppo`")
            if rows
            else ""
        )

    def _tests(self) -> str:
        if not self.tests:
            return ""

        count = {
            outcome: sum(one["outcome"] == outcome for one in self.tests)
            for outcome in ("passed", "failed", "skipped")
        }
        rows = [
            (
                one["file"].removeprefix("test_"),
                one["name"].removeprefix("test_").replace("_", " "),
                one["outcome"],
                f"{one['seconds']:.1f} s",
                "; ".join(f"{name}: {value}" for name, value in one["figures"].items()),
            )
            for one in self.tests
        ]
        return _section(
            "Tests",
            ", ".join(f"{number} {outcome}" for outcome, number in count.items())
            + ".\n\n"
            + _table(("file", "test", "", "", "figures"), rows)
            + "\n`python -m pytest tests/gpu`",
        )

    def _words(self) -> str:
        failed = {
            f"{one['file']}: {one['name']}": one["words"]
            for one in self.tests
            if one["outcome"] == "failed"
        }
        words = {**self.ends, **failed}
        return (
            _section(
                "What failed",
                "\n".join(
                    f"**{name}**\n```\n{_fenced(text)}\n```\n" for name, text in words.items()
                ),
            )
            if words
            else ""
        )


def _planned(one: dict[str, Any]) -> str:
    """What a plan was made for."""
    if one["what"] != "training":
        how = "" if one["graphs"] else ", single kernels"
        return f"{one['what']} {one['shape']}, {one['rows']} rows{how}"

    how = ", compiled" if one["compile"] else ", recomputed" if one["checkpointing"] else ""
    return f"training {one['shape']}, {_layers(one)} layers{how}"


def _layers(one: dict[str, Any]) -> str:
    return str(one["layers"]) if one["layers"] == one["of"] else f"{one['layers']} of {one['of']}"


def _fenced(text: str) -> str:
    return text.strip().replace("```", "'''")


def _section(title: str, text: str) -> str:
    return f"## {title}\n{text.rstrip()}\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [
        " | ".join(head),
        " | ".join("---" for _ in head),
        *(" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in rows),
    ]
    return "".join(f"| {line} |\n" for line in lines)
