"""Generation: tokens a second of the engine, and its ratio to transformers' `generate` and
llama.cpp in the same run.

    python benchmarks/engine.py [--shapes demo T S] [--batches 1 16 64] [--precisions fp32 bf16 int8
    int4]
                                [--threads N] [--only even mixed rejection] [--llamacpp-python PATH]

Prefill and decode are greedy, without stop ids: prefill = rows x prompt / time of one token, decode
= rows x (new - 1) / (time of all tokens - time of one). `mixed` is what the recipe does: prompts
and answers of many lengths, drawn at temperature 1, twice as many prompts as slots; transformers
gets the same prompts in padded batches, longest first, and only tokens up to the stop id count.
`rejection` is 16 samples of 64 tokens for each of 64 prompts, which transformers gets 16 prompts at
a time (`num_return_sequences`). Both sides use the same weights, allocator and threads; the best of
the repeats counts, repeats interleaved. llama.cpp takes part in prefill and decode if the given
interpreter has llama-cpp-python and gguf; int8 is compared with its Q8_0, int4 with its Q4_1. It is
a process of its own that rests while others are measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import transformers
from common import SIZES, Side

from llama2 import cpu_tuning
from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.quantize import WeightPrecision

SHAPES = {
    "demo": LlamaConfig(1024, 128, 352, 4, 4, 4, 512),
    "T": SIZES["T"].config,
    "S": SIZES["S"].config,
}
# tokens of a prompt and of an answer
LENGTHS = {"demo": (40, 40), "T": (128, 128), "S": (128, 128)}
REJECTION_PROMPTS, REJECTION_SAMPLES, REJECTION_TOKENS, REJECTION_PART = 64, 16, 64, 16
STOPS = 1 / 40  # share of the vocabulary that ends an answer in `mixed`


def best(jobs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The least seconds of each job, after one run to warm up."""
    for job in jobs.values():
        job()

    rounds = [{name: job() for name, job in jobs.items()} for _ in range(repeats)]
    return {name: min(each[name] for each in rounds) for name in jobs}


def clock(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def peer(model: Llama, precision: WeightPrecision) -> transformers.LlamaForCausalLM:
    """The same weights in transformers."""
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**vars(model.config)))
    theirs.load_state_dict(model.state_dict(), strict=False)
    if model.config.tie_word_embeddings:
        theirs.tie_weights()

    return theirs.eval().to(torch.float32 if precision == "fp32" else torch.bfloat16)


def random_prompts(config: LlamaConfig, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, config.vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]


def llamacpp(
    shape: str,
    rows: int,
    precision: str,
    prompts: list[list[int]],
    new: int,
    repeats: int,
    python: str,
) -> tuple[float, float]:
    """llama.cpp's tokens a second of prefill and decode."""
    kind = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_1"}[precision]
    threads = torch.get_num_threads()
    words = [json.dumps(vars(SHAPES[shape])), kind, str(rows), str(threads)]

    with Side("llama.cpp", python, "llamacpp.py", words, threads) as side:
        found = [side.ask(prompts=prompts, new=new) for _ in range(repeats + 1)]

    tokens = rows * len(prompts[0]), rows * (new - 1)
    return tokens[0] / min(each["prefill"] for each in found), tokens[1] / min(
        each["decode"] for each in found
    )


def even(shape: str, rows: int, precision: WeightPrecision, repeats: int, python: str = "") -> None:
    """Prefill and decode of rows of one length."""
    model, (prompt, new) = Llama(SHAPES[shape]).requires_grad_(False), LENGTHS[shape]
    prompts, engine, theirs = (
        random_prompts(model.config, [prompt] * rows),
        Engine(model, slots=rows, precision=precision),
        peer(model, precision),
    )
    tokens = torch.tensor(prompts)
    greedy = Sampling(temperature=0, max_tokens=new)

    def hugging(count: int) -> object:
        return theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )

    rates: dict[str, float] = {}
    seconds = best(
        {
            "ours 1": lambda: clock(
                lambda: engine.generate(prompts, replace(greedy, max_tokens=1))
            ),
            "ours all": lambda: clock(lambda: engine.generate(prompts, greedy)),
            "peer 1": lambda: clock(lambda: hugging(1)),
            "peer all": lambda: clock(lambda: hugging(new)),
        },
        repeats,
    )
    for name, ours, peers in (
        ("prefill", *(rows * prompt / seconds[f"{side} 1"] for side in ("ours", "peer"))),
        (
            "decode",
            *(
                rows * (new - 1) / (seconds[f"{side} all"] - seconds[f"{side} 1"])
                for side in ("ours", "peer")
            ),
        ),
    ):
        show(shape, rows, precision, name, ours, peers)
        rates[name] = ours

    if python:
        for name, theirs in zip(
            rates, llamacpp(shape, rows, precision, prompts, new, repeats, python)
        ):
            show(shape, rows, precision, name, rates[name], theirs, "llama.cpp")


