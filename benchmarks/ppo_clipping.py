"""PPO at the paper's settings: what clipping leaves of the policy's gradient, and how far the
policy then moves.

    python benchmarks/ppo_clipping.py [RUN] [--iterations N] [--batch-size N] [--precision
    fp32|bf16]

RUN is a finished demo (runs/demo): its SFT model is the policy, its first reward models reward, and
the critic starts as the one of helpfulness. beta 0.01, constant learning rate 1e-6 for both towers,
clip 0.2, gradients clipped at 1.0; the batch is small. Two ways of training are compared:
`together`, both towers clipped by one norm and the critic starting on the reward model's own scale;
and `apart`, each tower clipped by its own norm and the critic on the scale of whitened returns, as
the stage does. What each way's batches would have made of the policy `alone`, without any critic,
is found by training it on the very same batches once more. Movement is the norm of the change of
all weights, and the exact KL of the new from the old policy, per token of the answers.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llama2 import cpu_tuning, devices
from llama2.batches import Batch
from llama2.generate.dialogue import Chat
from llama2.generate.engine import Engine
from llama2.generate.rewards import RewardModels
from llama2.model.llama import Llama
from llama2.ranks import Ranks
from llama2.stages import ppo
from llama2.stages.common.ppo_rollouts import ACTOR, CRITIC, ActorCritic, Rollouts
from llama2.stages.common.ppo_watch import measure_clipping
from llama2.stages.common.sampling import Sample, keep_fitting, load_rewards, read_prompts
from llama2.stages.common.training import freeze, load_policy, load_scorer
from llama2.train.learner import Learner
from llama2.train.loop import Hook, Report, TrainingState, fit
from llama2.train.objectives import compute_explained_variance, make_ppo_loss


@dataclass
class Kept(Hook):
    """A source that keeps what it gave, and a hook that keeps what came of it."""

    source: Any
    batches: list[list[Batch]] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    def __next__(self) -> list[Batch]:
        self.batches.append(next(self.source))
        return self.batches[-1]

    def on_step(self, training: TrainingState, report: Report) -> None:
        self.reports.append(report)

    def norms(self) -> list[float]:
        return [report.gradient_norm for report in self.reports]


@dataclass
class Way:
    """What one way of training made of the policy."""

    cut: list[float]
    """share of the policy's gradient that was clipped away, by update"""
    actor: list[float]
    critic: list[float]
    explained: float
    moved: float
    kl: float


def train(
    config: ppo.Config, apart: tuple[str, ...], batches: list[list[Batch]] | None = None
) -> tuple[Llama, Kept]:
    """PPO from the start; with `batches` the policy alone on these, without a critic."""
    ranks = Ranks.alone()
    actor, tokenizer = load_policy(config.policy, ranks.device)
    reference = freeze(load_policy(config.policy, ranks.device)[0], config.training.precision)
    models = ActorCritic(actor, load_scorer(config.rewards.helpful, ranks.device, tokenizer)[0])
    chat = Chat(
        Engine(actor, slots=config.sample.slots, precision=config.sample.precision), tokenizer
    )
    prompts = keep_fitting(
        chat, read_prompts(config.prompts, None, config.seed), room=config.sample.max_tokens // 2
    )
    rewards = load_rewards(config.rewards, tokenizer, ranks, config.sample.precision)
    rollouts = Rollouts(
        models,
        reference,
        rewards,
        chat,
        prompts,
        ppo.settings(config),
        config.iterations,
        observe=lambda found: None,
    )
    rollouts.scaled = not apart  # as it was: the critic keeps the reward model's scale
    kept = Kept(rollouts if batches is None else iter(batches))
    objective = make_ppo_loss(
        config.clip, config.value_clip, 0.0 if batches else config.value_coefficient
    )
    learner = Learner(
        models, ranks, config.training.optimizer, apart=apart, precision=config.training.precision
    )
    fit(learner, kept, objective, config.training.plan, [kept])

    return actor, kept


