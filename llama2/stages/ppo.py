"""Proximal policy optimisation (§3.2.3) on top of a rejection-sampling checkpoint.

Defaults are the paper's: AdamW (0.9, 0.95), eps 1e-5, decay 0.1, constant 1e-6, batches of 512 in
minibatches of 64 with one gradient step each, clip 0.2, beta 0.01 (0.005 for 34B and 70B), 200 to
400 iterations with early stopping on held-out prompts. Policy and critic are two networks of one
optimizer: each is clipped by its own gradient norm and may have a rate of its own. See `rollouts`
for the reward and for what the paper leaves open; `health` reads the run's pulse.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator
from torch import nn

from llama2 import mesh
from llama2.config import StageConfig
from llama2.errors import UserError
from llama2.evaluate.judges import kind_of
from llama2.formats.hf_directory import list_model_files, verify_checksums
from llama2.generate.dialogue import Answer, Chat
from llama2.generate.engine import Engine
from llama2.generate.rewards import RewardModels, Rewards, probability
from llama2.model.llama import Llama
from llama2.records import Prompt
from llama2.runs import CHECKPOINTS, Run, read_metrics
from llama2.stages.common import ppo_health
from llama2.stages.common.planning import (
    UNKNOWN,
    Cluster,
    Lineage,
    Tower,
    engine_bytes,
    scorer_bytes,
    training_plan,
)
from llama2.stages.common.ppo_rollouts import ACTOR, CRITIC, ActorCritic, Rollouts, Settings, seeded
from llama2.stages.common.sampling import (
    Sample,
    answer,
    fitting,
    load_rewards,
    read_prompts,
    readable,
    score,
)
from llama2.stages.common.training import Training, frozen, load_policy, load_scorer, saver, train
from llama2.tally import Tally
from llama2.tokenizer.template import check_template
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.train import hooks, parallel
from llama2.train.loop import Hook, Plan, Report
from llama2.train.loop import Training as Fitting
from llama2.train.objectives import clipped, explained_variance
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
                "one answer an iteration teaches nothing: rewards are whitened over the answers of an "
                "iteration, and alone it becomes 0; take 2 or more (the paper: 512)"
            )

        return size

    @model_validator(mode="after")
    def _here(self) -> Config:
        if self.sample.server is not None:
            raise ValueError(
                "sample.server is not for PPO: rollouts need the policy's weights of this very step, "
                "which a server does not have"
            )

        return self

    @model_validator(mode="after")
    def _eager(self) -> Config:
        if self.training.compile:
            raise ValueError(
                "training.compile is not for PPO: rollout and update must compute alike to the last bit, "
                "and every batch has another shape"
            )

        return self


def plan(config: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """Parameters, steps and memory: policy and critic are trained, the reference and the reward
    models only read."""
    policy = lineage.inherit(config.out, config.policy)
    critic = lineage.shape(config.critic or config.rewards.helpful)
    if policy is None or critic is None:
        return UNKNOWN

    towers = [Tower(policy), Tower(critic, scalar=True)]
    # never on the device together
    judges = [one.paths() for one in (config.rewards, config.judge) if one]
    steps = config.iterations * -(-config.batch_size // config.minibatch_size) * config.epochs
    found = training_plan(
        towers,
        config.training,
        cluster,
        rows=config.minibatch_size,
        micro_rows=config.micro_batch_size,
        length=min(policy.max_position_embeddings, 2 * config.sample.max_tokens),
        steps=steps,
        reference=policy,
        whole=max(
            scorer_bytes([lineage.shape(path) for path in paths], config.training.precision)
            for paths in judges
        )
        + engine_bytes(policy, config.sample, copied=True),
    )
    del found["gpu_hours"]  # most of the time goes into sampling, which FLOPs do not tell

    return found


def run(config: Config, run: Run) -> None:
    """Optimise, keep the best policy on held-out prompts, write health.json."""
    sizes = (config.batch_size % config.minibatch_size, config.minibatch_size % mesh.world())
    if config.training.parallel == "shard" and any(sizes):
        raise UserError(
            f"a sharded policy needs equal shares: batch_size {config.batch_size}, minibatch_size "
            f"{config.minibatch_size}, {mesh.world()} ranks",
            "choose sizes that divide evenly",
        )

    home = config.training.home()
    actor, tokenizer = load_policy(config.policy, home=home)
    check_template(config.policy, tokenizer.template)
    reference, _ = load_policy(config.policy, home=home)

    if config.training.parallel == "shard":
        # the policy's own rounding: its first KL is exactly 0
        parallel.shard(reference, config.training.precision)
    else:
        frozen(reference, config.training.precision)

    critic, _ = load_scorer(config.critic or config.rewards.helpful, tokenizer, home=home)
    judge = load_rewards(config.judge, tokenizer, config.sample.precision) if config.judge else None
    if judge is not None:
        judge.to("cpu")

    rewards = load_rewards(config.rewards, tokenizer, config.sample.precision)
    models = ActorCritic(actor, critic)
    chat = Chat(
        Engine(actor, slots=config.sample.slots, precision=config.sample.precision), tokenizer
    )
    tally = run.tally("prompts")
    prompts = fitting(
        chat,
        read_prompts(config.prompts, None, config.seed),
        max(1, config.sample.max_tokens // 2),
        tally,
        "lower sample.max_tokens, of which half must fit behind a prompt, shorten "
        "them, or take a model with a longer context",
    )
    prompts = readable(chat, rewards, prompts, config.sample, tally)
    watch = Watch(config.kl_stop, -(-config.batch_size // config.minibatch_size) * config.epochs)
    doctor = ppo_health.Doctor(
        lambda: read_metrics(run.path), config.kl_stop, config.training.precision
    )
    source = Rollouts(
        models,
        reference.eval().requires_grad_(False),
        rewards,
        chat,
        prompts,
        settings(config),
        config.iterations,
        watch.observe,
    )
    training = config.training.with_steps(config.iterations * source.updates)
    training = training.model_copy(
        update={
            "plan": training.plan.model_copy(
                update={"validate_every": config.validate_iterations * source.updates}
            )
        }
    )
    best = run.path / CHECKPOINTS / "best"
    validate = (
        heldout(
            config,
            chat,
            rewards,
            judge,
            saver(actor, tokenizer),
            best,
            run.tally("held-out prompts"),
        )
        if config.heldout
        else None
    )
    learner = train(
        run,
        models,
        source,
        clipped(config.clip, config.value_clip, config.value_coefficient),
        training,
        save_model=lambda directory: adopt(best, directory, actor, tokenizer),
        title="ppo",
        validate=validate,
        extra=(watch, doctor),
        derive=(explained_variance,),
        apart=(ACTOR, CRITIC),
        rates={CRITIC: config.critic_learning_rate or config.training.optimizer.learning_rate},
    )

    if line := ending(config, learner.step, config.iterations * source.updates, watch, validate):
        run.conclude(line)

    run.write_json(
        "summary.json",
        {
            "parameters": actor.config.parameters(),
            "steps": learner.step,
            "tokens": learner.tokens,
            "trained": learner.trained,
        },
    )
    run.write_json("health.json", {"alarms": doctor.tell(finished=True), "samples": source.samples})


def settings(config: Config) -> Settings:
    """The part of the configuration that shapes a rollout."""
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


def adopt(best: Path, directory: Path, actor: Llama, tokenizer: Tokenizer) -> None:
    """The final policy: the best one on held-out prompts, or the last where none was measured.
    UserError if the best was damaged meanwhile."""
    if not best.exists():
        saver(actor, tokenizer)(directory)
        return

    try:
        mesh.first(lambda: verify_checksums(best))
    except UserError as error:
        raise UserError(
            error.cause, f"delete {best.parent}: the same command starts over"
        ) from None

    if mesh.is_main():
        for name in list_model_files(best):
            shutil.copy2(best / name, directory / name)

        tokenizer.save(directory)


class Watch(Hook):
    """Publishes what each iteration's rollout and updates looked like; stops when KL runs away."""

    def __init__(self, kl_stop: float, updates: int) -> None:
        self.kl_stop, self.updates, self.pending = kl_stop, updates, dict[str, float]()
        self.update_seconds = 0.0

    def observe(self, found: dict[str, float]) -> None:
        self.pending = dict(found)

    def on_step(self, training: Fitting, report: Report) -> None:
        first = (report.step - 1) % self.updates == 0
        if first:
            self.pending["ppo/first_ratio_deviation"] = report.sums["ppo/ratio_deviation"] / (
                report.weight or 1.0
            )

        spent = (
            self.pending.get("time/rollout", 0.0) + self.pending.get("time/scoring", 0.0)
            if first
            else 0.0
        )
        self.update_seconds += report.seconds - spent
        for part, norm in report.gradient_norms.items():
            self._mean(f"ppo/{part.rstrip('.')}_grad_norm", norm)
            self._mean(f"ppo/{part.rstrip('.')}_clipped", clipped_share(norm, training.plan.clip))

        if report.step % self.updates == 0:
            training.log({**self.pending, "time/update": self.update_seconds})
            self.update_seconds = 0.0
            if self.pending.get("ppo/kl_reference", 0.0) > self.kl_stop:
                training.finish = True

    def _mean(self, name: str, value: float) -> None:
        """Add one update's value to the mean over the iteration's."""
        self.pending[name] = self.pending.get(name, 0.0) + value / self.updates

    def state_dict(self) -> dict[str, Any]:
        return {"pending": self.pending, "update_seconds": self.update_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pending, self.update_seconds = state["pending"], state["update_seconds"]


def clipped_share(norm: float, limit: float) -> float:
    """The share of a gradient of this norm that clipping takes away."""
    return 1 - limit / norm if norm > limit else 0.0


class Heldout(hooks.Validate):
    """Validation that also looks at the starting policy: it is the one to beat."""

    def on_start(self, training: Fitting) -> None:
        if training.learner.step == 0:
            self._validate(training)


def ending(config: Config, step: int, steps: int, watch: Watch, validate: Heldout | None) -> str:
    """Why training stopped before its last update, if it did, and which policy was kept, if
    held-out prompts chose."""
    kl, said = watch.pending.get("ppo/kl_reference", 0.0), []
    if step < steps:
        why = (
            f"the mean KL of an answer from the start is {kl:.3g} nats, over kl_stop {config.kl_stop:g}"
            if kl > config.kl_stop
            else f"{config.patience} validations in a row brought no improvement"
        )
        said.append(f"stopped at update {step:,} of {steps:,}: {why}")

    if validate is not None and validate.best is not None:
        said.append(
            f"the policy kept is that of update {validate.best_step:,}, the best on held-out prompts "
            f"({validate.monitor} {validate.best:.3f})"
        )

    return "; ".join(said)


@contextmanager
def at_hand(judge: Rewards, rewards: Rewards) -> Iterator[Rewards]:
    """The judge on the device, in the place of the reward models: it is needed so seldom that it
    has none of its own.
    """
    rewards.to("cpu")
    judge.to(mesh.device())
    try:
        yield judge
    finally:
        judge.to("cpu")
        rewards.to(mesh.device())


def heldout(
    config: Config,
    chat: Chat,
    rewards: Rewards,
    judge: Rewards | None,
    save: Any,
    best: Path,
    tally: Tally,
) -> Heldout:
    """Early stopping on held-out prompts: every kind of prompt counts alike, whatever its
    number."""
    assert config.heldout is not None
    prompts = fitting(
        chat, read_prompts(config.heldout, config.heldout_limit, config.seed), 16, tally
    )
    prompts = readable(chat, judge or rewards, prompts, config.sample, tally)

    def evaluate(model: nn.Module) -> dict[str, float]:
        answers = answer(
            chat,
            [prompt.messages for prompt in prompts],
            config.sample,
            seed=seeded(config.seed, 999_983),
        )
        if judge is None:
            return measure(chat, rewards, prompts, answers)

        with at_hand(judge, rewards):
            return measure(chat, judge, prompts, answers)

    def keep() -> None:
        save(best)

    return Heldout(
        evaluate, "heldout/reward", higher=True, patience=config.patience, keep_best=keep
    )


def measure(
    chat: Chat, judge: Rewards, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]
) -> dict[str, float]:
    """Mean probability of being good, by kind of prompt and over kinds."""
    marks = [probability(one[0].joined) for one in score(judge, chat.tokenizer, prompts, answers)]
    kinds: dict[str, list[float]] = {}
    for prompt, mark in zip(prompts, marks):
        kinds.setdefault(kind_of(prompt), []).append(mark)

    means = {f"heldout/{kind}": statistics.fmean(found) for kind, found in kinds.items()}
    return {**means, "heldout/reward": statistics.fmean(means.values())}