def mixed(shape: str, rows: int, precision: WeightPrecision, repeats: int) -> None:
    """Ragged prompts and answers, twice as many as slots."""
    model, (prompt, new) = Llama(SHAPES[shape]).requires_grad_(False), LENGTHS[shape]
    lengths = torch.randint(
        prompt // 2, prompt * 3 // 2, (2 * rows,), generator=torch.Generator().manual_seed(1)
    )
    prompts = random_prompts(model.config, lengths.tolist())
    stops = tuple(range(3, 3 + int(model.config.vocab_size * STOPS)))
    engine, theirs = Engine(model, slots=rows, precision=precision), peer(model, precision)
    sampling = Sampling(max_tokens=3 * new, stop=stops)
    counts = {"ours": 0, "peer": 0}

    def ours() -> None:
        counts["ours"] = sum(len(each.tokens) for (each,) in engine.generate(prompts, sampling))

    def hugging() -> None:
        counts["peer"] = 0
        order = sorted(prompts, key=len, reverse=True)
        for batch in (order[:rows], order[rows:]):
            width = len(batch[0])
            tokens = torch.tensor([[0] * (width - len(each)) + each for each in batch])
            mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in batch])
            out = theirs.generate(
                tokens,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=3 * new,
                eos_token_id=list(stops),
                pad_token_id=0,
            )[:, width:]
            counts["peer"] += int((out != 0).sum())

    rates = {"ours": 0.0, "peer": 0.0}
    # the answers of the peer differ from run to run, so rates, not times
    for _ in range(repeats + 1):
        for name, work in (("ours", ours), ("peer", hugging)):
            seconds = clock(work)
            rates[name] = max(rates[name], counts[name] / seconds)

    show(shape, rows, precision, "mixed", rates["ours"], rates["peer"])


def rejection(shape: str, rows: int, precision: WeightPrecision, repeats: int) -> None:
    """Many samples of each prompt, as rejection sampling draws them (§3.2.3)."""
    model, (prompt, _) = Llama(SHAPES[shape]).requires_grad_(False), LENGTHS[shape]
    prompts = random_prompts(model.config, [prompt] * REJECTION_PROMPTS)
    engine, theirs = Engine(model, slots=rows, precision=precision), peer(model, precision)
    sampling = Sampling(n=REJECTION_SAMPLES, max_tokens=REJECTION_TOKENS)

    def hugging() -> None:
        for part in torch.tensor(prompts).split(REJECTION_PART):
            theirs.generate(
                part,
                attention_mask=torch.ones_like(part),
                do_sample=True,
                top_k=0,
                eos_token_id=None,
                num_return_sequences=sampling.n,
                max_new_tokens=sampling.max_tokens,
                pad_token_id=0,
            )

    seconds = best(
        {
            "ours": lambda: clock(lambda: engine.generate(prompts, sampling)),
            "peer": lambda: clock(hugging),
        },
        repeats,
    )
    count = len(prompts) * sampling.n * sampling.max_tokens
    show(shape, rows, precision, "rejection", count / seconds["ours"], count / seconds["peer"])


def show(
    shape: str,
    rows: int,
    precision: str,
    what: str,
    ours: float,
    peers: float,
    peer: str = "transformers",
) -> None:
    print(
        f"{shape:5} rows {rows:3} {precision} {what:9} {ours:9,.0f} tokens/s  {peer:12} {peers:9,.0f}  "
        f"ratio {ours / peers:5.2f}",
        flush=True,
    )


KINDS = {"even": even, "mixed": mixed, "rejection": rejection}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument(
        "--precisions",
        nargs="+",
        default=["fp32", "bf16"],
        choices=["fp32", "bf16", "int8", "int4"],
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument(
        "--llamacpp-python", default="", help="an interpreter that has llama-cpp-python and gguf"
    )
    arguments = parser.parse_args()

    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    cpu_tuning.tune()
    transformers.utils.logging.set_verbosity_error()
    print(f"{torch.get_num_threads()} threads")

    for shape in arguments.shapes:
        for precision in arguments.precisions:
            if "even" in arguments.only:
                for rows in arguments.batches:
                    even(shape, rows, precision, arguments.repeats, arguments.llamacpp_python)

            for kind in ("mixed", "rejection"):
                if kind in arguments.only:
                    KINDS[kind](shape, max(arguments.batches), precision, arguments.repeats)


if __name__ == "__main__":
    main()
