"""Proximal policy optimisation (§3.2.3) on top of a rejection-sampling checkpoint.

Defaults are the paper's: AdamW (0.9, 0.95), eps 1e-5, decay 0.1, constant 1e-6, batches of 512 in
minibatches of 64 with one gradient step each, clip 0.2, beta 0.01 (0.005 for 34B and 70B), 200 to
400 iterations with early stopping on held-out prompts. Policy and critic are two networks of one
optimizer: each is clipped by its own gradient norm and may have a rate of its own. See
`ppo_rollouts` for the reward and for what the paper leaves open, `ppo_health` for the alarms.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from llama2 import devices
from llama2.config import StageConfig
from llama2.errors import UserError
from llama2.generate.dialogue import Chat
from llama2.generate.engine import Engine
from llama2.generate.rewards import RewardModels, Rewards
from llama2.model.llama import Llama
from llama2.ranks import Ranks
from llama2.records import Prompt
from llama2.results import HealthResult, PpoResult, Rollout
from llama2.runs import CHECKPOINTS, Run, read_metrics
from llama2.stages.common.memory import Tower, engine_bytes, scorer_bytes
from llama2.stages.common.planning import UNKNOWN, Cluster, PlannedRuns, plan_training
from llama2.stages.common.ppo_health import Doctor
from llama2.stages.common.ppo_rollouts import (
    ACTOR,
    CRITIC,
    ActorCritic,
    Rollouts,
    Settings,
    offset_seed,
)
from llama2.stages.common.ppo_stopping import BestPolicy, EarlyStopping, HeldoutReward
from llama2.stages.common.ppo_watch import Watch
from llama2.stages.common.sampling import (
    Sample,
    keep_fitting,
    keep_scorable,
    load_rewards,
    read_prompts,
)
from llama2.stages.common.training import (
    Training,
    freeze,
    load_policy,
    load_scorer,
    make_saver,
    train,
)
from llama2.tokenizer.template import check_template
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train import parallel
from llama2.train.loop import Plan
from llama2.train.objectives import compute_explained_variance, make_ppo_loss
from llama2.train.optim import AdamW


class Config(StageConfig):
    """Optimise a policy against the reward models."""

    policy: Path
    """where to start; the KL penalty refers to it as well"""
    critic: Path | None = None
    """where the value model starts; the helpfulness reward model unless given"""
    rewards: RewardModels
    prompts: Path
    heldout: Path | None = None
    """prompts for early stopping; without them the last policy is kept"""
    heldout_limit: int = Field(256, gt=0)
    judge: RewardModels | None = None
    """reward models for the held-out prompts: others than those optimised, if there are any, since
    what is optimised no longer measures (Goodhart). The paper has a general one, trained on open
    data"""
    iterations: int = Field(200, gt=0)
    batch_size: int = Field(512, gt=0)
    """answers an iteration, at least 2: rewards are whitened over them"""
    minibatch_size: int = Field(64, gt=0)
    """answers an update"""
    micro_batch_size: int = Field(8, gt=0)
    epochs: int = Field(1, gt=0)
    """gradient steps each minibatch gets"""
    beta: float = Field(0.01, ge=0)
    """weight of the KL penalty"""
    clip: float = Field(0.2, gt=0)
    value_clip: float = Field(0.2, gt=0)
    value_coefficient: float = Field(0.5, ge=0)
    gamma: float = Field(1.0, gt=0, le=1)
    lambda_: float = Field(0.95, ge=0, le=1)
    critic_learning_rate: float | None = Field(None, gt=0)
    """the actor's rate unless given; docs/paper.md tells what others take"""
    unfinished: float | None = None
    """raw score of an answer cut off at max_tokens; unless given it is scored as it is, without an
    end it did not say
    """
    kl_stop: float = Field(30.0, gt=0)
    """stop when the mean KL of an answer from the starting policy, in nats, exceeds this"""
    validate_iterations: int = Field(10, gt=0)
    patience: int = Field(5, ge=0)
    """validations without improvement before stopping; 0: never"""
    sample: Sample = Sample()
    training: Training = Training(
        optimizer=AdamW(learning_rate=1e-6),
        plan=Plan(schedule="constant", log_every=1, save_every=80),
    )

    @field_validator("batch_size")
    @classmethod
    def _several(cls, size: int) -> int:
        if size == 1:
            raise ValueError(
                "one answer an iteration teaches nothing: rewards are whitened over the answers "
                "of an iteration, and alone it becomes 0; take 2 or more (the paper: 512)"
            )

        return size

    @model_validator(mode="after")
    def _here(self) -> Config:
        if self.sample.server is not None and not self.sample.server.takes_weights:
            raise ValueError(
                "sample.server is not for PPO: rollouts need the policy's weights of this very "
                "step, which a server does not have"
            )

        return self

    @model_validator(mode="after")
    def _eager(self) -> Config:
        if self.training.compile:
            raise ValueError(
                "training.compile is not for PPO: rollout and update must compute alike to the "
                "last bit, and every batch has another shape"
            )

        return self

    @property
    def updates(self) -> int:
        """Updates of an iteration."""
        return -(-self.batch_size // self.minibatch_size) * self.epochs


def plan(config: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return parameters, steps and memory: policy and critic are trained, the reference and the
    reward models only read."""
    policy = planned.inherit(config.out, config.policy)
    critic = planned.shape(config.critic or config.rewards.helpful)
    if policy is None or critic is None:
        return UNKNOWN

    # the reward models that optimise and those that judge are never on the device together
    sizes = []
    for models in (config.rewards, config.judge):
        shapes = [planned.shape(path) for path in models.paths()] if models else []
        sizes.append(scorer_bytes(shapes, config.training.precision))

    facts = plan_training(
        [Tower(policy), Tower(critic, scalar=True)],
        config.training,
        cluster,
        rows=config.minibatch_size,
        micro_rows=config.micro_batch_size,
        length=min(policy.max_position_embeddings, 2 * config.sample.max_tokens),
        steps=config.iterations * config.updates,
        reference=policy,
        whole=max(sizes) + engine_bytes(policy, config.sample, copied=True),
    )
    del facts["gpu_hours"]  # most of the time goes into sampling, which FLOPs do not tell
    return facts


def run(config: Config, run: Run) -> None:
    """Optimise, keep the best policy on held-out prompts, and write how healthy the run was."""
    _check_shares(config, run.ranks)
    networks = load_networks(config, run.ranks)
    actor, tokenizer = networks.models.actor, networks.tokenizer
    engine = Engine(actor, slots=config.sample.slots, precision=config.sample.precision)
    chat = Chat(engine, tokenizer, run.ranks)
    prompts = _read_prompts(config, run, chat, networks.rewards)

    watch = Watch(config.kl_stop, config.updates)
    doctor = Doctor(
        lambda: read_metrics(run.path), config.kl_stop, config.training.precision, run.ranks
    )
    source = Rollouts(
        networks.models,
        networks.reference,
        networks.rewards,
        chat,
        prompts,
        settings(config),
        config.iterations,
        watch.observe,
    )
    save = make_saver(actor, tokenizer, run.ranks)
    best = BestPolicy(run.path / CHECKPOINTS / "best", save, tokenizer, run.ranks)
    stopping = _make_stopping(config, run, chat, networks, best)
    steps = config.iterations * source.updates
    learner = train(
        run,
        networks.models,
        source,
        make_ppo_loss(config.clip, config.value_clip, config.value_coefficient),
        config.training.with_steps(
            steps, validate_every=config.validate_iterations * source.updates
        ),
        save_model=best.adopt,
        title="ppo",
        validate=stopping,
        extra=(watch, doctor),
        derive=(compute_explained_variance,),
        apart=(ACTOR, CRITIC),
        rates={CRITIC: config.critic_learning_rate or config.training.optimizer.learning_rate},
    )
    for line in describe_end(config, learner.step, steps, watch, stopping):
        run.conclude(line)

    run.write_result(
        PpoResult(
            parameters=actor.config.parameters(),
            steps=learner.step,
            tokens=learner.tokens,
            trained=learner.trained,
        )
    )
    samples = [Rollout.model_validate(sample) for sample in source.samples]
    run.write_result(HealthResult(alarms=doctor.report(finished=True), samples=samples))


def _check_shares(config: Config, ranks: Ranks) -> None:
    """UserError where ranks that share one model would get unequal parts of a batch."""
    rests = (config.batch_size % config.minibatch_size, config.minibatch_size % ranks.data.size)
    if config.training.parallel == "shard" and any(rests):
        raise UserError(
            f"a sharded policy needs equal shares: batch_size {config.batch_size}, minibatch_size "
            f"{config.minibatch_size}, {ranks.size} ranks",
            "choose sizes that divide evenly",
        )


@dataclass(frozen=True)
class Networks:
    """All models of a run: two that are trained, and those that are only read."""

    models: ActorCritic
    reference: Llama
    """the policy as it was"""
    rewards: Rewards
    """what is optimised"""
    judge: Rewards | None
    """judges held-out prompts; waits in the memory of the CPU"""
    tokenizer: Tokenizer


def load_networks(config: Config, ranks: Ranks) -> Networks:
    """Load each checkpoint once; all of them have the policy's tokenizer."""
    home, precision = config.training.home(ranks), config.sample.precision
    actor, tokenizer = load_policy(config.policy, home)
    check_template(config.policy, tokenizer)
    reference = copy.deepcopy(actor)

    if config.training.parallel == "shard":
        # the policy's own rounding: its first KL is exactly 0
        parallel.shard(reference, ranks, config.training.precision)
    else:
        freeze(reference, config.training.precision)

    reference.eval().requires_grad_(False)
    critic, _ = load_scorer(config.critic or config.rewards.helpful, home, tokenizer)
    judge = None
    if config.judge is not None:
        judge = load_rewards(config.judge, tokenizer, ranks, precision)
        judge.to(devices.CPU)

    rewards = load_rewards(config.rewards, tokenizer, ranks, precision)
    return Networks(ActorCritic(actor, critic), reference, rewards, judge, tokenizer)


def _read_prompts(config: Config, run: Run, chat: Chat, rewards: Rewards) -> list[Prompt]:
    """Read the prompts that leave room for an answer and fit into the reward models."""
    tally = run.tally("prompts")
    prompts = keep_fitting(
        chat,
        read_prompts(config.prompts, None, config.seed),
        max(1, config.sample.max_tokens // 2),
        tally,
        "lower sample.max_tokens, of which half must fit behind a prompt, shorten them, or take a "
        "model with a longer context",
    )
    return keep_scorable(chat, rewards, prompts, config.sample, tally)


def _make_stopping(
    config: Config, run: Run, chat: Chat, networks: Networks, best: BestPolicy
) -> EarlyStopping | None:
    """Return validation on held-out prompts, where there are any."""
    if config.heldout is None:
        return None

    tally = run.tally("held-out prompts")
    prompts = read_prompts(config.heldout, config.heldout_limit, config.seed)
    prompts = keep_fitting(chat, prompts, 16, tally)
    judge = networks.judge or networks.rewards
    prompts = keep_scorable(chat, judge, prompts, config.sample, tally)
    return EarlyStopping(
        HeldoutReward(
            chat,
            networks.rewards,
            networks.judge,
            prompts,
            config.sample,
            offset_seed(config.seed, 999_983),
        ),
        "heldout/reward",
        higher=True,
        patience=config.patience,
        keep_best=best.keep,
    )


def settings(config: Config) -> Settings:
    """Return the part of the configuration that shapes a rollout."""
    return Settings(
        config.batch_size,
        config.minibatch_size,
        config.micro_batch_size,
        config.epochs,
        config.beta,
        config.gamma,
        config.lambda_,
        config.unfinished,
        config.sample,
        config.training.precision,
        config.seed,
    )


def describe_end(
    config: Config, step: int, steps: int, watch: Watch, stopping: EarlyStopping | None
) -> Iterator[str]:
    """Say why training stopped before its last update, if it did, and which policy was kept, if
    held-out prompts chose."""
    lines = []
    kl = watch.pending.get("ppo/kl_reference", 0.0)
    if step < steps:
        why = f"{config.patience} validations in a row brought no improvement"
        if kl > config.kl_stop:
            why = (
                f"the mean KL of an answer from the start is {kl:.3g} nats, over kl_stop "
                f"{config.kl_stop:g}"
            )
        lines.append(f"stopped at update {step:,} of {steps:,}: {why}")

    if stopping is not None and stopping.best is not None:
        lines.append(
            f"the policy kept is that of update {stopping.best_step:,}, the best on held-out "
            f"prompts ({stopping.monitor} {stopping.best:.3f})"
        )

    if lines:
        yield "; ".join(lines)
