"""What `gpu.py` measures on a GPU, a job at a time, each in a process of its own: one that fails
harms no other.

    python benchmarks/gpu_jobs.py JOB [--tiny]

Every figure is a line of JSON on standard output as soon as it is known. `JOBS` names the jobs.
Weights are random. Training goes through `train.loop.fit` with the objective of pretraining on
packed rows of four documents, in bf16; generation through the engine, greedy and without stop ids.
The first job measures the ceilings: a copy within the device's memory, counting bytes read and
written, and the bf16 product of 8192-cubes of random numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import SIZES as SMALL
from common import Side, Size
from train import RandomTokens

from llama2 import devices
from llama2.batches import Batch
from llama2.generate.engine import Engine
from llama2.generate.graphed_decoder import failures
from llama2.generate.sampling import Sampling
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.sizes import SIZES
from llama2.ranks import Ranks, join
from llama2.stages.common.memory import Tower, engine_bytes, flops_per_token
from llama2.stages.common.planning import Cluster, plan_training
from llama2.stages.common.sampling import Sample
from llama2.stages.common.training import Training
from llama2.train.learner import Learner
from llama2.train.loop import Plan, fit
from llama2.train.objectives import next_token
from llama2.train.optim import AdamW

GIB = float(1 << 30)
# of the device's memory that a plan may take: context, workspaces and fragmentation want the rest
ROOM = 0.9
DOCUMENTS = 4  # of a packed row
COMPILED_LAYERS = 8  # a compiler takes seconds a layer, and layers are alike


@dataclass(frozen=True)
class Scale:
    """How large the jobs are: as on a GPU, or just large enough to run."""

    shapes: dict[str, LlamaConfig]
    length: int
    rows: dict[str, int]
    steps: int
    prompt: int
    batches: tuple[int, ...]
    prefill: tuple[int, int]  # rows, tokens
    copy_bytes: int
    ppo: str


REAL = Scale(
    {name: SIZES[name] for name in ("1b", "7b")},
    4096,
    {"1b": 4, "7b": 1},
    6,
    128,
    (1, 16, 64),
    (8, 2048),
    4 << 30,
    "M",
)
TINY = Scale(
    {name: replace(SMALL["XS"].config, max_position_embeddings=256) for name in ("1b", "7b")},
    64,
    {"1b": 2, "7b": 1},
    2,
    8,
    (1, 4),
    (2, 16),
    1 << 20,
    "XS",
)


def say(job: str, **figures: Any) -> None:
    """One line for the page, and for whoever watches."""
    print(json.dumps({"job": job, **figures}), flush=True)


def on_device(shape: LlamaConfig, kind: torch.dtype = torch.float32) -> Llama:
    """A model of random weights, made where it is needed: drawing 7B numbers on a CPU takes a
    minute."""
    with torch.device("meta"):
        model = Llama(shape)

    model = model.to(kind).to_empty(device=devices.choose())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)

    return model


def fresh_memory() -> None:
    """Forget what is not used and the peak so far."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """Bytes of tensors at their most, since `fresh_memory`; 0 on a CPU."""
    return float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0.0


def best(work: Callable[[], object], times: int = 3) -> float:
    """The least seconds of several runs, after one to warm up."""
    work()
    found = []
    for _ in range(times):
        devices.synchronize(devices.choose())
        begin = time.perf_counter()
        work()
        devices.synchronize(devices.choose())
        found.append(time.perf_counter() - begin)

    return min(found)


# --- ceilings ---
def ceilings(scale: Scale) -> None:
    """The copy and the product."""
    source = torch.empty(scale.copy_bytes, dtype=torch.uint8, device=devices.choose()).random_()
    target = torch.empty_like(source)
    say(
        "ceilings",
        what="copy",
        bytes_per_second=2 * len(source) / best(lambda: target.copy_(source), 10),
    )
    say("ceilings", what="product", flops=devices.measure_peak(devices.choose(), "bf16"))


# --- training ---
class PackedTokens(RandomTokens):
    """Batches of random tokens in documents of equal length, as pretraining packs them."""

    def __next__(self) -> list[Batch]:
        (batch,) = super().__next__()
        place_T = torch.arange(self.size.length)
        part = -(-self.size.length // DOCUMENTS)
        ids_BT, positions_BT = (
            (x)[None].expand(self.size.rows, -1).contiguous()
            for x in (place_T // part, place_T % part)
        )

        return [{**batch, "documents_BT": ids_BT, "positions_BT": positions_BT}]


def planned(shape: LlamaConfig, rows: int, length: int, settings: Training) -> float:
    """Bytes that a dry run tells for training on one device."""
    found = plan_training(
        [Tower(shape)],
        settings,
        Cluster(ranks=1),
        rows=rows,
        micro_rows=rows,
        length=length,
        steps=1,
        packed=True,
    )
    return float(found["memory_per_rank_gib"]["together"]) * GIB


def fitting(
    shape: LlamaConfig, rows: int, length: int, settings: Training, most: int
) -> LlamaConfig:
    """The shape with as many of its layers as the plan says this device holds, and `most`."""
    layers = min(most, shape.num_hidden_layers)
    if torch.cuda.is_available():
        room = ROOM * torch.cuda.get_device_properties(devices.choose()).total_memory
        while (
            layers > 1
            and planned(replace(shape, num_hidden_layers=layers), rows, length, settings) > room
        ):
            layers -= 1

    return replace(shape, num_hidden_layers=layers)


def training(
    scale: Scale, name: str, *, compile: bool = False, checkpointing: bool = False
) -> None:
    """Tokens a second and MFU of whole optimizer steps; the peak of memory against the plan.

    Where the plan said too little, fewer layers are tried: a figure of some is better than none.
    """
    settings = Training(precision="bf16", compile=compile, gradient_checkpointing=checkpointing)
    most = COMPILED_LAYERS if compile and name == "7b" else 10**6
    planned_for = fitting(scale.shapes[name], scale.rows[name], scale.length, settings, most)

    for share in (1.0, 0.75, 0.5):
        layers = max(1, int(share * planned_for.num_hidden_layers))
        try:
            train(scale, name, replace(planned_for, num_hidden_layers=layers), settings)
            return
        except torch.OutOfMemoryError as error:
            say(f"training {name}", what="memory", layers=layers, words=str(error).splitlines()[0])

        fresh_memory()


def train(scale: Scale, name: str, shape: LlamaConfig, settings: Training) -> None:
    """`training` of one shape."""
    rows, length = scale.rows[name], scale.length
    plan = planned(shape, rows, length, settings)
    fresh_memory()
    model = on_device(shape)
    model.model.gradient_checkpointing = settings.gradient_checkpointing
    learner = Learner(
        model,
        Ranks.alone(),
        AdamW(learning_rate=1e-5),
        precision="bf16",
        compile=settings.compile,
    )
    source = PackedTokens(Size(shape, rows, length))
    first = steps(learner, source, 2)
    seconds = steps(learner, source, scale.steps) / scale.steps
    rate = rows * length / seconds
    say(
        f"training {name}",
        what="training",
        shape=name,
        layers=shape.num_hidden_layers,
        of=scale.shapes[name].num_hidden_layers,
        parameters=shape.parameters(),
        rows=rows,
        length=length,
        compile=settings.compile,
        checkpointing=settings.gradient_checkpointing,
        first_seconds=first,
        seconds_per_step=seconds,
        tokens_per_second=rate,
        flops=rate * flops_per_token(shape, length),
        plan_bytes=plan,
        peak_bytes=peak_memory(),
    )


def steps(learner: Learner, source: PackedTokens, count: int) -> float:
    """Seconds of so many more optimizer steps."""
    devices.synchronize(devices.choose())
    begin = time.perf_counter()
    fit(learner, source, next_token, Plan(schedule="constant", max_steps=learner.step + count))
    devices.synchronize(devices.choose())

    return time.perf_counter() - begin


# --- generation ---
def generation(scale: Scale, name: str) -> None:
    """Decoding, as graphs and, for the fewest and the most rows, by single kernels; prefill against
    the products it must make."""
    shape = scale.shapes[name]
    fresh_memory()
    model = on_device(shape, torch.bfloat16).requires_grad_(False).eval()
    for rows in scale.batches:
        decoding(scale, name, model, rows, graphs=True)
        if rows in (min(scale.batches), max(scale.batches)):
            decoding(scale, name, model, rows, graphs=False)

    rows, length = scale.prefill
    engine = Engine(model, slots=rows, precision="bf16")
    prompts = random_prompts(shape, rows, length)
    seconds = best(lambda: engine.generate(prompts, Sampling(temperature=0, max_tokens=1)), 2)
    # read behind the last token only
    head = 2.0 * shape.vocab_size * shape.hidden_size * (1 - 1 / length)
    say(
        f"generation {name}",
        what="prefill",
        shape=name,
        rows=rows,
        prompt=length,
        tokens_per_second=rows * length / seconds,
        flops=rows * length * (flops_per_token(shape, length) / 3 - head) / seconds,
    )


def decoding(scale: Scale, name: str, model: Llama, rows: int, *, graphs: bool) -> None:
    """Decoding against the bytes it must read, memory against the plan. Steps are recorded in the
    runs that warm up."""
    os.environ["LLAMA2_CUDA_GRAPHS"] = str(int(graphs))
    shape, prompt, new = scale.shapes[name], scale.prompt, scale.prompt
    engine = Engine(model, slots=rows, precision="bf16")
    prompts = random_prompts(shape, rows, prompt)
    engine.generate(prompts, Sampling(temperature=0, max_tokens=4))
    fresh_memory()
    one = best(lambda: engine.generate(prompts, Sampling(temperature=0, max_tokens=1)), 1)
    many = best(lambda: engine.generate(prompts, Sampling(temperature=0, max_tokens=new)), 1)
    seconds = max(many - one, 1e-9) / (new - 1)
    weights = 2.0 * (
        shape.parameters() - shape.vocab_size * shape.hidden_size * (not shape.tie_word_embeddings)
    )
    cache = (
        4.0
        * shape.num_hidden_layers
        * shape.num_key_value_heads
        * shape.head_dim
        * rows
        * (prompt + new / 2)
    )
    held = 2.0 * shape.parameters() + engine_bytes(
        shape, Sample(slots=rows, max_tokens=new), copied=False
    )
    say(
        f"generation {name}",
        what="decode",
        shape=name,
        rows=rows,
        prompt=prompt,
        new=new,
        graphs=graphs and not failures,  # they end with the first one
        tokens_per_second=rows / seconds,
        seconds_per_step=seconds,
        bytes_per_second=(weights + cache) / seconds,
        peak_bytes=peak_memory(),
        plan_bytes=held,
    )


def random_prompts(shape: LlamaConfig, rows: int, length: int) -> list[list[int]]:
    """Prompts that share nothing."""
    random = torch.Generator().manual_seed(0)
    table: list[list[int]] = torch.randint(
        3, shape.vocab_size, (rows, length), generator=random
    ).tolist()
    return table


# --- PPO ---
def ppo(scale: Scale) -> None:
    """Seconds of an iteration as `benchmarks/ppo.py` measures it."""
    words = ["--serve", "--size", scale.ppo, "--dtype", "bf16"]
    with Side("ours", sys.executable, "ppo.py", words, torch.get_num_threads()) as side:
        for number in range(3):
            found = side.ask()
            say(
                "ppo",
                what="ppo",
                shape=scale.ppo,
                parameters=SMALL[scale.ppo].config.parameters(),
                iteration=number + 1,
                **found,
            )


JOBS: dict[str, Callable[[Scale], None]] = {
    "ceilings": ceilings,
    "training 1b": lambda scale: training(scale, "1b"),
    "generation 1b": lambda scale: generation(scale, "1b"),
    "training 7b": lambda scale: training(scale, "7b", checkpointing=True),
    "generation 7b": lambda scale: generation(scale, "7b"),
    "ppo": ppo,
    "training 1b compiled": lambda scale: training(scale, "1b", compile=True),
    "training 7b, activations kept": lambda scale: training(scale, "7b"),
    "training 7b compiled": lambda scale: training(scale, "7b", compile=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=list(JOBS))
    parser.add_argument("--tiny", action="store_true", help="on the CPU, as small as can be")
    arguments = parser.parse_args()
    join()
    torch.manual_seed(0)
    JOBS[arguments.job](TINY if arguments.tiny else REAL)


if __name__ == "__main__":
    main()