@torch.no_grad()
def movement(config: ppo.Config, actor: Llama, batches: list[list[Batch]]) -> tuple[float, float]:
    """Norm of the change of weights; KL(new || old) per token of the answers, over the whole
    vocabulary."""
    start, _ = load_policy(config.policy, devices.choose())
    change = sum(
        float((a - b).double().square().sum())
        for a, b in zip(actor.parameters(), start.parameters())
    )
    total = count = 0.0

    for batch in (batch for update in batches for batch in update):
        new_BTV, old_BTV = (
            model(batch["tokens_BT"]).double().log_softmax(-1) for model in (actor, start)
        )
        kl_BT = (new_BTV.exp() * (new_BTV - old_BTV)).sum(-1) * batch["weights_BT"]
        total, count = total + float(kl_BT.sum()), count + float(batch["weights_BT"].sum())

    return change**0.5, total / count


def compare(config: ppo.Config, apart: tuple[str, ...]) -> tuple[Way, Way]:
    """One way of training, and the policy alone on its batches."""
    actor, kept = train(config, apart)
    single, alone = train(config, (ACTOR, CRITIC), kept.batches)
    limit = config.training.plan.clip
    own = [report.gradient_norms[ACTOR] for report in alone.reports]
    critic = [max(whole**2 - mine**2, 0.0) ** 0.5 for whole, mine in zip(kept.norms(), own)]
    clipping = (
        kept.norms() if not apart else [report.gradient_norms[ACTOR] for report in kept.reports]
    )
    first = {
        name: sum(report.sums[name] for report in kept.reports)
        / sum(report.weight for report in kept.reports)
        for name in ("ppo/return", "ppo/return_square", "ppo/error", "ppo/error_square")
    }

    return (
        Way(
            [measure_clipping(norm, limit) for norm in clipping],
            own,
            critic,
            compute_explained_variance(first)["ppo/explained_variance"],
            *movement(config, actor, kept.batches),
        ),
        Way(
            [measure_clipping(norm, limit) for norm in own],
            own,
            [0.0],
            0.0,
            *movement(config, single, kept.batches),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"))
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    arguments = parser.parse_args()
    cpu_tuning.tune()
    config = ppo.Config(
        out=Path("unused"),
        policy=arguments.run / "sft",
        prompts=arguments.run / "world" / "prompts-train.jsonl",
        rewards=RewardModels(helpful=arguments.run / "helpful1", safe=arguments.run / "safe1"),
        iterations=arguments.iterations,
        batch_size=arguments.batch_size,
        minibatch_size=arguments.batch_size // 2,
        micro_batch_size=arguments.batch_size // 2,
        sample=Sample(max_tokens=48, precision=arguments.precision),
        training=ppo.Config.model_fields["training"].default.model_copy(
            update={"precision": arguments.precision}
        ),
    )
    print(
        f"{arguments.run}: {config.iterations} iterations of {config.batch_size} answers, {arguments.precision}, "
        f"learning rate {config.training.optimizer.learning_rate:g}, beta {config.beta:g}, gradients clipped at "
        f"{config.training.plan.clip:g}",
        flush=True,
    )

    for name, apart in (("together", ()), ("apart", (ACTOR, CRITIC))):
        show(name, *compare(config, apart))


def show(name: str, way: Way, alone: Way) -> None:
    """Two lines of one way of training."""
    mean = statistics.fmean
    print(
        f"{name:8}  gradient norm: policy {mean(way.actor):.3f}, critic {mean(way.critic):.3f}; of the policy's "
        f"gradient clipping takes {mean(way.cut):.1%} (alone {mean(alone.cut):.1%}); explained variance "
        f"{way.explained:.2f}"
    )
    print(
        f"{'':8}  the policy moves by {way.moved:.3e} ({way.moved / alone.moved:.1%} of alone), KL {way.kl:.3e} "
        f"nats a token ({way.kl / alone.kl:.1%} of alone)",
        flush=True,
    )


if __name__ == "__main__":
    main()
