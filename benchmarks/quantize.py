"""Weights of fewer bits: what a decoding step takes with each precision, and what torchao's own
products do here.

    python benchmarks/quantize.py [--size S] [--batches 1 16] [--repeats 20] [--threads N]

`decode`: steps of one and of many rows at position 64, best of the repeats, precisions by turns; MB
is what one step reads. `products`: every way in which torchao can keep a matrix in 4 bits, on a
matrix of the size's feed-forward: its error beside the product in fp32 (rounding to 4 bits alone
costs 6 to 8 %), and its time over that of PyTorch's bf16 product; or, in torchao's words, why it
does not run on this machine.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import SIZES
from torch import Tensor, nn

from llama2 import cpu_tuning
from llama2.generate.snapshot import Snapshot
from llama2.kernels.build import Struct
from llama2.model import quantize
from llama2.model.cache import KVCache
from llama2.model.llama import Llama, LlamaConfig

PRECISIONS: tuple[quantize.WeightPrecision, ...] = ("fp32", "bf16", "int8", "int4")
POSITION = 64


def count_bytes(struct: Struct) -> int:
    """Bytes of the tensors that a struct of the decoder points to, and those inside it."""
    tensors = [value for value in struct.values.values() if isinstance(value, torch.Tensor)]
    inner = [value for value in struct.values.values() if isinstance(value, Struct)]
    return sum(value.nbytes for value in tensors) + sum(map(count_bytes, inner))


def best(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least seconds of each job, after one run to warm up; the jobs take turns."""
    found = dict.fromkeys(jobs, float("inf"))
    for turn, (name, job) in itertools.product(range(repeats + 1), jobs.items()):
        begin = time.perf_counter()
        job()
        if turn:
            found[name] = min(found[name], time.perf_counter() - begin)

    return found


def decode(shape: LlamaConfig, batches: Sequence[int], repeats: int) -> None:
    """Tokens a second of decoding steps."""
    model = Llama(shape).requires_grad_(False)
    decoders = {}
    for precision in PRECISIONS:
        snapshot = Snapshot(model, precision)
        snapshot.refresh()
        decoders[precision] = snapshot.decoder

    for rows in batches:
        jobs = {}
        for precision, decoder in decoders.items():
            if decoder is None:
                raise SystemExit(
                    "our own decoding step does not run here: no C++ compiler, or no CPU"
                )

            cache = KVCache(
                shape.num_hidden_layers,
                rows,
                shape.num_key_value_heads,
                POSITION + 1,
                shape.head_dim,
                dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
                device=torch.device("cpu"),
            )
            tokens, positions = torch.arange(rows), torch.full((rows,), POSITION)
            jobs[precision] = lambda d=decoder, c=cache, t=tokens, p=positions: d(t, p, c)  # type: ignore[misc]

        seconds = best(jobs, repeats)
        for name, decoder in decoders.items():
            assert decoder is not None
            structs = [*decoder._layers, decoder._model.values["head"]]
            held = sum(map(count_bytes, structs))
            print(
                f"decode  rows {rows:3}  {name}  {rows / seconds[name]:9,.0f} tokens/s  {held / 1e6:7.1f} MB  "
                f"{seconds['bf16'] / seconds[name]:5.2f} of bf16's speed",
                flush=True,
            )


def ways() -> Iterator[tuple[str, Callable[[], Any]]]:
    """torchao's configurations for weights in 4 bits; a way may fail when it is called."""
    ao = quantize._torchao()
    from torchao.prototype.quantization.int4 import inference_workflow as prototype
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    for form in Int4PackingFormat:
        yield (
            f"Int4WeightOnlyConfig, {form.value}",
            lambda form=form: ao.Int4WeightOnlyConfig(group_size=32, int4_packing_format=form),
        )

    yield (
        "PrototypeInt4WeightOnlyConfig",
        lambda: prototype.PrototypeInt4WeightOnlyConfig(group_size=32),
    )
    yield "Int8DynamicActivationInt4WeightConfig", prototype.Int8DynamicActivationInt4WeightConfig
    for packing in ("unpacked_to_int8", "opaque_torchao_auto"):
        yield (
            f"Int8DynamicActivationIntxWeightConfig, {packing}",
            lambda packing=packing: ao.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4,
                weight_granularity=ao.PerGroup(32),  # type: ignore[attr-defined]
                intx_packing_format=packing,
            ),
        )

    yield (
        "IntxWeightOnlyConfig, asymmetric (int4's rounding)",
        lambda: ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32), ao.MappingType.ASYMMETRIC),
    )  # type: ignore[attr-defined]


@torch.inference_mode()
def products(shape: LlamaConfig, batches: Sequence[int], repeats: int) -> None:
    """torchao's products over one matrix."""
    ao = quantize._torchao()
    weight = torch.empty(shape.intermediate_size, shape.hidden_size).normal_(0, 0.02).bfloat16()
    inputs = {rows: torch.randn(rows, shape.hidden_size).bfloat16() for rows in batches}

    for name, way in ways():
        layer = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        try:
            ao.quantize_(layer, way())
            print(
                f"products  {name}: "
                + "; ".join(_compared(layer, weight, x, repeats) for x in inputs.values())
            )
        except Exception as error:
            print(
                f"products  {name}: {type(error).__name__}: {str(error).splitlines()[0]}",
                flush=True,
            )


def _compared(layer: nn.Linear, weight: Tensor, x: Tensor, repeats: int) -> str:
    exact = x.float() @ weight.float().T
    seconds = best({"theirs": lambda: layer(x), "bf16": lambda: F.linear(x, weight)}, 10 * repeats)
    return (
        f"rows {len(x):3} error {(layer(x) - exact).norm() / exact.norm():.1%} "
        f"time {seconds['theirs'] / seconds['bf16']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="S", choices=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()

    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    cpu_tuning.tune()
    print(f"{torch.get_num_threads()} threads, size {arguments.size}")
    decode(SIZES[arguments.size].config, arguments.batches, arguments.repeats)
    products(SIZES[arguments.size].config, arguments.batches, arguments.repeats)


if __name__ == "__main__":
    main()
