"""PPO: seconds of one iteration and of its parts, and the ratio to TRL's PPOTrainer in the same
run.

    python benchmarks/ppo.py [--size T S] [--dtype fp32 bf16] [--rounds N] [--threads N]
    [--peer-python PATH]

An iteration answers 32 prompts of 64 tokens with 64 tokens each, scores them with a reward model, a
reference and a critic, and takes 4 epochs of one update over micro-batches of 8. Policy, reference,
critic and reward model all have the size, with random weights, and nothing ends an answer early, so
that both sides do the same work. Ours is the source `stages.rollouts.Rollouts`, the clipped
objective and `train.loop.fit`, as the stage runs them; scoring includes the log-probabilities and
values from which the update begins. Sides are processes that take turns, an iteration each, after
one that does not count. TRL (1.9, the last with PPO) runs in fp32: its bf16 setting changes nothing
there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import SIZES, Questions, Side, Size, has, spread
from peers import EPOCHS, MICRO, NEW_TOKENS, PROMPT_TOKENS, PROMPTS

from llama2 import cpu_tuning, devices, kernels
from llama2.generate.dialogue import Chat
from llama2.generate.engine import Engine
from llama2.generate.generator import Completion, Tokens
from llama2.generate.rewards import RewardModels, Rewards
from llama2.generate.sampling import Sampling
from llama2.model.llama import Llama
from llama2.model.scorer import Scorer
from llama2.ranks import Ranks
from llama2.records import Message, Prompt
from llama2.stages.common.ppo_rollouts import ACTOR, CRITIC, ActorCritic, Rollouts, Settings
from llama2.stages.common.ppo_watch import Watch
from llama2.stages.common.sampling import Sample
from llama2.train.learner import Learner
from llama2.train.loop import Hook, Plan, TrainingState, fit
from llama2.train.objectives import make_ppo_loss
from llama2.train.optim import AdamW

PARTS = ("rollout", "scoring", "update", "total")
TEMPLATE = 3  # tokens of a prompt that are BOS and the tags of the chat format


class Words:
    """A tokenizer of numbers: each word is an id, other words are 0."""

    bos, eos, stops = 1, 2, (2,)
    template, is_byte_level = None, False

    def encode(self, text: str) -> list[int]:
        return [int(word) if word.isdigit() else 0 for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class Endless:
    """An engine whose answers nothing ends but their length."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.context = engine, engine.context
        self.check, self.stream, self.update = engine.check, engine.stream, engine.update

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, indices: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        return self.engine.generate(prompts, replace(sampling, stop=()), indices)


class Iterations(Hook):
    """Answers one question an iteration, as soon as its last update is done."""

    def __init__(self, questions: Questions) -> None:
        self.questions = questions
        self.asked: Iterator[dict[str, Any]] = iter(questions)
        self.begin = 0.0

    def on_start(self, training: TrainingState) -> None:
        self._wait(training)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.last = metrics

    def on_boundary(self, training: TrainingState) -> None:
        if not training.source.buffer and not training.ended:  # type: ignore[attr-defined]
            parts = {name: self.last[f"time/{name}"] for name in PARTS[:-1]}
            self.questions.answer(**parts, total=time.perf_counter() - self.begin)
            self._wait(training)

    def _wait(self, training: TrainingState) -> None:
        training.finish = next(self.asked, None) is None
        self.begin = time.perf_counter()


def ours(size: Size, precision: devices.Precision) -> None:
    """This project as a side."""
    ranks = Ranks.alone()
    actor, reference = (Llama(size.config).to(ranks.device) for _ in range(2))
    critic, helpful = (Scorer(size.config, seed).to(ranks.device) for seed in (1, 2))
    random = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(
            (
                Message(
                    "user",
                    Words().decode(
                        torch.randint(
                            3, size.config.vocab_size, (PROMPT_TOKENS - TEMPLATE,), generator=random
                        ).tolist()
                    ),
                ),
            )
        )
        for _ in range(PROMPTS)
    ]
    chat: Any = Chat(Endless(Engine(actor, slots=PROMPTS, precision=precision)), Words())  # type: ignore[arg-type]
    rewards = Rewards(RewardModels(helpful=Path("helpful")), helpful.eval(), None, precision)
    watch = Watch(kl_stop=1e9, updates=EPOCHS)
    source = Rollouts(
        ActorCritic(actor, critic),
        kernels.install(reference.eval().requires_grad_(False)),
        rewards,
        chat,
        prompts,
        Settings(
            batch_size=PROMPTS,
            minibatch_size=PROMPTS,
            micro_batch_size=MICRO,
            epochs=EPOCHS,
            beta=0.01,
            gamma=1.0,
            lambda_=0.95,
            unfinished=None,
            sample=Sample(max_tokens=NEW_TOKENS, slots=PROMPTS, precision=precision),
            precision=precision,
            seed=0,
        ),
        max_iterations=10**6,
        observe=watch.observe,
    )
    learner = Learner(
        source.models, ranks, AdamW(learning_rate=1e-6), apart=(ACTOR, CRITIC), precision=precision
    )
    fit(
        learner,
        source,
        make_ppo_loss(),
        Plan(schedule="constant"),
        [watch, Iterations(Questions())],
    )


def compare(name: str, arguments: argparse.Namespace) -> None:
    """All rounds of one size."""
    found: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        sides = [
            Side(
                f"ours {precision}",
                sys.executable,
                "ppo.py",
                ["--serve", "--size", name, "--dtype", precision],
                arguments.threads,
            )
            for precision in arguments.dtype
        ]
        if arguments.peer_python:
            sides.append(
                Side(
                    "TRL fp32", arguments.peer_python, "peers.py", ["ppo", name], arguments.threads
                )
            )

        for side in sides:
            stack.enter_context(side)
            side.ask()

        for _ in range(arguments.rounds):
            for side in sides:
                found.setdefault(side.name, []).append(side.ask())

    peer = found.get("TRL fp32")
    print(
        f"{name}: seconds of an iteration, {PROMPTS} x ({PROMPT_TOKENS} + {NEW_TOKENS}) tokens, {EPOCHS} epochs"
    )
    for label, rounds in found.items():
        print(
            f"  {label:10}",
            *(f"{part} {spread([each[part] for each in rounds], '.2f')} " for part in PARTS),
            f"{PROMPTS * NEW_TOKENS / statistics.median(each['total'] for each in rounds):,.0f} new tokens/s",
        )

    for label, rounds in found.items():
        if peer and rounds is not peer:
            ratios = {part: [b[part] / a[part] for a, b in zip(rounds, peer)] for part in PARTS}
            print(
                f"  TRL fp32 / {label}:",
                *(f"{part} {spread(values, '.2f')} " for part, values in ratios.items()),
            )

    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", default=["T"], choices=list(SIZES))
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--peer-python", default=sys.executable, help="an interpreter that has trl 1.9"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.serve:
        cpu_tuning.tune()
        torch.manual_seed(0)
        ours(SIZES[arguments.size[0]], arguments.dtype[0])

        return

    if not has(arguments.peer_python, "trl"):
        arguments.peer_python = ""
        print("trl is not installed and left out: pip install trl==1.9.0, or give --peer-python")

    print(
        f"{arguments.threads} threads, torch {torch.__version__}, {arguments.rounds} rounds",
        flush=True,
    )
    for size in arguments.size:
        compare(size, arguments)


if __name__ == "__main__":
    main()
