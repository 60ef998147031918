"""Memory of `evaluate` and `select`: what their plans say, and what is really alive; exits 1 if
they differ by more.

    python benchmarks/memory.py [--threads N] [--within 0.1]

Two versions and two reward models of 102M parameters with random weights answer and judge 32
prompts: once for `evaluate`, once for `select`. On a GPU the device's own count is read. On a CPU
every operation is watched, and the bytes of all storages that are alive are summed; the plan is
then that on a CPU, where the engine packs the weights once more, unless LLAMA2_NATIVE=0 asks for
PyTorch's own operations.

A row for the judges, which stay below the versions here, and one for the whole stage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama2 import devices, records
from llama2.config import build
from llama2.formats import checkpoint
from llama2.generate import cpu_decoder
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.scorer import Scorer
from llama2.records import Message, Prompt
from llama2.runs import open_run
from llama2.stages import evaluate, select
from llama2.stages.common.planning import GIB, Cluster, PlannedRuns
from llama2.tokenizer.template import encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.train import train

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 64, 64
WORDS = "river stone cloud lamp apple garden winter mountain letter window bread silver candle harbour meadow"


class Alive(TorchDispatchMode):
    """The bytes of all tensors that operations of this thread have met and that are still there,
    and the most of them since the last `lap`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.laps: list[int] = []
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        for value in tree_leaves((arguments, result)):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self._see(value.untyped_storage())

        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)

    def lap(self) -> None:
        """Note the most since the last time."""
        if torch.cuda.is_available():
            self.most = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

        self.laps.append(self.most)
        self.most = self.now


def main() -> int:
    parser = argparse.ArgumentParser(description="Plan and measured memory of evaluate and select.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--within", type=float, default=0.1, help="the largest difference, as a share of the plan"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    packs = devices.is_cpu(devices.choose()) and cpu_decoder._call.found
    good = True

    with tempfile.TemporaryDirectory() as place:
        root = make(Path(place))
        judges = {"helpful": root / "helpful", "safe": root / "safe"}
        common = {"prompts": root / "prompts.jsonl", "rewards": judges}
        sample = {"max_tokens": NEW_TOKENS, "slots": PROMPTS}
        stages: tuple[tuple[str, Any, dict[str, Any]], ...] = (
            (
                "evaluate",
                evaluate,
                {"versions": {"SFT": root / "first", "V1": root / "second"}, **sample},
            ),
            (
                "select",
                select,
                {"candidate": root / "second", "predecessor": root / "first", "sample": sample},
            ),
        )
        print(f"{devices.choose()}{', weights packed' if packs else ''}; GiB\n")
        print(f"{'stage':10}{'phase':12}{'plan':>8}{'measured':>10}{'of plan':>9}")

        for name, module, values in stages:
            config = build(module.Config, {"out": root / name, **common, **values})
            plan = module.plan(config, Cluster(), PlannedRuns())["memory_per_rank_gib"]
            for phase, (expected, found) in compared(
                plan, laps(name, module, config), packs
            ).items():
                print(f"{name:10}{phase:12}{expected:8.3f}{found:10.3f}{found / expected:9.1%}")
                good &= abs(found / expected - 1) <= given.within

    print("\nwithin the limit" if good else f"\nmore than {given.within:.0%} apart")
    return 0 if good else 1


def make(root: Path) -> Path:
    """Models, reward models, a tokenizer and prompts of `PROMPT_TOKENS` tokens."""
    tokenizer = train(
        [f"{word} [INST] [/INST] {WORDS}" for word in WORDS.split()] * 20, 400, root / "tokenizer"
    )
    shape = LlamaConfig(tokenizer.vocab_size, 768, 2048, 14, 12, 12, 1024)
    for seed, name in enumerate(("first", "second", "helpful", "safe")):
        model = Llama(shape, seed) if seed < 2 else Scorer(shape, seed)
        checkpoint.save(model, root / name)
        tokenizer.save(root / name)

    records.write(
        root / "prompts.jsonl",
        [
            Prompt((Message("user", _long(tokenizer, index)),), f"p{index}", index % 2 > 0)
            for index in range(PROMPTS)
        ],
    )
    return root


def _long(tokenizer: Tokenizer, index: int) -> str:
    """A text whose prompt has as many tokens as wanted, or a few fewer; another for each index."""
    words = WORDS.split()
    text = f"{index} {words[index % len(words)]}"
    while (
        len(encode_prompt(tokenizer, (Message("user", f"{text} {words[len(text) % len(words)]}"),)))
        <= PROMPT_TOKENS
    ):
        text += f" {words[len(text) % len(words)]}"

    return text


def laps(name: str, module: Any, config: Any) -> list[int]:
    """Carry out a stage; the most bytes alive until each model was let go."""
    alive, free = Alive(), devices.free_memory

    def lapped(device: torch.device) -> None:
        alive.lap()
        free(device)

    devices.free_memory = lapped  # type: ignore[assignment]
    try:
        with alive, open_run(name, config) as run:
            module.run(config, run)
    finally:
        devices.free_memory = free

    return alive.laps


def compared(
    plan: Mapping[str, Any], found: list[int], packs: bool
) -> dict[str, tuple[float, float]]:
    """phase -> GiB planned and measured: two versions come first, then two judges."""
    whole = plan["together_on_a_cpu" if packs else "together"]
    return {
        "judge": (sum(plan["judge"].values()), max(found[2:4]) / GIB),
        "together": (whole, max(found) / GIB),
    }


if __name__ == "__main__":
    sys.exit(main())
