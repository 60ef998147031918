"""Cases of the recipe: what is learnt, from which samples, and whether the figures are true."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from checks import Work, leaves_apart
from torch import nn

from llama2 import records
from llama2.ranks import Ranks
from llama2.records import Dialog, Document, Message, Preference, Prompt, Response

if TYPE_CHECKING:
    from run import Bench


def cases() -> Iterator[tuple[str, str, Work]]:
    """Name, what is expected, and the work."""
    yield "earlier_turns", "only the sampled answer is learnt", _earlier_turns
    yield "pool", "the better of an old and a new answer is kept, rescored", _pool
    yield "seeds", "every step draws its own seed", _seeds
    yield "nogold collect", "pairs to be judged are written", _collect
    yield "nogold select", "refused before anything is sampled", _select
    yield "select_loses_weights", "a checkpoint of .bin files is kept whole", _select_copies
    yield "bpb", "bits per byte of a uniform model are exact", _bits_per_byte
    yield "sft_leak", "no held-out dialog is trained on, whatever the weights", _sft_leak
    yield "share", "a mix that cannot be reached is refused, by set", _share
    yield "more: NaN", "a reward that is not finite stops with a cause", _not_a_number
    yield "more: one step", "a run of one step trains at its peak", _one_step
    yield "more: fewest ranks", "do not depend on the ranks assumed", _fewest_ranks
    yield "dupe: templates", "answer templates and several personas by default", _templates
    yield "clean_memory", "text streams: four times the text, no more memory", _clean_memory
    yield "code_version", "the C++ files are part of the version", _code_version
    yield "adapters", "an adapter in a projection changes the logits and learns", _adapters


def _asked(text: str, **more: object) -> Prompt:
    return Prompt((Message("user", text),), **more)  # type: ignore[arg-type]


def _earlier_turns(bench: Bench) -> tuple[bool, str]:
    from llama2.stages.common.sampling import make_dialog

    prompt = Prompt(
        (
            Message("user", "How?"),
            Message("assistant", "Break the window."),
            Message("user", "Then?"),
        )
    )
    found = make_dialog(prompt, "I cannot help with that.")

    return found.train == "last", f"train = {found.train}"


def _pool(bench: Bench) -> tuple[bool, str]:
    prompts = bench.scratch / "pool-prompts.jsonl"
    records.write(
        prompts,
        [
            _asked(f"what is {word} {number}", id=f"{word}{number}")
            for word in ("tea", "sun", "moon")
            for number in range(4)
        ],
    )
    # the tiny model never ends an answer: unfinished ones are let through
    more = ("--k", "3", "--sample.max-tokens", "12", "--finished-only", "false")
    one = bench.rejection(prompts, *more)
    two = bench.rejection(prompts, *more, "--seed", "1", "--earlier", str(one.out))
    old, new, pool = (
        {
            json.dumps(row["messages"][:-1]): row["messages"][-1]["content"]
            for row in got.records(name)
        }
        for got, name in ((one, "best.jsonl"), (two, "best.jsonl"), (two, "pool.jsonl"))
    )
    wanted = {
        key: max((old[key], new[key]), key=lambda text: _score(bench, key, text)) for key in old
    }
    kept = sum(wanted[key] == old[key] != new[key] for key in old)

    return (
        pool == wanted and 0 < kept < 12,
        f"{two.short()} | of 12 prompts {kept} keep their earlier answer",
    )


def _score(bench: Bench, prompt: str, text: str) -> float:
    """What the reward model gives to an answer that was cut off."""
    from llama2.formats import checkpoint
    from llama2.generate.score import score_rows
    from llama2.tokenizer import Tokenizer, encode_prompt

    turns = tuple(Message(turn["role"], turn["content"]) for turn in json.loads(prompt))
    tokenizer = Tokenizer.load(bench.model)
    row = [*encode_prompt(tokenizer, turns), *tokenizer.encode(text)]

    return score_rows(checkpoint.load_scorer(bench.helpful), [row])[0]


def _seeds(bench: Bench) -> tuple[bool, str]:
    file = bench.scratch / "seeds.yaml"
    file.write_text(
        f"out: {bench.scratch / 'seeds'}\nsteps:\n"
        + "".join(
            f"  r{n}: {{verb: rejection, policy: {bench.model}, rewards: {{helpful: {bench.helpful}}}, "
            f"prompts: {bench.file('data/prompts.jsonl')}}}\n"
            for n in (1, 2)
        ),
        "utf-8",
    )
    got = bench.llama2("run", str(file), "--dry-run", "--json")
    seeds = re.findall(r'"seed": (\d+)', got.said)

    return got.status == 0 and len(
        set(seeds)
    ) >= 3, f"exit {got.status}, seeds {sorted(set(seeds))}"


def _collect(bench: Bench) -> tuple[bool, str]:
    got = bench.llama2(
        "collect",
        "--policies",
        str(bench.model),
        "--prompts",
        bench.file("data/prompts.jsonl"),
        "--sample.max-tokens",
        "8",
        "--out",
        "OUT",
    )
    pairs = [
        row
        for file in got.out.glob("*.jsonl")
        for row in got.records(file.name)
        if "responses" in row
    ]
    return got.status == 0 and len(pairs) >= 1, f"{got.short()} | {json.dumps(pairs[:1])[:200]}"


def _select(bench: Bench) -> tuple[bool, str]:
    got = bench.llama2(
        "select",
        "--candidate",
        str(bench.model),
        "--predecessor",
        str(_other(bench)),
        "--prompts",
        bench.file("data/prompts.jsonl"),
        "--sample.max-tokens",
        "8",
        "--out",
        "OUT",
    )
    return got.status == 2 and not got.crashed and "reward" in got.said, got.short()


def _other(bench: Bench) -> Path:
    """Another model of the same shape."""
    from llama2.formats import checkpoint
    from llama2.model.llama import Llama
    from llama2.tokenizer import Tokenizer

    place = bench.scratch / "other"

    if not place.is_dir():
        checkpoint.save(Llama(checkpoint.config_of(bench.model), 9), place)
        Tokenizer.load(bench.model).save(place)

    return place


def _select_copies(bench: Bench) -> tuple[bool, str]:
    from llama2.formats import checkpoint
    from llama2.stages import select

    source, target = bench.scratch / "bin", bench.scratch / "copied"
    model = checkpoint.load(bench.model)
    checkpoint.save(model, source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")

    for name in ("model.safetensors", "checksums.json"):
        (source / name).unlink(missing_ok=True)

    target.mkdir()
    select.copy(source, target)
    loaded = checkpoint.load(target)
    same = all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))

    return same, f"kept {sorted(path.name for path in target.iterdir())}"


def _bits_per_byte(bench: Bench) -> tuple[bool, str]:
    from llama2.data.compress import spell_targets
    from llama2.data.shards import Shards, write_shards
    from llama2.stages import pretrain
    from llama2.tokenizer import train

    random.seed(0)
    words = ["cat", "dog", "runs", "house", "tree", "blue", "small", "over", "under", "light"]
    documents = [
        Document(" ".join(random.choices(words, k=random.randint(4, 12))), str(i))
        for i in range(400)
    ]
    place = bench.scratch / "bpb"
    tokenizer = train([one.text for one in documents], 300, place)

    for part in ("train", "validation"):
        write_shards(documents, tokenizer, place / part / "a")

    size = sum(len(one.text.encode()) for one in documents)
    tokens = int(Shards(place / "validation" / "a", tokenizer).lengths_N.sum())
    (place / "summary.json").write_text(
        json.dumps({"validation": {"bytes": size, "tokens": tokens, "xz_bits_per_byte": 1.0}})
    )
    config = pretrain.Config(
        out=place / "o",
        shards=place,
        sequence_length=128,
        micro_batch_size=8,
        validation_rows=10000,
    )

    class Uniform(nn.Module):
        def forward(
            self, tokens_BT: torch.Tensor, targets_BT: object = None, **_: object
        ) -> torch.Tensor:
            return torch.full(tokens_BT.shape, -math.log(tokenizer.vocab_size))

    alone = Ranks(torch.device("cpu"))
    got = pretrain.TextValidation(config, tokenizer, alone)(Uniform())["validation/bits_per_byte"]
    exact = (tokens - len(documents)) * math.log2(tokenizer.vocab_size) / size
    three = config.model_copy(update={"validation_rows": 3})
    rows = pretrain.TextValidation(three, tokenizer, alone)
    few = rows(Uniform())["validation/bits_per_byte"]
    first = b"".join(
        spell_targets(segment, tokenizer) for row in range(3) for segment in rows.rows[row]
    )
    bits = 3 * 128 * math.log2(tokenizer.vocab_size) / len(first)
    close = abs(got / exact - 1) < 1e-5 and abs(few / bits - 1) < 1e-5

    return close, f"{got:.4f}, exact {exact:.4f}; of 3 rows {few:.4f}, exact {bits:.4f}"


def _sft_leak(bench: Bench) -> tuple[bool, str]:
    file = bench.scratch / "leak.jsonl"
    records.write(
        file,
        [Dialog((Message("user", f"q{i}"), Message("assistant", f"a{i}"))) for i in range(1000)],
    )
    return leaves_apart(bench, file, 0.02)


def _share(bench: Bench) -> tuple[bool, str]:
    def pairs(count: int, axis: str, tag: str) -> list[Preference]:
        return [
            Preference(
                f"{tag}{i}",
                (Message("user", f"{tag} {i}"),),
                (Response("yes tea"), Response("no")),
                0,
                "better",
                None,
                axis,
            )
            for i in range(count)
        ]  # type: ignore[arg-type]

    place = bench.scratch
    for name, count, axis in (
        ("help", 1000, "helpful"),
        ("risk", 50, "safe"),
        ("open", 100, "helpful"),
    ):
        records.write(place / f"{name}.jsonl", pairs(count, axis, name))

    common = [
        "reward",
        "--model",
        str(bench.model),
        "--preferences.h.path",
        str(place / "help.jsonl"),
        "--preferences.s.path",
        str(place / "risk.jsonl"),
        "--preferences.s.share",
        "0.03",
        "--preferences.o.path",
        str(place / "open.jsonl"),
        "--training.plan.max-steps",
        "1",
        "--out",
        "OUT",
    ]
    refused = bench.llama2(*common, "--preferences.o.share", "0.47")
    reached = bench.llama2(*common, "--preferences.o.share", "0.05")
    right = (
        refused.status == 2 and "'o' has 100 of 940 pairs" in refused.said and reached.status == 0
    )

    return right, f"{refused.short()} | {json.dumps(reached.json('summary.json'))[:300]}"


def _not_a_number(bench: Bench) -> tuple[bool, str]:
    from llama2.formats import checkpoint
    from llama2.tokenizer import Tokenizer

    broken = bench.scratch / "nan"
    scorer = checkpoint.load_scorer(bench.helpful)

    with torch.no_grad():
        scorer.score.weight.fill_(math.nan)

    checkpoint.save(scorer, broken)
    Tokenizer.load(bench.model).save(broken)
    got = bench.rejection(bench.file("data/prompts.jsonl"), judge=broken)

    return got.status == 2 and not got.crashed and "finite" in got.said, got.short()


def _one_step(bench: Bench) -> tuple[bool, str]:
    from llama2.train import optim

    rate = optim.scale_rate(0, "cosine", 0, 1, 0.1)
    return rate == 1.0, f"factor {rate}"


def _fewest_ranks(bench: Bench) -> tuple[bool, str]:
    from llama2.model.sizes import SIZES
    from llama2.stages import ppo
    from llama2.stages.common.planning import Cluster, PlannedRuns

    found = []

    for ranks in (8, 11, 12, 64):
        lineage = PlannedRuns()
        for name in ("p", "h", "s"):
            lineage.shapes[Path(name)] = SIZES["7b"]

        config = ppo.Config(
            out="o",
            policy="p",
            rewards={"helpful": "h", "safe": "s"},
            prompts="q",  # type: ignore
            iterations=400,
            micro_batch_size=1,
            sample={"max_tokens": 1024, "slots": 16},
            training={"parallel": "shard", "gradient_checkpointing": True},
        )
        found.append(ppo.plan(config, Cluster(ranks=ranks), lineage)["fewest_ranks"])

    return len(set(map(str, found))) == 1, f"fewest ranks at 8, 11, 12, 64: {found}"


def _templates(bench: Bench) -> tuple[bool, str]:
    from llama2.stages import distill

    config = distill.Config(out="o", policy="p", rewards={"helpful": "h", "safe": "s"}, prompts="q")  # type: ignore
    return bool(config.templates) and len(config.preprompts) >= 4, (
        f"{len(config.preprompts)} preprompts, templates for {sorted(config.templates)}"
    )


def _clean_memory(bench: Bench) -> tuple[bool, str]:
    peaks = []
    for megabytes in (20, 80):
        words = [
            "".join(random.Random(i).choices("abcdefghijklmnop", k=2 + i % 8)) for i in range(20000)
        ]
        file, rng, size = bench.scratch / f"big{megabytes}.jsonl", random.Random(0), 0
        with open(file, "w") as sink:
            while size < megabytes << 20:
                text = " ".join(rng.choices(words, k=200))
                size += len(text)
                sink.write(json.dumps({"text": text}) + "\n")

        program = (
            "import resource, sys; from llama2 import cli\n"
            "try: cli.main(sys.argv[1:])\n"
            "finally: print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        ran = subprocess.run(
            [
                sys.executable,
                "-c",
                program,
                "clean",
                "--sources.a.path",
                str(file),
                "--out",
                str(bench.scratch / f"cleaned{megabytes}"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        peaks.append(int(ran.stdout.rpartition("PEAK")[2]) / 1024)

    return peaks[1] - peaks[
        0
    ] < 12, f"peak {peaks[0]:.0f} MiB for 20 MiB of text, {peaks[1]:.0f} for 80"


def _code_version(bench: Bench) -> tuple[bool, str]:
    import shutil

    import llama2

    place = bench.scratch / "code"
    shutil.copytree(
        Path(llama2.__file__).parent, place / "llama2", ignore=shutil.ignore_patterns("__pycache__")
    )

    def version() -> str:
        return subprocess.run(
            [
                sys.executable,
                "-c",
                "from llama2.runs import read_code_version; print(read_code_version())",
            ],
            cwd=place,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(place), "PATH": "/usr/bin:/bin"},
            check=True,
        ).stdout.strip()

    before = version()
    file = next((place / "llama2").rglob("fused.cpp"))
    file.write_text(file.read_text() + "\n// changed\n")

    return version() != before, f"{before} -> {version()}"


def _adapters(bench: Bench) -> tuple[bool, str]:
    from llama2.kernels import install
    from llama2.model.llama import Llama, LlamaConfig

    torch.manual_seed(0)
    model = install(Llama(LlamaConfig(64, 32, 64, 2, 4, 2, max_position_embeddings=128))).eval()

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.down = nn.Parameter(torch.randn(4, base.in_features))
            self.up = nn.Parameter(torch.randn(base.out_features, 4))

        @property
        def weight(self) -> torch.Tensor:
            return self.base.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + (x @ self.down.T) @ self.up.T

    tokens, targets = torch.randint(0, 64, (2, 16)), torch.randint(0, 64, (2, 16))
    before = model(tokens)

    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        layer.mlp.gate_proj = Adapter(layer.mlp.gate_proj)

    change = float((model(tokens) - before).detach().abs().max())
    model(tokens, targets_BT=targets).sum().backward()
    learns = all(
        parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        for name, parameter in model.named_parameters()
        if name.endswith((".down", ".up"))
    )

    return (
        change > 0.01 and learns,
        f"logits change by {change:.2f}, adapters have gradients: {learns}",
    )
