"""Training: tokens a second of whole optimizer steps, and the ratio to transformers and litgpt in
the same run.

    python benchmarks/train.py [--size T S M] [--dtype fp32 bf16] [--rounds N] [--seconds N]
    [--no-compile]
                               [--sides NAME ...] [--threads N] [--peer-python PATH]

A step is forward, loss, backward, clipping to norm 1 and AdamW, on random tokens and weights. Ours
runs through `train.loop.fit` with the objective of pretraining, so what is measured is what trains.
Every side is a process of its own with the same threads and allocator setting; they take turns over
`--rounds` rounds of `--seconds` each, and a round counts by its median step. `better peer` is the
fastest of the peers' sides, compiled or not. MFU is against the 1024-cube matrix product, the best
of all rounds. The first step of a compiled side includes compiling, from an empty cache unless
TORCHINDUCTOR_CACHE_DIR is set. fp32 of the peers is PyTorch's own choice of kernels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Any

import torch
from common import SIZES, Side, Size, has, serve, spread

from llama2 import cpu_tuning, devices
from llama2.batches import Batch
from llama2.model.llama import Llama
from llama2.ranks import Ranks
from llama2.stages.common.memory import flops_per_token
from llama2.train.learner import Learner
from llama2.train.loop import Hook, Plan, Report, TrainingState, fit
from llama2.train.objectives import next_token

PEERS = ("transformers", "litgpt")
COMPILED = " compiled"


class RandomTokens:
    """An endless source of one batch a step."""

    def __init__(self, size: Size) -> None:
        self.size, self.weights_BT = size, torch.ones(size.rows, size.length)

    def __next__(self) -> list[Batch]:
        tokens = torch.randint(
            3, self.size.config.vocab_size, (self.size.rows, self.size.length + 1)
        )
        return [
            {
                "tokens_BT": tokens[:, :-1].contiguous(),
                "targets_BT": tokens[:, 1:].contiguous(),
                "weights_BT": self.weights_BT,
            }
        ]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Clock(Hook):
    """Seconds of each step, all of the loop included; ends training when `seconds` are over."""

    def __init__(self, seconds: float) -> None:
        self.steps: list[float] = []
        self.last = time.perf_counter()
        self.end = self.last + seconds

    def on_step(self, training: TrainingState, report: Report) -> None:
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.last, training.finish = now, now >= self.end


def ours(size: Size, precision: devices.Precision, compile: bool) -> None:
    """This project as a side."""
    ranks = Ranks.alone()
    model = Llama(size.config).to(ranks.device)
    learner = Learner(model, ranks, precision=precision, compile=compile)
    source, plan = RandomTokens(size), Plan(schedule="constant")

    def work(seconds: float) -> dict[str, Any]:
        clock = Clock(seconds)
        fit(learner, source, next_token, plan, [clock])
        return {"seconds": clock.steps}

    serve(work)


def ceiling(precision: devices.Precision) -> None:
    """The matrix product as a side: what MFU is measured against."""

    device = devices.choose()

    def work(seconds: float) -> dict[str, Any]:
        end, best = time.perf_counter() + min(seconds, 1.0), 0.0
        while not best or time.perf_counter() < end:
            devices.measure_peak.cache_clear()
            best = max(best, devices.measure_peak(device, precision))

        return {"flops": best}

    serve(work)


def compare(name: str, precision: str, sides: list[str], arguments: argparse.Namespace) -> None:
    """All rounds of one size and dtype, and what they came to."""
    size, rates, first, peak = SIZES[name], dict[str, list[float]](), dict[str, float](), 0.0
    with ExitStack() as stack:
        roof = stack.enter_context(
            Side(
                "ceiling",
                sys.executable,
                "train.py",
                ["--serve", "ceiling", "--size", name, "--dtype", precision],
                arguments.threads,
            )
        )
        running = [stack.enter_context(start(each, name, precision, arguments)) for each in sides]
        for side in (roof, *running):  # all have started and are warm before any is measured
            first[side.name] = side.ask(seconds=0).get("seconds", [0.0])[0]

        for _ in range(arguments.rounds):
            peak = max(peak, roof.ask(seconds=arguments.seconds)["flops"])
            for side in running:
                steps = side.ask(seconds=arguments.seconds)["seconds"]
                rates.setdefault(side.name, []).append(size.tokens / statistics.median(steps))

    flops = flops_per_token(size.config, size.length)
    print(
        f"{name} {precision}: matrix product {peak / 1e9:,.0f} GFLOP/s, {flops / 1e6:.1f} MFLOP a token"
    )
    for label, values in rates.items():
        print(
            f"  {label:21} {spread(values):>30} tokens/s   MFU {statistics.median(values) * flops / peak:5.1%}   "
            f"first step {first[label]:5.1f} s"
        )

    others = [values for label, values in rates.items() if not label.startswith("ours")]
    if others:
        better = max(others, key=statistics.median)
        for label in [label for label in rates if label.startswith("ours")]:
            print(
                f"  {label:21} {spread([a / b for a, b in zip(rates[label], better)], '.2f'):>30} of the better peer"
            )

    sys.stdout.flush()


def start(side: str, size: str, precision: str, arguments: argparse.Namespace) -> Side:
    """The process of a side."""
    program = side.removesuffix(COMPILED)
    flags = ["--compile"] if side.endswith(COMPILED) else []
    if program == "ours":
        return Side(
            side,
            sys.executable,
            "train.py",
            ["--serve", "ours", "--size", size, "--dtype", precision, *(flags or ["--no-compile"])],
            arguments.threads,
        )

    return Side(
        side,
        arguments.peer_python,
        "peers.py",
        ["train", program, size, precision, *flags],
        arguments.threads,
    )


def available(arguments: argparse.Namespace) -> list[str]:
    """The sides to run: those asked for that are installed."""
    sides = ["ours"]
    for peer in PEERS:
        if has(arguments.peer_python, peer):
            sides.append(peer)
        else:
            print(
                f"{peer} is not installed and left out: pip install 'llama2[bench]', or give --peer-python"
            )

    if arguments.compile:
        sides = [side + suffix for side in sides for suffix in ("", COMPILED)]

    return [side for side in sides if not arguments.sides or side in arguments.sides]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", default=["T", "S"], choices=list(SIZES))
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--sides", nargs="+", metavar="NAME", help="only these, e.g. ours 'litgpt compiled'"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--peer-python", default=sys.executable, help="an interpreter that has the peers"
    )
    parser.add_argument("--serve", choices=("ours", "ceiling"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.serve:
        cpu_tuning.tune()
        torch.manual_seed(0)
        precision = arguments.dtype[0]

        if arguments.serve == "ceiling":
            ceiling(precision)
        else:
            ours(SIZES[arguments.size[0]], precision, arguments.compile)

        return

    sides = available(arguments)
    print(
        f"{arguments.threads} threads, torch {torch.__version__}, {arguments.rounds} rounds of "
        f"{arguments.seconds:g} s a side",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        for size in arguments.size:
            for precision in arguments.dtype:
                compare(size, precision, sides, arguments)


if __name__ == "__main__":
    main()
