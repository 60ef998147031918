"""The pool over rounds of rejection sampling (§3.2.3): does a skill stay that was taught in the
first round alone?

    make demo && python benchmarks/pool.py [--recipe runs/demo] [--skill story] [--seed 0]

Three rounds from the demo's SFT model, each trained on what rejection sampling kept. The first asks
for the skill (a family of the microworld's prompts) and for answers to unsafe prompts, the second
and third for the latter only. Once each version is trained on the best answers of its own round, as
up to the paper's V3; once on the pool of all rounds (`earlier`). Printed is the mean helpfulness,
by the world's own truth, of answers (temperature 0.6, top-p 0.9, as versions are judged) to
held-out prompts of either kind, with its standard error. It takes some minutes on two cores, and
goes on in --out after an interruption.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from llama2 import records
from llama2.config import build
from llama2.evaluate.judges import rate
from llama2.generate.dialogue import Chat
from llama2.recipe import launch
from llama2.recipe.workers import execute
from llama2.records import Prompt
from llama2.runs import Run
from llama2.stages.common.judges import make_judge
from llama2.stages.common.sampling import Sample, answer, load_chat, seed_use

ROUNDS = 3
LATER = ("unsafe",)
MAX_TOKENS = 64
ANSWERS = 4  # to each held-out prompt


def carry_out(verb: str, out: Path, **values: Any) -> Path:
    """One stage; the run directory."""
    execute(verb, build(launch.load(verb).Config, {"out": str(out), **values}))
    return out


def chosen(
    world: Path, split: str, families: tuple[str, ...], count: int, skip: int = 0
) -> list[Prompt]:
    """Different prompts of some families, in the order of the file."""
    found = {
        one.messages: one
        for one in records.read(Prompt, world / f"prompts-{split}.jsonl")
        if one.metadata["family"] in families
    }
    return list(found.values())[skip : skip + count]


def asked(arguments: argparse.Namespace, out: Path) -> list[Path]:
    """The prompts of each round: half of the first are of the skill; no round has another's."""
    world, half = arguments.recipe / "world", arguments.prompts // 2
    files = []
    for number in range(ROUNDS):
        mine = chosen(world, "train", LATER, 2 * half, number * 2 * half)
        if number == 0:
            mine = chosen(world, "train", (arguments.skill,), half) + mine[:half]

        files.append(out / f"prompts{number + 1}.jsonl")
        records.write(files[-1], mine)

    return files


def arm(
    arguments: argparse.Namespace, out: Path, name: str, pooled: bool, files: list[Path]
) -> list[Path]:
    """Three rounds of rejection sampling and training; the versions. The first round is the same
    for all arms."""
    base, seed = arguments.recipe, arguments.seed
    versions = [base / "sft"]
    rounds: list[Path] = []

    for number, file in enumerate(files, 1):
        place = out / (name if number > 1 else "first")
        rounds.append(
            carry_out(
                "rejection",
                place / f"rejection{number}",
                policy=str(versions[-1]),
                prompts=str(file),
                k=arguments.k,
                rewards={"helpful": str(base / "helpful1"), "safe": str(base / "safe1")},
                temperatures=[1.0],
                earlier=[str(path) for path in rounds] if pooled else [],
                seed=seed_use(seed, "round", number) % 2**31,
                sample={"max_tokens": MAX_TOKENS, "slots": 256},
            )
        )
        versions.append(
            carry_out(
                "sft",
                place / f"v{number}",
                model=str(versions[-1]),
                sequence_length=384,
                batch_size=4,
                micro_batch_size=4,
                dialogs={"rejection": {"path": str(rounds[-1] / "pool.jsonl")}},
                seed=seed,
                epochs=arguments.epochs,
                training={
                    "optimizer": {"learning_rate": arguments.learning_rate},
                    "plan": {"warmup_steps": 5},
                },
            )
        )

    return versions[1:]


def helpfulness(version: Path, prompts: list[Prompt], out: Path) -> tuple[float, float]:
    """Mean of the true helpfulness of answers, and its standard error over prompts."""
    sample = Sample(temperature=0.6, top_p=0.9, max_tokens=MAX_TOKENS, slots=256)
    chat: Chat = load_chat(version, sample, Run(out, finished=False))
    answers = answer(chat, [prompt.messages for prompt in prompts], sample, n=ANSWERS, seed=1)
    values = []

    for prompt, mine in zip(prompts, answers):
        ratings = rate(make_judge(), [prompt] * ANSWERS, [one.text for one in mine])
        assert ratings is not None
        values.append(statistics.fmean(one.helpfulness for one in ratings))

    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", type=Path, default=Path("runs/demo"), help="a finished run of recipes/demo"
    )
    parser.add_argument("--skill", default="story")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="pool-"))
    files = asked(arguments, out)
    world = arguments.recipe / "world"
    tests = {
        arguments.skill: chosen(world, "evaluation", (arguments.skill,), 200),
        "asked later": chosen(world, "evaluation", LATER, 300),
    }
    arms = {name: arm(arguments, out, name, name == "pool", files) for name in ("newest", "pool")}
    print(
        f"{'version':22}"
        + "".join(f"{f'{name} ({len(some)})':>22}" for name, some in tests.items())
    )
    lines = [("SFT", arguments.recipe / "sft"), ("V1", arms["pool"][0])]
    lines += [
        (f"V{number + 1}, {name}", versions[number])
        for number in (1, 2)
        for name, versions in arms.items()
    ]

    for name, version in lines:
        found = [helpfulness(version, some, out) for some in tests.values()]
        print(
            f"{name:22}" + "".join(f"{f'{mean:.3f} +- {error:.3f}':>22}" for mean, error in found),
            flush=True,
        )


if __name__ == "__main__":
    main()
